"""The gradient of an adapter's values: the only part of training that is not a dense layer's own.

`value_grad_reference` is the truth; `value_grad` is tested against it.
"""

import torch
from torch import Tensor

from neuroada_serve.errors import ShapeError

# The backward of embedding_bag's per_sample_weights is, term for term, the sum below: a fused
# gather and dot over rows of the transposed activations.
# It is a private op, so a loop over k stands by for a torch without it and for other devices.
_FUSED = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
_FUSED_DEVICES = ("cpu", "cuda")
_SUM = 0  # embedding_bag's mode


def value_grad_reference(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """What `value_grad` computes, in at least float32, through a [tokens, d_out, k] temporary."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gathered = x.to(wide)[:, index.long()]  # (tokens, d_out, k)
    return torch.einsum("to,tok->ok", grad_output.to(wide), gathered)


def value_grad(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Gradient of the loss with respect to the values of one linear layer.

    Semantics, for y[t, i] = ... + sum_j value[i, j] * x[t, index[i, j]] and g = dloss/dy:
        out[i, j] = sum_t g[t, i] * x[t, index[i, j]]
    Makes neither a [tokens, d_out, k] temporary nor the dense gradient of the weight.

    Args:
        grad_output: [tokens, d_out].
        x: [tokens, d_in], dtype and device of grad_output.
        index: [d_out, k] int32 or int64, every value in [0, d_in).

    Returns:
        [d_out, k] float32, or float64 for float64 inputs. Sums run in float32 or wider; the fused
        op then rounds a bfloat16 or float16 layer's sums once to that dtype.

    Raises:
        ShapeError: names the shapes that disagree.

    Source: NeuroAda, arXiv:2510.18940 (gradient of its bypass).
    """
    if grad_output.ndim != 2 or x.ndim != 2 or grad_output.shape[0] != x.shape[0]:
        raise ShapeError(
            f"grad_output {tuple(grad_output.shape)} and x {tuple(x.shape)} must be [tokens, d]"
        )
    if index.ndim != 2 or index.shape[0] != grad_output.shape[1]:
        raise ShapeError(
            f"index {tuple(index.shape)} must have one row per column of grad_output "
            f"{tuple(grad_output.shape)}"
        )
    if _FUSED is None or x.device.type not in _FUSED_DEVICES:
        return _looped(grad_output, x, index)
    d_out, k = index.shape
    row_starts = torch.arange(0, d_out * k, k, dtype=index.dtype, device=index.device)
    rows = torch.arange(d_out, dtype=index.dtype, device=index.device).repeat_interleave(k)
    grad: Tensor = _FUSED(
        grad_output.t().contiguous(),  # (d_out, tokens): the bags' gradients
        x.t().contiguous(),  # (d_in, tokens): the embedding table
        index.flatten(),
        row_starts,
        rows,
        _SUM,
        -1,  # no padding column
    )
    return grad.view(d_out, k).to(torch.promote_types(x.dtype, torch.float32))


def _looped(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """`value_grad` by one row gather for each of the k columns."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_t = grad_output.t().to(wide).contiguous()  # (d_out, tokens)
    x_t = x.t().to(wide).contiguous()  # (d_in, tokens)
    columns = [(x_t.index_select(0, column) * grad_t).sum(dim=1) for column in index.t()]
    return torch.stack(columns, dim=1)
