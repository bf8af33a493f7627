"""The gradient of an adapter's values: the only part of training that is not a dense layer's own.

`value_grad_reference` is the truth; `value_grad` is tested against it.
"""

import torch
from torch import Tensor

from neuroada_serve.errors import ShapeError
from neuroada_serve.ops import cpu_team, triton_value_grad
from neuroada_serve.ops.cpu_blocks import KINDS, ValueGradBlock

# A private operator: a torch without it loops over k.
_FUSED = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
_SUM = 0  # embedding_bag's mode
# On a GPU the sparse sum's time grows with k, the dense gradient's with d_in. On an H200, in
# Llama-3-8B's shapes with 4,096 tokens, they meet near k = d_in / 220; on the CPU never.
_DENSE_FROM = 220
_DENSE_BYTES = 32 << 20  # of the dense gradient at a time
_SMALLEST = 32  # rows of x and of gradients shorter than a tile of the kernel are left to torch
_FEWEST_NEURONS = 256  # in one piece of the kernel's work


def value_grad_reference(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Compute `value_grad` in at least float32, through a [tokens, d_out, k] temporary."""
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
        [d_out, k] float32, or float64 for float64 inputs. Sums run in float32 or wider; by way of
        the dense gradient or torch's own operator they are rounded once to a bfloat16 or float16
        layer's dtype.

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
    if torch.compiler.is_compiling():
        grad: Tensor = _opaque(grad_output, x, index)
        return grad
    return _dispatched(grad_output, x, index)


def _dispatched(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    if x.is_cuda:
        if index.shape[1] * _DENSE_FROM > x.shape[1]:
            return value_grad_by_rows(grad_output, x, index)
        if triton_value_grad.HAS_TRITON and x.dtype != torch.float64:
            return triton_value_grad.value_grad_triton(grad_output, x, index)
    elif _kernel_supports(grad_output, x, index):
        return _by_kernel(grad_output, x, index)
    elif _FUSED is not None and x.device.type == "cpu":
        return _by_embedding_bag(grad_output, x, index)
    return _column_by_column(grad_output, x, index)


@torch.library.custom_op("neuroada_serve::value_grad", mutates_args=())
def _opaque(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """`value_grad` as one operator for compilers, which cannot read our kernels."""
    return _dispatched(grad_output, x, index)


@_opaque.register_fake
def _(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(index.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def value_grad_by_rows(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """`value_grad` by the dense gradient, some rows of it at a time."""
    d_out, k = index.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = max(1, _DENSE_BYTES // (x.shape[1] * x.element_size()))
    grad = torch.empty(d_out, k, dtype=wide, device=x.device)
    for start in range(0, d_out, rows):
        part = slice(start, start + rows)
        dense = grad_output[:, part].t() @ x  # (rows, d_in)
        grad[part] = dense.gather(1, index[part].long())
    return grad


def _kernel_supports(grads: Tensor, x: Tensor, index: Tensor) -> bool:
    return (
        cpu_team.supports(grads, x)
        and min(grads.shape[1], x.shape[1]) >= _SMALLEST
        and index.dtype == torch.int32
        and index.is_contiguous()
        and grads.stride(1) == x.stride(1) == 1
    )


def _by_kernel(grads: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """`value_grad` by the kernel of `cpu_grad_kernels.py`, in float32."""
    from neuroada_serve.ops import cpu_grad_kernels as kernels
    from neuroada_serve.ops.cpu_vectors import TILE

    (tokens, d_out), (d_in, k) = grads.shape, (x.shape[1], index.shape[1])
    spans = max(1, -(-tokens // kernels.SPAN))
    parts = torch.zeros(spans, d_out, k)
    zeros = x.new_zeros(max(d_out, d_in))
    wanted = 2 * torch.get_num_threads()  # pieces; each group of neurons turns x once more
    groups = max(1, min(-(-wanted // spans), d_out // _FEWEST_NEURONS))
    block = ValueGradBlock(
        kind=KINDS[x.dtype],
        grads=grads.data_ptr(),
        grad_stride=grads.stride(0),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        tokens=tokens,
        d_out=d_out,
        d_in=d_in,
        index=index.data_ptr(),
        k=k,
        parts=parts.data_ptr(),
        group=-(-d_out // groups // TILE) * TILE,
        zeros=zeros.data_ptr(),
    )
    cpu_team.TeamKernel(kernels.value_grad)(block, tokens * d_out)
    return parts[0] if spans == 1 else parts.sum(dim=0)


def _by_embedding_bag(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """`value_grad` as the backward of embedding_bag's per_sample_weights: term for term the same
    sum, over rows of the transposed activations."""
    assert _FUSED is not None
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


def _column_by_column(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """`value_grad` by one row gather for each of the k columns."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_t = grad_output.t().to(wide).contiguous()  # (d_out, tokens)
    x_t = x.t().to(wide).contiguous()  # (d_in, tokens)
    columns = [(x_t.index_select(0, column) * grad_t).sum(dim=1) for column in index.t()]
    return torch.stack(columns, dim=1)
