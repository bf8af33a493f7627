"""Which adapter is worth having in the weights. Pure Python.

A token costs what its adapter adds: its entries, once. With A merged, tokens of A cost nothing, and
every other token also takes A out again. So merging pays when one adapter has most of the tokens
that are still to come, by enough to repay the writing of its entries.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

# ns per entry. A lane's entry on the CPU is the slope of bench/scaling.py (scaling.json), its
# correction and the writing are by bench/merge.py (merge.json). Those of CUDA are reckoned from
# bytes moved, not measured.
LANE_NS = {"cpu": 0.12, "cuda": 0.001}
WRITE_NS = {"cpu": 2.0, "cuda": 0.02}
# Taking out the merged adapter beside one's own, as a share of an entry of it.
CORRECTION = 0.5
# Tokens of a request that are counted on: it may end before its limit.
HORIZON = 64
# A switch must save so many times what it costs. It may have to be undone.
_HYSTERESIS = 4.0
_SMOOTHING = 0.3
# A switch counts as at most so many times slower than expected. The first may have compiled or
# loaded something; taken as it is, nothing would ever pay again, and so nothing correct it.
_MOST_SLOWER = 4.0


class Version(Protocol):
    """An adapter that can be merged."""

    @property
    def nnz(self) -> int: ...


@dataclass(frozen=True)
class Load:
    """Tokens that are still to come with an adapter, or with the base: None."""

    version: Version | None
    num_tokens: int


class MergePolicy:
    """Chooses for one device.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self._lane_ns = LANE_NS[device]
        self._write_ns = WRITE_NS[device]

    def observe_switch(self, num_entries: int, duration_s: float) -> None:
        """A merge or unmerge wrote so many entries in so long: later ones are expected to."""
        measured_ns = 1e9 * duration_s / max(1, num_entries)
        measured_ns = min(measured_ns, _MOST_SLOWER * self._write_ns)
        self._write_ns += _SMOOTHING * (measured_ns - self._write_ns)

    def choose(self, loads: Iterable[Load], merged: Version | None) -> Version | None:
        """What to have in the weights from now on.

        Args:
            loads: of all running and waiting sequences.
            merged: what is there now.
        """
        tokens: dict[Version | None, int] = {}
        for load in loads:
            tokens[load.version] = tokens.get(load.version, 0) + min(load.num_tokens, HORIZON)
        if not tokens:
            return merged

        def cost_ns(candidate: Version | None) -> float:
            switch_ns = 0.0 if candidate is merged else self._switch_ns(merged, candidate)
            return self._cost_ns(tokens, candidate) + _HYSTERESIS * switch_ns

        return min(dict.fromkeys([merged, None, *tokens]), key=cost_ns)  # of equals the first

    def _cost_ns(self, tokens: dict[Version | None, int], merged: Version | None) -> float:
        """Of adding what adapters add to these tokens."""
        out = 0 if merged is None else merged.nnz
        entries = 0.0
        for version, count in tokens.items():
            if version is None:
                entries += count * out
            elif version is not merged:
                entries += count * (version.nnz + CORRECTION * out)
        return entries * self._lane_ns

    def _switch_ns(self, before: Version | None, after: Version | None) -> float:
        """At most: adapters of one index swap with half of it."""
        return self._write_ns * sum(v.nnz for v in (before, after) if v is not None)
