"""The attention of a model's modules over a KV cache in blocks, on the CPU: the kernels of
`cpu_attention_kernels.py`, which steps as one kernel run as well.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from neuroada_serve.ops import cpu_blocks, cpu_team
from neuroada_serve.ops.cpu_blocks import AttentionBlock, ProgramBlock, StepBlock, WriteBlock

_ALIGNMENT = 64  # bytes
_COPIED_AT_ONCE = 32  # entries, in the time that another kernel takes for one
_THREADED = 1 << 17  # numbers of keys; fewer are not worth waking a second thread


def fits(query: Tensor) -> bool:
    """Tell if `decode_attention` supports a query [..., head_dim]: on the CPU, in float32, bfloat16
    or float16, head_dim a multiple of 16."""
    return (
        query.shape[-1] % cpu_blocks.LANES == 0
        and cpu_team.supports(query)
        and cpu_team.forward_kernels() is not None
    )


def write_kv_(
    keys: Tensor,
    values: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> None:
    """Store the keys and values of new tokens in their blocks.

    Semantics, for every token t with slots[t] >= 0, its cell
    b, i = tables[slots[t], positions[t] // block_tokens], positions[t] % block_tokens:
        keys[b, :, i] = k[t];  values[b, :, i] = v[t]

    Args:
        keys, values: [num_blocks, kv_heads, block_tokens, head_dim] as `set_cache` wants them, in
            the dtype of k and v. Changed in place.
        k, v: [T, kv_heads, head_dim], last stride 1.
        tables: [num_slots, max_blocks] int32.
        slots, positions: [T] int64 or int32.
    """
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    slots, positions = _int64(slots), _int64(positions)
    num_tokens, kv_heads, dim = k.shape
    block = WriteBlock(
        kind=cpu_blocks.KINDS[k.dtype],
        num_tokens=num_tokens,
        positions=positions.data_ptr(),
        slots=slots.data_ptr(),
        kv_heads=kv_heads,
        head_dim=dim,
        k=k.data_ptr(),
        k_stride=k.stride(0),
        k_head_stride=k.stride(1),
        v=v.data_ptr(),
        v_stride=v.stride(0),
        v_head_stride=v.stride(1),
    )
    cpu_blocks.set_cache(block, keys, values, tables)
    _write()(block, k.numel() // _COPIED_AT_ONCE)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    slots: Tensor,
    positions: Tensor,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of tokens over what precedes them in their sequences, and themselves.

    Semantics, for row t with s = slots[t], p = positions[t] and head h of kv head g; K and V are
    the sequence's keys and values of g, as tables[s] puts them together:
        columns = max(0, p + 1 - window) .. p
        scores = softcap * tanh(query[t, h] @ K[columns].T * scaling / softcap)
        out[t, h] = softmax(scores) @ V[columns]
    Without window all columns count, without softcap scores are the scaled products. Rows with
    slots[t] < 0 give zeros. A row's bits do not depend on the others.

    Args:
        query: [n, heads, head_dim] as `fits` says, last stride 1.
        keys, values: [num_blocks, kv_heads, block_tokens, head_dim] as `set_cache` wants them, in
            the query's dtype.
        tables: [num_slots, max_blocks] int32.
        slots, positions: [n] int64 or int32.
        scaling: None is head_dim ** -0.5.
        out: [n, heads, head_dim], contiguous, of query's dtype; filled and returned if given.

    Returns:
        [n, heads, head_dim], dtype of query; sums are float32.
    """
    query = query if query.stride(2) == 1 else query.contiguous()
    slots, positions = _int64(slots), _int64(positions)
    n, heads, dim = query.shape
    kv_heads = keys.shape[1]
    out = query.new_empty(n, heads, dim) if out is None else out
    assert out.is_contiguous()
    if n == 0:
        return out
    block = AttentionBlock(
        kind=cpu_blocks.KINDS[query.dtype],
        query=query.data_ptr(),
        query_stride=query.stride(0),
        head_stride=query.stride(1),
        out=out.data_ptr(),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        window=window or 0,
        scale=dim**-0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
    )
    cpu_blocks.set_cache(block, keys, values, tables)
    length = int(positions.max()) + 1
    few = n * kv_heads * min(length, window or length) * dim <= _THREADED
    threads = 1 if few else min(torch.get_num_threads(), n * kv_heads)
    size = cpu_blocks.attention_scratch_bytes(heads // kv_heads, length)
    size = -(-size // _ALIGNMENT) * _ALIGNMENT
    scratch = torch.empty(threads * size + _ALIGNMENT, dtype=torch.uint8)
    step = StepBlock(num_tokens=n, positions=positions.data_ptr(), slots=slots.data_ptr())
    ops = (ctypes.c_int64 * 2)(cpu_blocks.ATTEND, ctypes.addressof(block))
    program = ProgramBlock(
        num_ops=1,
        ops=ctypes.addressof(ops),
        step=ctypes.addressof(step),
        scratch=-(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT,
        scratch_bytes=size,
    )
    cpu_team.run_program(program, threads)
    return out


def _int64(numbers: Tensor) -> Tensor:
    return numbers.long().contiguous()


@cache
def _write() -> cpu_team.TeamKernel:
    kernels = cpu_team.attention_kernels()
    return cpu_team.TeamKernel(kernels.write)
