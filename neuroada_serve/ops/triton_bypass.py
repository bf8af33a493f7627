"""The op that serves adapters, as Triton kernels for CUDA.

A decode step moves few bytes here, so what counts is the launch itself and how the gather reads:
random two-byte loads of an activation row keep L1 busy, the same loads from shared memory cost
less, and a row of transposed activations serves many tokens with one load. Three ways, chosen per
launch by `bypass_tile`:

    direct   one token a program, gathers from global memory; for a few tokens
    staged   one token a program, its activations kept in shared memory first; for decode batches
    lanes    many tokens a program, gathers rows of the transposed activations; the values are
             read once per block of tokens that share a slot; for prefill

Importing this file needs no Triton; calling its functions does (`HAS_TRITON`).
"""

# Triton reads the annotations of a kernel: its pointers and numbers cannot have any.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # kernels are defined, not run, where Triton is absent

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from neuroada_serve.errors import ShapeError

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # an installation for CPU
    triton = tl = gdc_wait = None

HAS_TRITON = triton is not None

_STAGE_BYTES = 65536  # most shared memory for one token's activations
_ENTRIES = 1024  # weight entries per program


@dataclass(frozen=True)
class BypassTile:
    """The cut of one launch of the op.

    way: see the module's docstring.
    rows: outputs per program, a power of two.
    lanes: tokens per program, a power of two; 1 unless way is lanes.
    warps: warps per program.
    early: start while the launch before still runs, and wait for it only before reading y
        (programmatic dependent launch). Right only where that launch does not write x, token_slot
        or the values. Not for lanes.
    """

    way: Literal["direct", "staged", "lanes"]
    rows: int
    lanes: int = 1
    warps: int = 4
    early: bool = False


# (fewest tokens, largest k, tile): the first row that fits is taken. Winners of `bench/gpu` on
# an H200, Llama-3-8B's shapes, 1 to 256 tokens; that of lanes from its prefill. Starting early
# gains a tenth beside one GEMM, but nothing in a model's step.
_TILES: tuple[tuple[int, int, BypassTile], ...] = (
    (8, 1, BypassTile("staged", rows=1024, warps=8)),
    (512, 1 << 30, BypassTile("lanes", rows=64, lanes=64, warps=8)),
    (8, 1 << 30, BypassTile("staged", rows=512, warps=8)),
    (0, 1 << 30, BypassTile("direct", rows=128, warps=4)),
)


def bypass_tile(num_tokens: int, k: int, d_in: int, element_size: int) -> BypassTile:
    """The tile for a launch, from the table; rows that do not fit shared memory use lanes."""
    found = next(tile for tokens, most_k, tile in _TILES if num_tokens >= tokens and k <= most_k)
    if found.way == "staged" and _power_of_two(d_in) * element_size > _STAGE_BYTES:
        return BypassTile("lanes", rows=64, lanes=16, warps=4)
    return found


def bypass_add_triton_(
    y: Tensor,
    x: Tensor,
    index: Tensor,
    bypass: Tensor,
    token_slot: Tensor,
    merged_slot: Tensor,
    tile: BypassTile | None = None,
) -> None:
    """Add each token's adapter bypass to a frozen linear's output, in place, on CUDA.

    Semantics, with s = token_slot[t] and m = merged_slot[0], where -1 stands for a slot of zeros:
        y[t, i] += sum_j (bypass[s, i, j] - bypass[m, i, j]) * x[t, index[i, j]]

    A token with s == m keeps its bits. A column outside [0, d_in) adds nothing, and a slot outside
    [0, num_slots) counts as -1: no token ever reads another's activations. Nothing is read back
    to the host and the launch does not depend on the slots, so a CUDA graph may replay it.

    Args:
        y: [num_tokens, d_out], any row stride. Changed in place; summed in float32, rounded once.
        x: [num_tokens, d_in], any row stride, same device as y.
        index: [d_out, k] int32, any row stride.
        bypass: [num_slots, d_out, k] float, each slot contiguous; slots may lie apart.
        token_slot: [num_tokens] int32.
        merged_slot: [1] int32.
        tile: how to cut the work; None takes the table's.

    Raises:
        ShapeError: names the shapes or strides that do not fit.

    Source: NeuroAda, arXiv:2510.18940; the gather of many adapters in one launch as in Punica,
    arXiv:2310.18547.
    """
    _check_shapes(y, x, index, bypass, token_slot, merged_slot)
    num_tokens, d_out = y.shape
    num_slots, _, k = bypass.shape
    d_in = x.shape[1]
    if num_tokens == 0 or num_slots == 0:
        return
    if tile is None:
        tile = bypass_tile(num_tokens, k, d_in, x.element_size())
    row_blocks = -(-d_out // tile.rows)
    shapes = (num_slots, d_out, d_in)

    if tile.way == "lanes":
        stride = -(-num_tokens // 16) * 16  # keeps every row of x_t aligned
        x_t = x.new_empty(d_in, stride)
        x_t[:, :num_tokens] = x.t()
        _lanes_kernel[(-(-num_tokens // tile.lanes), row_blocks)](
            *(y, x_t, index, bypass, token_slot, merged_slot),
            *(num_tokens, *shapes, y.stride(0), stride, index.stride(0), bypass.stride(0)),
            K=k,
            ROWS=tile.rows,
            LANES=tile.lanes,
            num_warps=tile.warps,
        )
        return
    _rows_kernel[(num_tokens, row_blocks)](
        *(y, x, index, bypass, token_slot, merged_slot),
        *(*shapes, y.stride(0), x.stride(0), index.stride(0), bypass.stride(0)),
        K=k,
        BLOCK_K=_block_k(k),
        ROWS=tile.rows,
        D_BLOCK=_power_of_two(d_in),
        STAGED=tile.way == "staged",
        EARLY=tile.early,
        num_warps=tile.warps,
        **({"launch_pdl": True} if tile.early else {}),
    )


def add_entries_(weight: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Add values to single entries of a weight, in place; what `restore_entries_` undoes exactly.

    Semantics:
        saved[i, j] = weight[i, index[i, j]]
        weight[i, index[i, j]] = round(float(saved[i, j]) + float(values[i, j]))

    Columns outside [0, d_in) are left alone. Around the GEMM of a long prefill of one adapter this
    is cheaper than adding to its output.

    Args:
        weight: [d_out, d_in], any strides (GPT-2 keeps it transposed). Changed in place.
        index: [d_out, k] int32, any row stride; columns distinct within a row.
        values: [d_out, k] float, contiguous.

    Returns:
        saved: [d_out, k], dtype of weight.

    Raises:
        ShapeError: names the shapes that disagree.
    """
    _check_entries(weight, index, values)
    saved = torch.empty(index.shape, dtype=weight.dtype, device=weight.device)
    _launch_entries(weight, index, values, saved, save=True, add=True)
    return saved


def swap_entries_(weight: Tensor, index: Tensor, values: Tensor, saved: Tensor) -> None:
    """Put other values in the place of those that `add_entries_` has added, in one write.

    Semantics:
        weight[i, index[i, j]] = round(float(saved[i, j]) + float(values[i, j]))

    Args:
        weight, index, values: as in `add_entries_`.
        saved: what it returned.

    Raises:
        ShapeError: names the shapes that disagree.
    """
    _check_entries(weight, index, values)
    _check_entries(weight, index, saved)
    _launch_entries(weight, index, values, saved, save=False, add=True)


def restore_entries_(weight: Tensor, index: Tensor, saved: Tensor) -> None:
    """Undo `add_entries_` and `swap_entries_`, bit for bit: weight[i, index[i, j]] = saved[i, j].

    Raises:
        ShapeError: names the shapes that disagree.
    """
    _check_entries(weight, index, saved)
    _launch_entries(weight, index, saved, saved, save=False, add=False)


def put_entries_(weights: Tensor, places: Tensor, values: Tensor) -> None:
    """Write single entries, wherever in memory they are: one launch for a whole model's weights.

    Semantics, with memory as one vector that begins where `weights` does:
        memory[places[e]] = values[e]

    The caller vouches for the places, and that they are distinct.

    Args:
        weights: any tensor of the dtype; its address is the origin.
        places: [nnz] int64, in elements of that dtype; may lie outside `weights`.
        values: [nnz], dtype of weights, contiguous.

    Raises:
        ShapeError: the lengths or dtypes disagree.
    """
    if places.shape != values.shape or values.dtype != weights.dtype:
        raise ShapeError(
            f"values {tuple(values.shape)} {values.dtype} must be {tuple(places.shape)} "
            f"{weights.dtype}, as the places and the weights"
        )
    if len(places):
        grid = (-(-len(places) // _ENTRIES),)
        _put_kernel[grid](weights, places, values, len(places), BLOCK=_ENTRIES, num_warps=4)


def _launch_entries(
    weight: Tensor, index: Tensor, values: Tensor, saved: Tensor, *, save: bool, add: bool
) -> None:
    d_out, k = index.shape
    if index.numel() == 0:
        return
    _entries_kernel[(-(-d_out * k // _ENTRIES),)](
        *(weight, index, values, saved, d_out * k, weight.shape[1]),
        *(weight.stride(0), weight.stride(1), index.stride(0)),
        K=k,
        BLOCK=_ENTRIES,
        SAVE=save,
        ADD=add,
        num_warps=4,
    )


# --- kernels ---------------------------------------------------------------------------------


def _jit(kernel: Callable[..., None]) -> Any:
    return triton.jit(kernel) if HAS_TRITON else kernel


@_jit
def _rows_kernel(
    y,  # [num_tokens, d_out]
    x,  # [num_tokens, d_in]
    index,  # [d_out, K]
    bypass,  # [num_slots, d_out, K]
    token_slot,  # [num_tokens]
    merged_slot,  # [1]
    num_slots,
    d_out,
    d_in,
    y_stride,
    x_stride,
    index_stride,
    slot_stride,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    D_BLOCK: tl.constexpr,
    STAGED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Ways direct and staged: ROWS outputs of one token."""
    t = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(token_slot + t)
    slot = tl.where((slot >= 0) & (slot < num_slots), slot, -1)
    merged = tl.load(merged_slot)
    merged = tl.where((merged >= 0) & (merged < num_slots), merged, -1)
    active = slot != merged
    row_ok = (rows < d_out) & active

    # 1. The sum, from everything that does not wait for y.
    slot_at = bypass + slot.to(tl.int64) * slot_stride
    merged_at = bypass + merged.to(tl.int64) * slot_stride
    total = tl.zeros((ROWS,), tl.float32)
    if STAGED:
        columns = tl.arange(0, D_BLOCK)
        x_row = tl.load(x + t * x_stride + columns, mask=(columns < d_in) & active, other=0.0)
    for first in tl.static_range(0, K, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        ok = row_ok[:, None] & (j < K)[None, :]
        column = tl.load(index + rows[:, None] * index_stride + j[None, :], mask=ok, other=-1)
        ok = ok & (column >= 0) & (column < d_in)
        entry = rows[:, None] * K + j[None, :]
        value = tl.load(slot_at + entry, mask=ok & (slot >= 0), other=0.0).to(tl.float32)
        value -= tl.load(merged_at + entry, mask=ok & (merged >= 0), other=0.0).to(tl.float32)
        if STAGED:
            flat = tl.reshape(tl.where(ok, column, 0), (ROWS * BLOCK_K,))
            gathered = tl.reshape(tl.gather(x_row, flat, 0), (ROWS, BLOCK_K))
        else:
            gathered = tl.load(x + t * x_stride + column, mask=ok, other=0.0)
        total += tl.sum(tl.where(ok, value * gathered.to(tl.float32), 0.0), 1)

    # 2. One rounding into y. Every program waits, or a later launch could run ahead of this one's
    # predecessor.
    if EARLY:
        gdc_wait()
    y_at = y + t * y_stride + rows
    before = tl.load(y_at, mask=row_ok, other=0.0).to(tl.float32)
    tl.store(y_at, (before + total).to(y.dtype.element_ty), mask=row_ok)


@_jit
def _lanes_kernel(
    y,  # [num_tokens, d_out]
    x_t,  # [d_in, num_tokens]
    index,  # [d_out, K]
    bypass,  # [num_slots, d_out, K]
    token_slot,  # [num_tokens]
    merged_slot,  # [1]
    num_tokens,
    num_slots,
    d_out,
    d_in,
    y_stride,
    x_t_stride,
    index_stride,
    slot_stride,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Way lanes: ROWS outputs of LANES tokens."""
    t = tl.program_id(0) * LANES + tl.arange(0, LANES)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < d_out
    slots = tl.load(token_slot + t, mask=t < num_tokens, other=-1)
    slots = tl.where((slots >= 0) & (slots < num_slots), slots, -1)
    merged = tl.load(merged_slot)
    merged = tl.where((merged >= 0) & (merged < num_slots), merged, -1)
    active = (t < num_tokens) & (slots != merged)
    highest = tl.max(tl.where(active, slots, -1), 0)
    lowest = tl.min(tl.where(active, slots, num_slots), 0)  # num_slots: no active token at all
    merged_at = bypass + merged.to(tl.int64) * slot_stride
    total = tl.zeros((ROWS, LANES), tl.float32)

    if lowest == highest:  # one slot: its values are read once for all tokens
        slot_at = bypass + highest.to(tl.int64) * slot_stride
        for j in range(K):
            column = tl.load(index + rows * index_stride + j, mask=row_ok, other=-1)
            ok = (column >= 0) & (column < d_in)
            entry = rows * K + j
            value = tl.load(slot_at + entry, mask=ok & (highest >= 0), other=0.0).to(tl.float32)
            value -= tl.load(merged_at + entry, mask=ok & (merged >= 0), other=0.0).to(tl.float32)
            x_at = x_t + column[:, None].to(tl.int64) * x_t_stride + t[None, :]
            mask = ok[:, None] & active[None, :]
            gathered = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
            total += tl.where(mask, value[:, None] * gathered, 0.0)
    elif lowest < highest:
        slot_at = bypass + slots.to(tl.int64) * slot_stride
        for j in range(K):
            column = tl.load(index + rows * index_stride + j, mask=row_ok, other=-1)
            ok = (column >= 0) & (column < d_in)
            entry = rows * K + j
            mask = ok[:, None] & active[None, :]
            value_mask = mask & (slots >= 0)[None, :]
            value = tl.load(slot_at[None, :] + entry[:, None], mask=value_mask, other=0.0)
            out = tl.load(merged_at + entry, mask=ok & (merged >= 0), other=0.0).to(tl.float32)
            x_at = x_t + column[:, None].to(tl.int64) * x_t_stride + t[None, :]
            gathered = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
            total += tl.where(mask, (value.to(tl.float32) - out[:, None]) * gathered, 0.0)

    y_at = y + t[None, :].to(tl.int64) * y_stride + rows[:, None]
    mask = row_ok[:, None] & active[None, :]
    before = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_at, (before + total).to(y.dtype.element_ty), mask=mask)


@_jit
def _entries_kernel(
    weight,  # [d_out, d_in]
    index,  # [d_out, K]
    values,  # [d_out, K]; to restore, the saved entries
    saved,  # [d_out, K]
    nnz,
    d_in,
    row_stride,
    column_stride,
    index_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SAVE: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = entry < nnz
    row = entry // K
    column = tl.load(index + row * index_stride + entry % K, mask=ok, other=-1)
    touched = ok & (column >= 0) & (column < d_in)
    at = weight + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    value = tl.load(values + entry, mask=ok, other=0.0)
    if ADD:
        if SAVE:
            original = tl.load(at, mask=touched, other=0.0)
            tl.store(saved + entry, original, mask=ok)
        else:
            original = tl.load(saved + entry, mask=ok, other=0.0)
        value = original.to(tl.float32) + value.to(tl.float32)
    tl.store(at, value.to(weight.dtype.element_ty), mask=touched)


@_jit
def _put_kernel(weights, places, values, nnz, BLOCK: tl.constexpr) -> None:
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = entry < nnz
    at = weights + tl.load(places + entry, mask=ok, other=0)
    tl.store(at, tl.load(values + entry, mask=ok, other=0.0), mask=ok)


# --- shapes ----------------------------------------------------------------------------------


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def _block_k(k: int) -> int:
    """Values of a row per load: all of them where that wastes no lanes, else four."""
    return k if k == _power_of_two(k) else min(4, _power_of_two(k))


def _check_shapes(
    y: Tensor, x: Tensor, index: Tensor, bypass: Tensor, token_slot: Tensor, merged_slot: Tensor
) -> None:
    if y.ndim != 2 or x.ndim != 2 or y.shape[0] != x.shape[0]:
        raise ShapeError(f"y {tuple(y.shape)} and x {tuple(x.shape)} must be [num_tokens, d]")
    if bypass.shape[1:] != index.shape or index.shape[0] != y.shape[1]:
        raise ShapeError(
            f"bypass {tuple(bypass.shape)} must be [num_slots, *index {tuple(index.shape)}], and "
            f"y {tuple(y.shape)} must have the rows of index"
        )
    if token_slot.shape != y.shape[:1] or merged_slot.shape != (1,):
        raise ShapeError(
            f"token_slot {tuple(token_slot.shape)} must be [{y.shape[0]}] and merged_slot "
            f"{tuple(merged_slot.shape)} [1]"
        )
    k = index.shape[1]
    inner = (y.stride(1), x.stride(1), index.stride(1), bypass.stride(2))
    if any(s != 1 for s in inner) and min(y.shape[1], x.shape[1], k) > 1:
        raise ShapeError(f"the last strides of y, x, index and bypass must be 1, got {inner}")
    if bypass.stride(1) != k:
        raise ShapeError(f"bypass has row stride {bypass.stride(1)}; a slot must be contiguous")


def _check_entries(weight: Tensor, index: Tensor, values: Tensor) -> None:
    if weight.ndim != 2 or index.shape[0] != weight.shape[0] or values.shape != index.shape:
        raise ShapeError(
            f"index {tuple(index.shape)} and values {tuple(values.shape)} must both be [d_out, k] "
            f"for a weight [d_out, d_in] {tuple(weight.shape)}"
        )
    if not values.is_contiguous():
        raise ShapeError(f"values must be contiguous, got strides {values.stride()}")
