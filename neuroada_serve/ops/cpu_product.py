"""Products with bf16 weights in blocks, for processors whose bf16 torch multiplies slowly: one
operation of `cpu_forward_kernels.py` as a program of its own.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.ops import cpu_bypass

_MOST_TOKENS = 512  # are multiplied at once: beyond, a tile's sums would leave the cache


class BlockProduct:
    """y = W x + b.

    Args:
        entries: of a weight [d_out, d_in], bf16, in blocks of 64 rows: in a block, for each pair of
            columns, the 64 pairs; an odd column and missing rows are padded with zeros. They may
            change in place.
    """

    def __init__(self, entries: Tensor, d_out: int, d_in: int) -> None:
        self._entries = entries  # the block below holds their address
        self._d_out, self._d_in = d_out, d_in
        self._at = at = forward_kernels()
        self._block = block = (ctypes.c_int64 * at.NUM_OP_FIELDS)()
        block[at.WEIGHT], block[at.NUM_ROWS] = entries.data_ptr(), d_out
        block[at.D_IN] = d_in + d_in % 2
        block[at.Y_STRIDE], block[at.EPILOGUE] = d_out, at.STORE

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """
        Args:
            x: [num_tokens, d_in] bf16.
            bias: [d_out] bf16, contiguous.

        Returns:
            [num_tokens, d_out] bf16; sums are float32.
        """
        y = x.new_empty(len(x), self._d_out)
        for first in range(0, len(x), _MOST_TOKENS):
            self._multiply(x[first : first + _MOST_TOKENS], bias, y[first : first + _MOST_TOKENS])
        return y

    def _multiply(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        at, block, threads = self._at, self._block, torch.get_num_threads()
        # The kernel reads beyond the last token, and an odd column's partner.
        padded = x.new_zeros(len(x) + at.CHUNK, block[at.D_IN])
        padded[: len(x), : self._d_in] = x
        block[at.X], block[at.Y] = padded.data_ptr(), y.data_ptr()
        block[at.BIAS] = 0 if bias is None else bias.data_ptr()
        size = -(-at.scratch_bytes(len(x), 0, block[at.D_IN], 0) // 64) * 64
        scratch = torch.empty(threads * size + 64, dtype=torch.uint8)
        step = (ctypes.c_int64 * at.NUM_STEP_FIELDS)()
        step[at.NUM_TOKENS] = len(x)
        ops = (ctypes.c_int64 * 2)(at.PRODUCT, ctypes.addressof(block))
        program = (ctypes.c_int64 * at.NUM_PROGRAM_FIELDS)()
        program[at.NUM_OPS], program[at.OPS] = 1, ctypes.addressof(ops)
        program[at.STEP], program[at.SCRATCH_BYTES] = ctypes.addressof(step), size
        program[at.SCRATCH] = -(-scratch.data_ptr() // 64) * 64
        cpu_bypass.run_team(at.run, program, at.BARRIER, threads)


def available() -> bool:
    """Whether there are kernels."""
    return forward_kernels() is not None


@cache
def forward_kernels() -> Any:
    """`cpu_forward_kernels`; None without numba."""
    try:
        from neuroada_serve.ops import cpu_forward_kernels
    except ImportError:
        return None
    return cpu_forward_kernels
