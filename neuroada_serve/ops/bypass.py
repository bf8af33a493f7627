"""The op that serves adapters: add each token's bypass to a frozen linear's output.

`bypass_add_reference` is the truth; every kernel is tested against it.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from neuroada_serve.errors import ShapeError
from neuroada_serve.ops import cpu_team, triton_bypass
from neuroada_serve.ops.cpu_blocks import LanesBlock, TableBlock, lanes_block, table_block
from neuroada_serve.ops.cpu_bypass import bypass_add_cpu_

NO_SLOT = -1  # in token slots: this token runs on the base


@dataclass(frozen=True)
class TokenSlots:
    """The slot that each token of a forward uses; analysed once, read by every layer.

    slots: per token, the row of `bypass` that holds its adapter's values, or NO_SLOT.
    merged_slot: the adapter that is merged into the weights just now. Its own tokens need
        nothing; all others, also those on the base, take its values out again.
    static: device tensors for `on_device` to return instead of copies, because a captured CUDA
        graph reads them again later.
    """

    slots: tuple[int, ...]
    device: torch.device
    merged_slot: int | None = None
    static: tuple[Tensor, Tensor] | None = None

    @cached_property
    def num_tokens(self) -> int:
        return len(self.slots)  # read in every layer

    @cached_property
    def idle(self) -> bool:
        """True where no token has anything to add."""
        idle = NO_SLOT if self.merged_slot is None else self.merged_slot
        return all(slot == idle for slot in self.slots)

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor]:
        """(slots [num_tokens], merged_slot [1]), int32 on the device, NO_SLOT for none."""
        if self.static is not None:
            return self.static
        merged = NO_SLOT if self.merged_slot is None else self.merged_slot
        return (
            torch.tensor(self.slots, dtype=torch.int32, device=self.device),
            torch.tensor([merged], dtype=torch.int32, device=self.device),
        )

    @cached_property
    def lanes(self) -> tuple[Tensor, Tensor]:
        """(positions, slots), each [num_lanes] int64, of the tokens that have anything to add."""
        idle = NO_SLOT if self.merged_slot is None else self.merged_slot
        lanes = [(t, slot) for t, slot in enumerate(self.slots) if slot != idle]
        positions, slots = zip(*lanes, strict=True) if lanes else ((), ())
        return (
            torch.tensor(positions, dtype=torch.int64, device=self.device),
            torch.tensor(slots, dtype=torch.int64, device=self.device),
        )

    @cached_property
    def cpu_block(self) -> LanesBlock:
        """The lanes as CPU kernels read them."""
        return lanes_block(*self.lanes, self.merged_slot)


@dataclass(eq=False)
class BypassTable:
    """The values of a group of adapters for adjacent rows of a weight, or of a bias.

    index: [d_out, k] int32, the inputs that a neuron keeps: columns within [0, d_in), distinct
        within a row. None for a bias, where k is 1.
    bypass: [num_slots, d_out, k] float; slots may lie apart, or begin within each other.
    first_row: of the weight, or bias.
    positions: where the entries lie in the weight's storage; noted here by its owner.

    Raises:
        ShapeError: names the shapes that disagree.
    """

    index: Tensor | None
    bypass: Tensor
    first_row: int = 0
    positions: Tensor | None = field(default=None, init=False, repr=False)
    d_out: int = field(init=False)
    k: int = field(init=False)
    rows: slice = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        if self.index is not None and self.bypass.shape[1:] != self.index.shape:
            raise ShapeError(
                f"bypass {tuple(self.bypass.shape)} must be "
                f"[num_slots, *index {tuple(self.index.shape)}]"
            )
        self.d_out, self.k = self.bypass.shape[1:]
        self.rows = slice(self.first_row, self.first_row + self.d_out)
        self.dtype = self.bypass.dtype

    @cached_property
    def cpu_block(self) -> TableBlock | None:
        """The table as CPU kernels read it; None where they cannot."""
        if self.index is None or not cpu_team.supports(self.bypass):
            return None
        return table_block(self.index, self.bypass, self.first_row)


def bypass_add_reference(
    y: Tensor, x: Tensor, table: BypassTable, token_slots: TokenSlots
) -> Tensor:
    """Compute what `bypass_add_` does, out of place, in float32 and differentiable. For tests."""
    index, bypass = table.index, table.bypass
    slots = torch.tensor(token_slots.slots, device=x.device)
    token_values = bypass[slots.clamp_min(0)].float()  # (num_tokens, d_out, k)
    token_values = token_values.masked_fill((slots == NO_SLOT)[:, None, None], 0)
    if token_slots.merged_slot is not None:
        token_values = token_values - bypass[token_slots.merged_slot].float()
    gathered: Tensor | float = 1.0 if index is None else x.float()[:, index.long()]
    return (y.float() + (token_values * gathered).sum(-1)).to(y.dtype)


def bypass_add_(y: Tensor, x: Tensor, table: BypassTable, token_slots: TokenSlots) -> None:
    """Add each token's adapter bypass to a frozen linear's output, in place.

    Semantics, with s = token_slots.slots[t] and m = token_slots.merged_slot, where NO_SLOT and
    None stand for a slot of zeros:
        y[t, i] += sum_j (bypass[s, i, j] - bypass[m, i, j]) * x[t, index[i, j]]
    and, for a table of a bias:
        y[t, i] += bypass[s, i, 0] - bypass[m, i, 0]

    Args:
        y: [num_tokens, d_out]. Changed in place; sums are kept in float32, rounded once.
        x: [num_tokens, d_in], same dtype and device as y.
        table: index [d_out, k] or None, and bypass [num_slots, d_out, k].
        token_slots: num_tokens slots, each NO_SLOT or in [0, num_slots).

    Raises:
        ShapeError: names the shapes that disagree.

    Source: NeuroAda, arXiv:2510.18940; in its official code, utils/utils.py has the weight form.
    """
    num_tokens = token_slots.num_tokens
    if y.shape != (num_tokens, table.d_out) or x.ndim != 2 or x.shape[0] != num_tokens:
        name, of = ("bias", table.bypass[..., 0]) if table.index is None else ("index", table.index)
        raise ShapeError(
            f"y {tuple(y.shape)} and x {tuple(x.shape)} must be [num_tokens, d], for "
            f"{num_tokens} token slots and {name} {tuple(of.shape)}"
        )
    if token_slots.idle:
        return
    if table.index is None:
        _add_biases(y, table.bypass[..., 0], token_slots)
        return
    if x.is_cuda and triton_bypass.HAS_TRITON:
        slots, merged_slot = token_slots.on_device
        triton_bypass.bypass_add_triton_(y, x, table.index, table.bypass, slots, merged_slot)
        return
    block = table.cpu_block
    if block is not None and x.dtype == y.dtype == table.dtype:
        bypass_add_cpu_(y, x, block, token_slots.cpu_block)
    else:
        _add_lane_by_lane(y, x, table.index, table.bypass, token_slots)


def _add_biases(y: Tensor, bias: Tensor, token_slots: TokenSlots) -> None:
    slots, merged_slot = token_slots.on_device
    added = _biases_of(bias, slots) - _biases_of(bias, merged_slot)
    y.copy_(y.float() + added)


def _biases_of(bias: Tensor, slots: Tensor) -> Tensor:
    """[num_slots, d_out] float32, zeros for NO_SLOT, whatever lies in memory there."""
    found = bias.index_select(0, slots.clamp_min(0)).float()
    return torch.where((slots == NO_SLOT).unsqueeze(1), 0.0, found)


def _add_lane_by_lane(
    y: Tensor, x: Tensor, index: Tensor, bypass: Tensor, token_slots: TokenSlots
) -> None:
    """`bypass_add_` in torch operators, one column of the index at a time."""
    positions, slots = token_slots.lanes
    x_t = x.index_select(0, positions).t().float().contiguous()  # (d_in, lanes)
    total = y.index_select(0, positions).t().float()  # (d_out, lanes)
    m = token_slots.merged_slot
    rows, on_base = slots.clamp_min(0), (slots == NO_SLOT).unsqueeze(1)
    for j in range(index.shape[1]):
        lane_values = bypass[rows, :, j].float()  # (lanes, d_out)
        if m is not None:
            lane_values = lane_values.masked_fill(on_base, 0) - bypass[m, :, j].float()
        total = torch.addcmul(total, x_t.index_select(0, index[:, j]), lane_values.t())
    y.index_copy_(0, positions, total.t().to(y.dtype))
