"""The plan of a step: one description of what adapters add, from the bank to the kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from neuroada_serve.ops.bypass import BypassTable, TokenSlots

# Site (layers that read the same input and are multiplied as one matrix) -> its tables: those of
# the adapters on one index, or of their biases.
Tables = Mapping[str, Sequence[BypassTable]]


@dataclass(frozen=True, eq=False)
class TokenRun:
    """Tokens start..stop - 1 of one adapter, multiplied by weights that hold its values.

    adds: (tables, slot, sign): whose values are added, in this order.
    """

    start: int
    stop: int
    adds: Sequence[tuple[Tables, int, int]]

    def added(self, site: str) -> list[tuple[BypassTable, int, int]]:
        """The tables for a site, each with the slot and the sign of the values to add."""
        return [(t, slot, sign) for tables, slot, sign in self.adds for t in tables.get(site, ())]


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The adapters' part in one forward.

    layout: `SlotMemory.version`, then the number of each group's plane. Plans with equal layouts
        read the same memory, so blocks or a graph that were made for one can be reused.
    groups: tables, and the slots in them that tokens use; biases last.
    runs: long stretches of tokens of one adapter, in order; no group has a slot for them.
    """

    layout: tuple[int, ...]
    groups: Sequence[tuple[Tables, TokenSlots]]
    runs: Sequence[TokenRun] = ()

    @property
    def token_slots(self) -> list[TokenSlots]:
        """One per group."""
        return [token_slots for _, token_slots in self.groups]

    @property
    def largest_k(self) -> int:
        """The most inputs that a neuron keeps in any table; 0 without tables."""
        all_tables = [tables for tables, _ in self.groups]
        all_tables += [tables for run in self.runs for tables, _, _ in run.adds]
        # The tables of one group have one k.
        return max((next(iter(tables.values()))[0].k for tables in all_tables if tables), default=0)

    def with_static(self, buffers: Sequence[tuple[Tensor, Tensor]]) -> "StepPlan":
        """The same plan reading its slots from these buffers, one pair per group."""
        groups = [
            (tables, replace(token_slots, static=pair))
            for (tables, token_slots), pair in zip(self.groups, buffers, strict=True)
        ]
        return replace(self, groups=groups)

    def calls(self, site: str) -> list[tuple[BypassTable, TokenSlots]]:
        """The calls of `bypass_add_` that a site needs."""
        return [(t, slots) for tables, slots in self.groups for t in tables.get(site, ())]
