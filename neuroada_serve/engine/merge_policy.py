"""The merge policy: which adapter is worth having in the weights. Pure Python.

A token costs what its adapter adds: its entries, once. With A merged, tokens of A cost nothing, and
every other token also takes A out again. So merging pays when nearly all requests that run are of
one adapter, for long enough to repay the writing of its entries.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

# ns per entry. Those of the CPU are what bench/merge/costs.py measured with AVX-512; with AVX2
# alone, lanes and corrections cost more (merge.json, bench/LOG.md). Those of CUDA are reckoned from
# bytes moved, not measured.
LANE_NS = {"cpu": 0.11, "cuda": 0.001}
WRITE_NS = {"cpu": 2.0, "cuda": 0.02}
# What taking an entry of the merged adapter out costs, as a share of adding one: on the base,
# beside an adapter of one's own on the same index, and beside one on another.
BASE_CORRECTION = 0.6
SAME_INDEX_CORRECTION = 0.4
OTHER_INDEX_CORRECTION = 0.65
# The CPU's kernels compute so many tokens side by side, however many of them there are; but so few
# alone (ops/cpu_blocks.py).
LANES = 16
FEW_LANES = 3
# Tokens of a request that are counted on: it may end before its limit.
HORIZON = 64
# A switch must save so many times what it costs. It may have to be undone.
_HYSTERESIS = 4.0
_SMOOTHING = 0.3
# A switch counts as at most so many times slower than expected. The first may have compiled or
# loaded something; taken as it is, nothing would ever pay again, and so nothing correct it.
_MOST_SLOWER = 4.0


@dataclass(frozen=True)
class Load:
    """The tokens still to come of one request, with an adapter or, with None, the base."""

    version: Hashable | None
    num_tokens: int
    is_running: bool = True


class MergePolicy:
    """Choose what to merge, for one device.

    Args:
        device: "cpu" or "cuda".
        max_lanes: most requests that run at once.
        nnz: entries of a version.
    """

    def __init__(
        self,
        device: str = "cpu",
        max_lanes: int = LANES,
        nnz: Callable[[Any], int] = attrgetter("nnz"),
    ) -> None:
        self._lane_ns = LANE_NS[device]
        self._write_ns = WRITE_NS[device]
        self._max_lanes = max_lanes
        self._nnz_of = nnz
        self._computed: Callable[[float], float] = lanes_computed if device == "cpu" else float

    def observe_switch(self, num_entries: int, duration_s: float) -> None:
        """Record how long a merge or unmerge of so many entries took; later ones are expected to
        take as long."""
        measured_ns = 1e9 * duration_s / max(1, num_entries)
        measured_ns = min(measured_ns, _MOST_SLOWER * self._write_ns)
        self._write_ns += _SMOOTHING * (measured_ns - self._write_ns)

    def choose(self, loads: Iterable[Load], merged: Hashable | None) -> Hashable | None:
        """Choose what to have in the weights from now on.

        Args:
            loads: of all running and waiting requests.
            merged: what is there now.
        """
        loads = list(loads)
        total = sum(min(load.num_tokens, HORIZON) for load in loads)
        if not total:
            return merged
        num_lanes = min(len(loads), self._max_lanes)
        num_steps = total / num_lanes
        # Steps to come are taken to be like those now. To count the few that wait instead, when
        # the running ones are about to end, merges what will be a few of many.
        mix = Counter(load.version for load in loads if load.is_running)
        mix = mix or Counter(load.version for load in loads)
        lanes = {version: num_lanes * count / mix.total() for version, count in mix.items()}
        nnz = {v: 0 if v is None else self._nnz_of(v) for v in (merged, None, *mix)}

        def cost_ns(candidate: Hashable | None) -> float:
            # At most: adapters of one index swap with half of it.
            switch_ns = 0.0
            if candidate is not merged:
                switch_ns = self._write_ns * (nnz[merged] + nnz[candidate])
            return num_steps * self._step_ns(lanes, candidate, nnz) + _HYSTERESIS * switch_ns

        return min(nnz, key=cost_ns)  # of equals the first

    def _step_ns(
        self,
        lanes: Mapping[Hashable | None, float],
        merged: Hashable | None,
        nnz: Mapping[Hashable | None, int],
    ) -> float:
        """Return what adapters add to a step with so many tokens of each.

        Adapters of as many entries have, as good as always, one index, and are computed together.
        """
        out = nnz[merged]
        computed: dict[int, float] = {}  # entries -> tokens
        shares: dict[int, float] = {}  # entries -> what these tokens cost, in tokens
        for version, count in lanes.items():
            if version is merged:
                continue
            if version is None:
                own = [(out, BASE_CORRECTION)]
            elif nnz[version] == out:
                own = [(out, 1 + SAME_INDEX_CORRECTION)]
            else:
                own = [(nnz[version], 1.0), (out, OTHER_INDEX_CORRECTION)]
            for entries, share in own:
                computed[entries] = computed.get(entries, 0.0) + count
                shares[entries] = shares.get(entries, 0.0) + count * share
        return self._lane_ns * sum(
            entries * shares[entries] * self._computed(count) / count
            for entries, count in computed.items()
            if count
        )


def lanes_computed(lanes: float) -> float:
    """Return the lanes that the CPU's kernels compute for so many tokens. A mean near FEW_LANES
    is on either side of it from step to step."""
    whole, left = divmod(lanes, LANES)
    part = min(1.0, max(0.0, (left - FEW_LANES + 1) / 2))
    return LANES * whole + left + part * (LANES - left)
