"""The norm of Llama-like models as one CPU kernel."""

import torch
from torch import Tensor

from neuroada_serve.ops import cpu_team
from neuroada_serve.ops.cpu_blocks import KINDS, RmsNormBlock


class RmsNorm:
    """y = weight * x / sqrt(mean(x * x) + eps) over the last dimension.

    Rounds as transformers' own norm does: after the division, and after the product.

    Args:
        weight: [width], contiguous; `cpu_team.supports(weight)`.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight  # the block below holds its address
        self._block = RmsNormBlock(kind=KINDS[weight.dtype], weight=weight.data_ptr(), eps=eps)
        self._block.width = weight.numel()
        self._kernel = cpu_team.TeamKernel(cpu_team.kernels().rms_norm)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., width], contiguous, in the weight's dtype."""
        block, y, count = self._block, torch.empty_like(x), x.numel()
        block.counter, block.y, block.x = 0, y.data_ptr(), x.data_ptr()
        block.rows = count // block.width
        self._kernel(block, count)
        return y
