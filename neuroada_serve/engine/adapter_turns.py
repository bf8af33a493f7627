"""Turns of adapters on the device: which of the running sequences have theirs there. Pure Python.

A running sequence holds its adapter on the device, or is parked in its slot until it can. When more
adapters are wanted than the device has room for, they take turns: sequences of the one that has had
most are parked and the one that has had least comes in; but first any sequence without a token.
Adapters are so small that a turn of a few steps repays the upload many times over.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

from neuroada_serve.adapters.readiness import Readiness
from neuroada_serve.engine.sequence import Sequence

# Steps that an adapter keeps its place for, at least, while others wait for room (bench/LOG.md).
TURN_STEPS = 4
# Steps after which a parked sequence is as urgent as one without a token. More leaves longer
# gaps between tokens, and first tokens come no sooner (bench/LOG.md).
MOST_PARKED = 8
# For so many steps, room is kept for the first that needs more than there is; then, as long, it is
# not: there may never be enough.
_PATIENCE = 64


class DeviceAdapters(Protocol):
    """The adapters on the device, as the scheduler sees them; `AdapterTiers` in earnest."""

    def is_ready(self, version: Any) -> bool:
        """Return whether a version is on the device."""
        ...

    def request(self, version: Any) -> Readiness:
        """Begin to bring a version to the device unless it is there or on its way."""
        ...

    def hold(self, version: Any) -> bool:
        """Keep a version there until `release` has been called as often; False: it is not there."""
        ...

    def release(self, version: Any) -> None: ...


class _AllOnDevice:
    """Adapters that are always on the device."""

    def is_ready(self, version: Any) -> bool:
        return True

    def request(self, version: Any) -> Readiness:
        return Readiness.READY

    def hold(self, version: Any) -> bool:
        return True

    def release(self, version: Any) -> None: ...


class AdapterTurns:
    """Hold adapters for sequences, and park sequences whose adapter makes room for another.

    Args:
        running: the sequences with a slot, by slot; the scheduler's own.
        rank: what a sequence's tenant, and its adapter there, have had: lower goes first.
        adapters: the adapters on the device; default: all are always there.
        can_leave: whether a version may leave the device once no sequence holds it.
    """

    def __init__(
        self,
        running: Mapping[int, Sequence],
        rank: Callable[[Sequence], tuple[float, float]],
        adapters: DeviceAdapters | None = None,
        can_leave: Callable[[Any], bool] = lambda version: True,
    ) -> None:
        self.num_parked = 0  # times that an adapter has left for another
        self._running = running
        self._rank = rank
        self._adapters: DeviceAdapters = _AllOnDevice() if adapters is None else adapters
        self._can_leave = can_leave
        self._step = 0
        self._begun: dict[Hashable, int] = {}  # version in use -> step in which its turn began
        self._num_holders: Counter[Hashable] = Counter()  # sequences, of each version in use
        self._first_in_need: Sequence | None = None  # in this step, the first that found no room
        self._need: tuple[Hashable, int] | None = None  # its version, and the step since when

    def begin_step(self) -> None:
        self._step += 1
        if self._first_in_need is None:
            self._need = None
        self._first_in_need = None

    def wake_parked(self) -> dict[Sequence, Readiness]:
        """Give parked sequences their adapter back; return what the others wait for."""
        states: dict[Sequence, Readiness] = {}
        parked = [s for s in self._running.values() if not s.has_adapter]
        # Those whose adapter is there go first: to ask for another may cost them theirs.
        for sequence in sorted(parked, key=lambda s: (not self.is_ready(s), self._claim(s))):
            state = self.request(sequence)
            if state is not Readiness.READY:
                states[sequence] = state
        return states

    def request(self, sequence: Sequence) -> Readiness:
        """Hold a sequence's adapter if it is there; if not, have it brought.

        Room that others leave is kept for the first that found none: later claims would take it bit
        by bit, and a large adapter would wait for ever.
        """
        assert sequence.version is not None, "the base is always there"
        if self._is_kept_from(sequence):
            return Readiness.COMING
        state = self._adapters.request(sequence.version)
        if state is Readiness.READY and not self.hold(sequence):
            return Readiness.COMING  # a loader has just taken its room; it is asked for again
        if state is Readiness.NO_ROOM and self._first_in_need is None:
            self._first_in_need = sequence
            if self._need is None or self._need[0] is not sequence.version:
                self._need = sequence.version, self._step
        return state

    def fetch(self, sequence: Sequence) -> None:
        """Have a sequence's adapter brought, as `request`, but do not hold it."""
        if sequence.version is not None and not self._is_kept_from(sequence):
            self._adapters.request(sequence.version)

    def make_room(self, starved: list[Sequence]) -> None:
        """Let the starved sequence that has had least go on in place of adapters that have had
        more, once their turn is over."""
        if not starved:
            return
        first = min(starved, key=self._claim)
        claim = self._claim(first)
        in_use: dict[Hashable, list[Sequence]] = {}
        for sequence in self._running.values():
            version = sequence.version
            if sequence.has_adapter and version is not None and self._can_leave(version):
                in_use.setdefault(version, []).append(sequence)
        claims = {version: min(map(self._claim, users)) for version, users in in_use.items()}
        least_first = sorted(in_use, key=claims.__getitem__)
        assert first.version is not None
        while self._adapters.request(first.version) is Readiness.NO_ROOM and least_first:
            victim = least_first.pop()
            if claims[victim] <= claim:
                break
            if self._step - self._begun[victim] < TURN_STEPS:
                continue
            for sequence in in_use[victim]:
                self.release(sequence)
                sequence.parked_at = self._step
            self.num_parked += 1

    def is_ready(self, sequence: Sequence) -> bool:
        """Return whether a sequence's adapter is on the device."""
        return sequence.version is None or self._adapters.is_ready(sequence.version)

    def hold(self, sequence: Sequence) -> bool:
        """Hold a sequence's adapter on the device; False: it is not there."""
        if sequence.version is not None:
            if not self._adapters.hold(sequence.version):
                return False
            self._begun.setdefault(sequence.version, self._step)
            self._num_holders[sequence.version] += 1
        sequence.has_adapter = True
        return True

    def release(self, sequence: Sequence) -> None:
        """Release the adapter that `hold` has held for a sequence, if it has."""
        if not sequence.has_adapter:
            return
        sequence.has_adapter = False
        version = sequence.version
        if version is not None:
            self._adapters.release(version)
            self._num_holders[version] -= 1
            if not self._num_holders[version]:
                del self._num_holders[version], self._begun[version]

    def _is_kept_from(self, sequence: Sequence) -> bool:
        first = self._first_in_need
        if first is None or self._claim(sequence) < self._claim(first):
            return False
        assert self._need is not None
        return (self._step - self._need[1]) // _PATIENCE % 2 == 0

    def _claim(self, sequence: Sequence) -> tuple[bool, tuple[float, float]]:
        """Return a sequence's claim to its turn; lower is first. Whoever has no token yet, or has
        been parked for long, goes before the others."""
        is_parked = not sequence.has_adapter
        is_urgent = not sequence.output_token_ids or (
            is_parked and self._step - sequence.parked_at >= MOST_PARKED
        )
        return not is_urgent, self._rank(sequence)
