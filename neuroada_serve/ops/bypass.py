"""The op that serves adapters: add each token's bypass to a frozen linear's output.

`bypass_add_reference` is the truth; every kernel is tested against it.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from neuroada_serve.errors import ShapeError
from neuroada_serve.ops import cpu_bypass, triton_bypass

NO_SLOT = -1  # in token slots: this token runs on the base


@dataclass(frozen=True)
class TokenSlots:
    """Which slot each token of a forward uses; analysed once, read by every layer.

    slots: per token, the row of `bypass` that holds its adapter's values, or NO_SLOT.
    merged_slot: the adapter that is merged into the weights just now. Its own tokens need
        nothing; all others, also those on the base, take its values out again.
    static: device tensors that `on_device` gives out in place of copies of the above, because a
        captured CUDA graph reads them again later.
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
        """Whether no token has anything to add."""
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
    def cpu_lanes(self) -> cpu_bypass.Lanes:
        return cpu_bypass.Lanes(*self.lanes, self.merged_slot)


@dataclass(eq=False)
class BypassTable:
    """What a group of adapters has for some neurons: the inputs they keep, the values by slot.

    index: [d_out, k] int32, columns within [0, d_in), distinct within a row.
    bypass: [num_slots, d_out, k] float; slots may lie apart, or begin within each other.

    Raises:
        ShapeError: names the shapes that disagree.
    """

    index: Tensor
    bypass: Tensor
    d_out: int = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        if self.bypass.shape[1:] != self.index.shape:
            raise ShapeError(
                f"bypass {tuple(self.bypass.shape)} must be "
                f"[num_slots, *index {tuple(self.index.shape)}]"
            )
        self.d_out = self.index.shape[0]
        self.dtype = self.bypass.dtype

    @cached_property
    def cpu_launch(self) -> cpu_bypass.BypassLaunch | None:
        """The CPU kernel set up for this table; None where it cannot run."""
        if not cpu_bypass.supports(self.bypass):
            return None
        return cpu_bypass.BypassLaunch(self.index, self.bypass)


def bypass_add_reference(
    y: Tensor, x: Tensor, table: BypassTable, token_slots: TokenSlots
) -> Tensor:
    """What `bypass_add_` computes, out of place, in float32 and differentiable. For tests."""
    index, bypass = table.index, table.bypass
    slots = torch.tensor(token_slots.slots, device=x.device)
    token_values = bypass[slots.clamp_min(0)].float()  # (num_tokens, d_out, k)
    token_values = token_values.masked_fill((slots == NO_SLOT)[:, None, None], 0)
    if token_slots.merged_slot is not None:
        token_values = token_values - bypass[token_slots.merged_slot].float()
    gathered = x.float()[:, index.long()]  # (num_tokens, d_out, k)
    return (y.float() + (token_values * gathered).sum(-1)).to(y.dtype)


def bypass_add_(y: Tensor, x: Tensor, table: BypassTable, token_slots: TokenSlots) -> None:
    """Add each token's adapter bypass to a frozen linear's output, in place.

    Semantics, with s = token_slots.slots[t] and m = token_slots.merged_slot, where NO_SLOT and
    None stand for a slot of zeros:
        y[t, i] += sum_j (bypass[s, i, j] - bypass[m, i, j]) * x[t, index[i, j]]

    Args:
        y: [num_tokens, d_out]. Changed in place; sums are kept in float32, rounded once.
        x: [num_tokens, d_in], same dtype and device as y.
        table: index [d_out, k] and bypass [num_slots, d_out, k].
        token_slots: num_tokens slots, each NO_SLOT or in [0, num_slots).

    Raises:
        ShapeError: names the shapes that disagree.

    Source: NeuroAda, arXiv:2510.18940; official code utils/utils.py:75 (weight form of the sum).
    """
    num_tokens = token_slots.num_tokens
    if y.shape != (num_tokens, table.d_out) or x.ndim != 2 or x.shape[0] != num_tokens:
        raise ShapeError(
            f"y {tuple(y.shape)} and x {tuple(x.shape)} must be [num_tokens, d], for "
            f"{num_tokens} token slots and index {tuple(table.index.shape)}"
        )
    if token_slots.idle:
        return
    if x.is_cuda and triton_bypass.HAS_TRITON:
        slots, merged_slot = token_slots.on_device
        triton_bypass.bypass_add_triton_(y, x, table.index, table.bypass, slots, merged_slot)
        return
    launch = table.cpu_launch
    if launch is not None and x.dtype == y.dtype == table.dtype:
        launch(y, x, token_slots.cpu_lanes)
    else:
        _add_lane_by_lane(y, x, table.index, table.bypass, token_slots)


def bias_add_(y: Tensor, bias: Tensor, token_slots: TokenSlots) -> None:
    """Add what each token's adapter adds to a layer's bias, in place.

    Semantics, with s and m as of `bypass_add_`:
        y[t, i] += bias[s, i] - bias[m, i]

    Args:
        y: [num_tokens, d_out]. Changed in place; sums are in float32, rounded once.
        bias: [num_slots, d_out]; slots may lie apart, or begin within each other.
        token_slots: num_tokens slots, each NO_SLOT or in [0, num_slots).

    Raises:
        ShapeError: names the shapes that disagree.
    """
    if y.shape != (token_slots.num_tokens, bias.shape[1]):
        raise ShapeError(
            f"y {tuple(y.shape)} must be [num_tokens, d_out], for {token_slots.num_tokens} token "
            f"slots and bias {tuple(bias.shape)}"
        )
    if token_slots.idle:
        return
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
