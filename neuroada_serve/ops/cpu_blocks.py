"""The argument blocks of the CPU kernels: C structures that Python fills and compiled code reads.

Addresses are of memory that whoever fills a block keeps alive. Counts and strides are in elements.
A kernel's block begins with the counter that its threads draw pieces of work from.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.errors import ShapeError

LANES = 16  # tokens that are computed side by side
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# By `bench/choices.py`: so many lanes and fewer are computed one by one, not side by side.
FEW_LANES = 3
QUERIES = 4  # tokens of a sequence that attend together


def _integers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names.split()]


# --- what adapters add -----------------------------------------------------------------------


class TableBlock(ctypes.Structure):
    """A `BypassTable`."""

    _fields_ = _integers("kind d_out k first_row index index_stride bypass slot_stride")


class LanesBlock(ctypes.Structure):
    """The tokens that have anything to add, at most once each, and their slots.

    positions, slots: addresses of [num_lanes] int64; a slot below 0 stands for the base.
    num_blocks: of LANES tokens side by side; the lanes behind them are computed one by one.
    merged_slot: its values are taken out of every lane; -1 for none.
    """

    _fields_ = _integers("positions slots num_lanes num_blocks merged_slot")


class BypassBlock(ctypes.Structure):
    """`bypass_add_`. table, lanes: addresses of blocks."""

    _fields_ = _integers("counter table lanes y y_stride x x_stride d_in")


def table_block(index: Tensor, bypass: Tensor, first_row: int) -> TableBlock:
    """Describe a table to the kernels.

    Args:
        index: [d_out, k] int32, contiguous rows.
        bypass: [num_slots, d_out, k], contiguous within a slot.

    Raises:
        ShapeError: names the strides.
    """
    d_out, k = index.shape
    if index.stride(1) != 1 and k > 1:
        raise ShapeError(f"rows of index must be contiguous, got strides {index.stride()}")
    if not bypass[0].is_contiguous():
        raise ShapeError(f"a slot must be contiguous, bypass has strides {bypass.stride()}")
    columns, values = (index.data_ptr(), index.stride(0)), (bypass.data_ptr(), bypass.stride(0))
    return TableBlock(KINDS[bypass.dtype], d_out, k, first_row, *columns, *values)


def lanes_block(positions: Tensor, slots: Tensor, merged_slot: int | None) -> LanesBlock:
    """Describe lanes to the kernels.

    Args:
        positions, slots: [num_lanes] int64.
    """
    whole, left = divmod(len(slots), LANES)
    num_blocks = whole + (left > FEW_LANES)
    merged = -1 if merged_slot is None else merged_slot
    return LanesBlock(positions.data_ptr(), slots.data_ptr(), len(slots), num_blocks, merged)


# --- other kernels of one operation ----------------------------------------------------------


class EntriesBlock(ctypes.Structure):
    """`add_entries` and `put_entries`."""

    _fields_ = _integers("counter kind weight positions values saved num_entries")


class RmsNormBlock(ctypes.Structure):
    """`rms_norm` of [rows, width]."""

    _fields_ = [*_integers("counter kind y x weight rows width"), ("eps", ctypes.c_float)]


class ValueGradBlock(ctypes.Structure):
    """`value_grad`.

    parts: [spans, d_out, k] float32.
    group: neurons in one piece of work.
    zeros: as many as d_out and d_in.
    """

    _fields_ = _integers(
        "counter kind grads grad_stride x x_stride tokens d_out d_in index k parts group zeros"
    )


# --- a decoder's forward ---------------------------------------------------------------------

NORM, PRODUCT, ROTATE, ATTEND = range(4)  # operations
# what becomes of a product: stored, added to what is there, gated (its first half by its second)
STORE, ADD, GATE, LOGITS = range(4)


class StepBlock(ctypes.Structure):
    """The step that all operations of a program compute.

    positions, slots, kept: of int64.
    cos, sin: of [num_tokens, head_dim] bf16.
    largest_k: of all tables in calls and runs.
    """

    _fields_ = _integers("num_tokens num_kept positions slots kept cos sin largest_k")


class NormBlock(ctypes.Structure):
    """NORM. is_last: only of the tokens whose logits are kept."""

    _fields_ = [*_integers("counter x y width weight is_last"), ("eps", ctypes.c_float)]


class ProductBlock(ctypes.Structure):
    """PRODUCT.

    calls: num_calls times the addresses of a table and its lanes.
    runs: num_runs times (start, stop, address of adds, number of adds), in the order of their
        tokens; an add is (address of a table, slot, sign).
    """

    _fields_ = _integers(
        "counter weight bias num_rows d_in x y y_stride epilogue calls num_calls runs num_runs"
    )


_CACHE = "keys values block_stride block_shift tables table_stride"


class AttentionBlock(ctypes.Structure):
    """ROTATE and ATTEND. window, softcap, q_norm, k_norm: 0 for none.

    query: a token's queries lie query_stride apart, and a head's head_stride. Behind a token's
        queries are its keys and its values, for ROTATE, which has bf16 only.
    keys, values: addresses of a layer's first ones, [blocks, kv_heads, 1 << block_shift, head_dim]
        with block_stride between blocks.
    tables: address of [slots, table_stride] int32, the blocks of each slot's sequence.
    """

    _fields_ = [
        *_integers("counter kind query query_stride head_stride out"),
        *_integers(f"heads kv_heads head_dim window {_CACHE} q_norm k_norm"),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("head_eps", ctypes.c_float),
    ]


class WriteBlock(ctypes.Structure):
    """`write_kv_`. positions, slots: addresses of [num_tokens] int64; the rest as in ATTEND."""

    _fields_ = _integers(
        "counter kind num_tokens positions slots kv_heads head_dim "
        f"k k_stride k_head_stride v v_stride v_head_stride {_CACHE}"
    )


def set_cache(block: Any, keys: Tensor, values: Tensor, tables: Tensor) -> None:
    """Say where a layer's keys and values are.

    Args:
        block: for attention, or to write.
        keys, values: [num_blocks, kv_heads, block_tokens, head_dim], block_tokens a power of two
            and at least LANES; a block is contiguous, and blocks lie the same stride apart in both.
        tables: [slots, blocks of a slot] int32, contiguous rows.

    Raises:
        ShapeError: names what is otherwise.
    """
    _, kv_heads, block_tokens, dim = keys.shape
    if block_tokens < LANES or block_tokens.bit_count() != 1:
        raise ShapeError(f"a block must have 16, 32, 64, ... positions, got {block_tokens}")
    in_block = [(block_tokens * dim, kv_heads), (dim, block_tokens), (1, dim)]
    for tensor in (keys, values):
        strides = tensor.stride()
        if strides[0] != keys.stride(0) or any(
            own != stride and size > 1
            for own, (stride, size) in zip(strides[1:], in_block, strict=True)
        ):
            raise ShapeError(f"a block must be contiguous, got strides {strides}")
    if tables.dtype != torch.int32 or tables.stride(1) != 1:
        raise ShapeError(f"rows of tables must be contiguous int32, got {tables.dtype}")
    block.keys, block.values = keys.data_ptr(), values.data_ptr()
    block.block_stride, block.block_shift = keys.stride(0), block_tokens.bit_length() - 1
    block.tables, block.table_stride = tables.data_ptr(), tables.stride(0)


def attention_scratch_bytes(group: int, context_length: int) -> int:
    """Bytes that a thread needs for ATTEND, with this many query heads to one of keys."""
    return 4 * QUERIES * group * (context_length + LANES)


class ProgramBlock(ctypes.Structure):
    """A list of operations.

    ops: num_ops times (operation, address of its block).
    barrier: address of the function that all threads wait in; 0 where there is one thread.
    scratch: scratch_bytes for every thread.
    """

    _fields_ = _integers("counter num_ops ops step barrier scratch scratch_bytes")
