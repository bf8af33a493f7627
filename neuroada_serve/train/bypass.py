"""Train an adapter's values beside layers that must stay as they are: quantized ones, or weights
that something else reads meanwhile.

The layer computes what it always does, and the bypass is added to it: no weight is written, at the
price of a sparse product forward and one backward (about a fifth of a step on the CPU). Where the
weights may be written, `train/inplace.py` is faster and trains just what a merge realises.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroada_serve.adapters.select import Selection
from neuroada_serve.model.loader import replace_module
from neuroada_serve.ops.value_grad import value_grad


class BypassedLinear(nn.Module):
    """A layer y = base(x) + bypass(x) with trainable values.

    index: [d_out, k] int32.
    trained: [d_out, k] bool, entries whose values get a gradient; None for all.
    value: [d_out, k] trainable float32, starts at 0.
    bias_value: [d_out] likewise, added to the bias, where there is one and `tune_bias`.
    """

    bias_value: Tensor | None

    def __init__(self, base: nn.Module, selection: Selection, tune_bias: bool = False) -> None:
        super().__init__()
        self.base = base
        self.index, self.trained = selection.index, selection.trained
        self.value = nn.Parameter(
            torch.zeros(self.index.shape, dtype=torch.float32, device=self.index.device)
        )
        self.bias_value = None
        if tune_bias and getattr(base, "bias", None) is not None:
            self.bias_value = nn.Parameter(self.value.new_zeros(len(self.index)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        bypass: Tensor = _Bypass.apply(x, self.value, self.index, self.trained)  # type: ignore[no-untyped-call]
        if self.bias_value is not None:
            bypass = bypass + self.bias_value
        return y + bypass.to(y.dtype)


class _Bypass(torch.autograd.Function):
    """Compute s[t, i] = sum_j value[i, j] * x[t, index[i, j]], in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., d_in]
        value: Tensor,
        index: Tensor,
        trained: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, value, index, trained)
        wide = torch.promote_types(x.dtype, value.dtype)
        x_t = x.reshape(-1, x.shape[-1]).t().to(wide).contiguous()  # (d_in, tokens)
        weights = value.to(wide)
        sums = F.embedding_bag(index, x_t, per_sample_weights=weights, mode="sum")
        return sums.t().view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, value, index, trained = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, d_out)
        grad_x = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_t = grad.t().contiguous()  # (d_out, tokens)
            sums = grad_t.new_zeros(x.shape[-1], len(grad))
            for column, values in zip(index.t(), value.to(grad.dtype).t(), strict=True):
                sums.index_add_(0, column, grad_t * values[:, None])
            grad_x = sums.t().to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            flat = x.reshape(-1, x.shape[-1])
            grad_value = value_grad(grad.to(x.dtype), flat, index).to(value.dtype)
            if trained is not None:
                grad_value = grad_value * trained
        return grad_x, grad_value, None, None


@contextmanager
def bypass_training(
    model: Any,
    modules: Mapping[str, nn.Module],
    selections: Mapping[str, Selection],
    tune_bias: bool = False,
) -> Iterator[dict[str, BypassedLinear]]:
    """Put a bypass beside `modules` of a model inside a block. Yields the layers.

    As `inplace_training`, but nothing of the base changes, not even for a while.

    Args:
        modules: name -> any module of one input, as a quantized linear layer.
        selections: by the same names, on the device of the inputs.
    """
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    layers = {
        name: BypassedLinear(module, selections[name], tune_bias)
        for name, module in modules.items()
    }
    model.requires_grad_(False)
    try:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield layers
    finally:
        for name, module in modules.items():
            replace_module(model, name, module)
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache
