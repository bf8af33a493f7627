"""The op that serves adapters: add each token's bypass to a frozen linear's output.

`bypass_add_reference` is the truth; every kernel is tested against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroada_serve.errors import ShapeError

NO_SLOT = -1  # in token slots: this token runs on the base

_RUN_TOKENS = 8  # from this many consecutive tokens of one slot on, they are computed as one run


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

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def idle(self) -> bool:
        """Whether no token has anything to add."""
        return not self._stretches

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
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(slot, start, stop) of every stretch of at least _RUN_TOKENS tokens of one slot."""
        return tuple(run for run in self._stretches if run[2] - run[1] >= _RUN_TOKENS)

    @cached_property
    def lanes(self) -> tuple[Tensor, Tensor] | None:
        """(positions, slots), each [num_lanes] int64, of the tokens in no run; None without any."""
        short = [s for s in self._stretches if s[2] - s[1] < _RUN_TOKENS]
        positions = [p for _, start, stop in short for p in range(start, stop)]
        if not positions:
            return None
        slots = [self.slots[p] for p in positions]
        return (
            torch.tensor(positions, dtype=torch.int64, device=self.device),
            torch.tensor(slots, dtype=torch.int64, device=self.device),
        )

    @cached_property
    def has_base_lanes(self) -> bool:
        """Whether a lane runs on the base (only with a merged adapter to take out)."""
        return self.lanes is not None and bool((self.lanes[1] == NO_SLOT).any())

    @cached_property
    def _stretches(self) -> Sequence[tuple[int, int, int]]:
        """(slot, start, stop) of the tokens that have anything to add, in order."""
        idle = NO_SLOT if self.merged_slot is None else self.merged_slot
        stretches, start = [], 0
        for slot, tokens in groupby(self.slots):
            stop = start + sum(1 for _ in tokens)
            if slot != idle:
                stretches.append((slot, start, stop))
            start = stop
        return stretches


def bypass_add_reference(
    y: Tensor, x: Tensor, index: Tensor, bypass: Tensor, token_slots: TokenSlots
) -> Tensor:
    """What `bypass_add_` computes, out of place, in float32 and differentiable. For tests."""
    values = torch.cat([bypass.float(), torch.zeros_like(bypass[:1], dtype=torch.float32)])
    slots = torch.tensor(token_slots.slots, device=x.device)  # NO_SLOT, -1, picks the row of zeros
    token_values = values[slots]  # (num_tokens, d_out, k)
    if token_slots.merged_slot is not None:
        token_values = token_values - values[token_slots.merged_slot]
    gathered = x.float()[:, index.long()]  # (num_tokens, d_out, k)
    return (y.float() + (token_values * gathered).sum(-1)).to(y.dtype)


def bypass_add_(
    y: Tensor, x: Tensor, index: Tensor, bypass: Tensor, token_slots: TokenSlots
) -> None:
    """Add each token's adapter bypass to a frozen linear's output, in place.

    Semantics, with s = token_slots.slots[t] and m = token_slots.merged_slot, where NO_SLOT and
    None stand for a slot of zeros:
        y[t, i] += sum_j (bypass[s, i, j] - bypass[m, i, j]) * x[t, index[i, j]]

    Args:
        y: [num_tokens, d_out]. Changed in place; sums are kept in float32, rounded once.
        x: [num_tokens, d_in], same dtype and device as y.
        index: [d_out, k] int32, every value in [0, d_in).
        bypass: [num_slots, d_out, k] float; slots may lie apart.
        token_slots: num_tokens slots, each NO_SLOT or in [0, num_slots).

    Raises:
        ShapeError: names the shapes that disagree.

    Source: NeuroAda, arXiv:2510.18940; official code utils/utils.py:75 (weight form of the sum).
    """
    _check_shapes(y, x, index, bypass, token_slots)
    m = token_slots.merged_slot
    merged = None if m is None else bypass[m].float()

    # 1. Long runs of one adapter (prefill): a fused gather and dot without a temporary of
    # [tokens, d_out, k].
    for slot, start, stop in token_slots.runs:
        values = _slot_values(bypass, slot, merged)
        x_t = x[start:stop].t().float().contiguous()  # (d_in, run)
        added = F.embedding_bag(index, x_t, per_sample_weights=values, mode="sum")  # (d_out, run)
        y[start:stop] = (y[start:stop].float() + added.t()).to(y.dtype)

    # 2. All other tokens (decode): one lane each, the values of each lane's slot side by side.
    if token_slots.lanes is None:
        return
    positions, slots = token_slots.lanes
    all_lanes = len(positions) == len(token_slots)  # a decode step: no rows to pick
    x_lanes = x if all_lanes else x.index_select(0, positions)
    x_t = x_lanes.t().float().contiguous()  # (d_in, lanes)
    y_lanes = y if all_lanes else y.index_select(0, positions)
    total = y_lanes.t().float()  # (d_out, lanes)
    rows = slots.clamp_min(0)
    for j in range(index.shape[1]):
        lane_values = bypass[:, :, j].index_select(0, rows).float()  # (lanes, d_out)
        if token_slots.has_base_lanes:
            lane_values[slots == NO_SLOT] = 0
        if merged is not None:
            lane_values -= merged[:, j]
        total = torch.addcmul(total, x_t.index_select(0, index[:, j]), lane_values.t())
    if all_lanes:
        y.copy_(total.t())
    else:
        y.index_copy_(0, positions, total.t().to(y.dtype))


def _slot_values(bypass: Tensor, slot: int, merged: Tensor | None) -> Tensor:
    """[d_out, k] float32 values of a slot, less those of the merged adapter."""
    if slot == NO_SLOT:
        assert merged is not None
        return -merged
    values = bypass[slot].float()
    return (values if merged is None else values - merged).contiguous()


def _check_shapes(
    y: Tensor, x: Tensor, index: Tensor, bypass: Tensor, token_slots: TokenSlots
) -> None:
    if y.ndim != 2 or x.ndim != 2 or y.shape[0] != x.shape[0]:
        raise ShapeError(f"y {tuple(y.shape)} and x {tuple(x.shape)} must be [num_tokens, d]")
    if bypass.shape[1:] != index.shape:
        raise ShapeError(
            f"bypass {tuple(bypass.shape)} must be [num_slots, *index {tuple(index.shape)}]"
        )
    if y.shape[1] != index.shape[0]:
        raise ShapeError(f"y {tuple(y.shape)} must have the rows of index {tuple(index.shape)}")
    if len(token_slots) != y.shape[0]:
        raise ShapeError(f"{len(token_slots)} token slots for y {tuple(y.shape)}")
