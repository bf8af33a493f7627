"""The way of every version to the device, and the room there that it holds meanwhile.

    ABSENT --requested--> READING ------> WRITING --> RESIDENT --evicted--> ABSENT
      ^                      |               ^
      |    its index is new  v               |
      +----- no room --- NEEDS_INDEX --------+

    READING, NEEDS_INDEX, WRITING --error--> FAILED --requested again--> READING

    ABSENT       nothing is there
    READING      room is reserved; a loader reads the values
    NEEDS_INDEX  they are read; the engine's thread is to bring their index to the device
    WRITING      a loader writes them into their room
    RESIDENT     they are there; steps may read them
    FAILED       reading or writing them failed

A version that is unloaded is ABSENT at once, but for one that is being written: it is evicted as
soon as it is RESIDENT.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from neuroada_serve.adapters.bank import AdapterBank, ResidentAdapter
from neuroada_serve.adapters.slot_memory import Extent
from neuroada_serve.adapters.store import AdapterVersion
from neuroada_serve.adapters.values import AdapterValues
from neuroada_serve.errors import NeuroAdaError

RETRY_S = 1.0  # an adapter that could not be loaded is tried again after so long


@dataclass(frozen=True)
class Absent:
    """lacks_index: the last attempt failed for lack of room for its index."""

    lacks_index: bool = False


@dataclass(frozen=True, eq=False)
class Reading:
    """room: reserved for its values. index_room: for its index, after such a failure."""

    room: Extent
    index_room: Extent | None


@dataclass(frozen=True, eq=False)
class NeedsIndex:
    """values: to be written, once their index is there. room, index_room: as in `Reading`."""

    values: AdapterValues
    room: Extent
    index_room: Extent | None


@dataclass(frozen=True, eq=False)
class Writing:
    """resident: its place, not to be moved or read."""

    resident: ResidentAdapter


@dataclass(frozen=True, eq=False)
class Resident:
    """resident: its place and head."""

    resident: ResidentAdapter


@dataclass(frozen=True, eq=False)
class Failed:
    """error: the reason. at: when, in seconds of `time.monotonic`."""

    error: NeuroAdaError
    at: float = field(default_factory=time.monotonic)

    @property
    def is_recent(self) -> bool:
        return time.monotonic() - self.at < RETRY_S


State = Absent | Reading | NeedsIndex | Writing | Resident | Failed
ABSENT = Absent()
_MOVES: dict[type[State], tuple[type[State], ...]] = {
    Absent: (Reading, Absent),  # itself: unloaded, so that nothing is kept of it
    Reading: (NeedsIndex, Writing, Failed, Absent),
    NeedsIndex: (NeedsIndex, Writing, Failed, Absent),  # itself: without the room for its index
    Writing: (Resident, Failed),
    Resident: (Absent,),
    Failed: (Reading, Absent),
}


class Residency:
    """The state of every version. Guarded by its owner.

    num_writing: versions that are being written; the bank must not move them.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self.num_writing = 0
        self._bank = bank
        self._states: dict[AdapterVersion, State] = {}  # but for ABSENT

    def __getitem__(self, version: AdapterVersion) -> State:
        return self._states.get(version, ABSENT)

    def __iter__(self) -> Iterator[AdapterVersion]:
        """All that are not ABSENT."""
        return iter(self._states)

    def move(self, version: AdapterVersion, to: State) -> None:
        """Give a version its next state. Room that the last one had and the next one has not goes
        back to the bank."""
        before = self[version]
        assert type(to) in _MOVES[type(before)], f"{version} cannot go from {before} to {to}"
        kept = _extents(to)
        if isinstance(before, Writing | Resident) and before.resident.extent not in kept:
            self._bank.release(before.resident)
        elif isinstance(before, Reading | NeedsIndex):
            for extent in _extents(before):
                if extent not in kept:
                    self._bank.memory.release(extent)
        self.num_writing += isinstance(to, Writing) - isinstance(before, Writing)
        if to == ABSENT:
            self._states.pop(version, None)
        else:
            self._states[version] = to

    def settle(self, version: AdapterVersion, values: AdapterValues) -> Writing:
        """Give a version whose index is on the device its place beside the others on that index."""
        state, plane = self[version], self._bank.plane(values.table)
        assert isinstance(state, Reading | NeedsIndex)
        assert plane is not None
        writing = Writing(self._bank.settle(state.room, plane, values.head))
        self.move(version, writing)
        return writing

    def nnz(self, version: AdapterVersion) -> int:
        """Return the number of a version's values; an upper bound for a mix not on the device."""
        resident = self.resident(version)
        return version.nnz if resident is None else resident.plane.nnz

    def resident(self, version: AdapterVersion) -> ResidentAdapter | None:
        """Find a version on the device; None while it is not RESIDENT."""
        state = self[version]
        return state.resident if isinstance(state, Resident) else None


def _extents(state: State) -> tuple[Extent, ...]:
    """List the bank's memory that a state holds."""
    if isinstance(state, Reading | NeedsIndex):
        return (state.room,) if state.index_room is None else (state.room, state.index_room)
    return (state.resident.extent,) if isinstance(state, Writing | Resident) else ()
