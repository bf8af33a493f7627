"""Products with bf16 weights in blocks, for processors whose bf16 torch multiplies slowly: one
operation of `cpu_forward_kernels.py` as a program of its own.
"""

import ctypes

import torch
from torch import Tensor

from neuroada_serve.ops import cpu_team
from neuroada_serve.ops.cpu_blocks import PRODUCT, STORE, ProductBlock, ProgramBlock, StepBlock

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
        self._block = ProductBlock(
            weight=entries.data_ptr(),
            num_rows=d_out,
            d_in=d_in + d_in % 2,
            y_stride=d_out,
            epilogue=STORE,
        )

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [num_tokens, d_in] bf16.
            bias: [d_out] bf16, contiguous.
            out: [num_tokens, d_out] bf16, contiguous; filled and returned if given.

        Returns:
            [num_tokens, d_out] bf16; sums are float32.
        """
        y = x.new_empty(len(x), self._d_out) if out is None else out
        assert y.is_contiguous()
        for first in range(0, len(x), _MOST_TOKENS):
            self._multiply(x[first : first + _MOST_TOKENS], bias, y[first : first + _MOST_TOKENS])
        return y

    def _multiply(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        kernels, block, threads = cpu_team.forward_kernels(), self._block, torch.get_num_threads()
        # The kernel reads beyond the last token, and an odd column's partner.
        padded = x.new_zeros(len(x) + kernels.CHUNK, block.d_in)
        padded[: len(x), : self._d_in] = x
        block.x, block.y = padded.data_ptr(), y.data_ptr()
        block.bias = 0 if bias is None else bias.data_ptr()
        size = -(-kernels.scratch_bytes(len(x), 0, block.d_in, 0) // 64) * 64
        scratch = torch.empty(threads * size + 64, dtype=torch.uint8)
        step = StepBlock(num_tokens=len(x))
        ops = (ctypes.c_int64 * 2)(PRODUCT, ctypes.addressof(block))
        program = ProgramBlock(
            num_ops=1,
            ops=ctypes.addressof(ops),
            step=ctypes.addressof(step),
            scratch=-(-scratch.data_ptr() // 64) * 64,
            scratch_bytes=size,
        )
        cpu_team.run_program(program, threads)
