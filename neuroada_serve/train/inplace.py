"""Train an adapter's values inside the weights of its base.

Every forward first writes the current values into the weight, W[index] = round(W0[index] + value),
so it is the plain dense forward, and what is trained is what a merge realises. Only the backward
is special: it computes the gradient of the values and never that of the weight. Nothing of the
weight's size is copied; the entries that were overwritten are kept and written back bit for bit.

While layers are attached the model belongs to the training run: nobody else may run it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_serve.adapters.select import Selection, magnitude_index
from neuroada_serve.model.loader import is_transposed, replace_module
from neuroada_serve.ops.matrix import DenseMatrix, linear
from neuroada_serve.ops.value_grad import value_grad
from neuroada_serve.ops.weights import read_entries, write_entries_
from neuroada_serve.train.quantize import dense_weight


class InplaceLinear(nn.Module):
    """A linear layer y = W x + b with trainable values at `index` of W, which it keeps written into
    W.

    It holds the parameters of the layer that it replaces, under the same names.

    index: [d_out, k] int32.
    trained: [d_out, k] bool, entries whose values get a gradient; None for all.
    value: [d_out, k] trainable, starts at 0; float32, or float64 for a float64 weight.
    bias_value: [d_out] likewise, added to the bias, where there is one and `tune_bias`.
    """

    bias: Tensor | None
    bias_value: Tensor | None

    def __init__(self, base: nn.Module, selection: Selection, tune_bias: bool = False) -> None:
        super().__init__()
        index = selection.index
        assert isinstance(base.weight, nn.Parameter)
        self.weight = base.weight
        self.register_parameter("bias", base.bias if isinstance(base.bias, nn.Parameter) else None)
        self.transposed = is_transposed(base)
        self.index = index
        self.trained = selection.trained
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        self.value = nn.Parameter(torch.zeros(index.shape, dtype=wide, device=index.device))
        self.bias_value = None
        if tune_bias and self.bias is not None:
            shape = self.bias.shape
            self.bias_value = nn.Parameter(torch.zeros(shape, dtype=wide, device=index.device))
        matrix = DenseMatrix(self.weight, self.transposed)
        self._positions = matrix.positions(index)
        self._original = read_entries(matrix.entries, self._positions)
        self._written = self.value._version  # values of this version are in the weight

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # else `inplace_training` has done it
            self.write_values_()
        where = (self.index, self.trained)
        bias = self.bias, self.bias_value
        return _linear(x, self.value, self.weight, *bias, *where, self.transposed)

    @torch.no_grad()
    def write_values_(self, always: bool = False) -> None:
        """Write round(W0 + value) into the weight, if the values have changed since.

        Changes through `value.data` go unnoticed; pass `always` for these.
        """
        changed = self._written != self.value._version
        if not changed and not always:
            return
        merged = self._original.to(self.value.dtype) + self.value.flatten()
        self._write(merged.to(self.weight.dtype))
        if changed:  # a backward of what was before is refused, but forwards may share one
            torch.autograd.graph.increment_version(self.weight)
        self._written = self.value._version

    @torch.no_grad()
    def restore_(self) -> None:
        """Write the original entries back, bit for bit. The values stay as they are."""
        self._write(self._original)
        torch.autograd.graph.increment_version(self.weight)
        self._written = -1

    def _write(self, entries: Tensor) -> None:
        write_entries_(self.weight.data.view(-1), self._positions, entries)


class FrozenLinear(nn.Module):
    """A linear layer y = W x + b with nothing to train: the output head, by the products of the
    other layers."""

    bias: Tensor | None

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, None, self.weight, self.bias, None, None, None, False)


def _linear(x: Tensor, *others: Any) -> Tensor:
    """Apply `_InplaceLinear` in autocast's dtype, where that is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    y: Tensor = _InplaceLinear.apply(x, *others)  # type: ignore[no-untyped-call]
    return y


class _InplaceLinear(torch.autograd.Function):
    """A linear layer whose backward gives dx and the gradient of the values at `index`, and of what
    is added to the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., d_in]
        value: Tensor | None,  # not read: its effect is already in the weight
        weight: Tensor,
        bias: Tensor | None,
        bias_value: Tensor | None,
        index: Tensor | None,
        trained: Tensor | None,
        transposed: bool,
    ) -> Tensor:
        # The weight too: values are written between backward and forward, never between forward
        # and backward, where autograd would refuse a saved tensor that has changed.
        ctx.save_for_backward(x, weight, index, trained)
        ctx.transposed = transposed
        weight = weight.t() if transposed else weight  # (d_out, d_in)
        if bias is not None and bias_value is not None:
            bias = (bias + bias_value).to(bias.dtype)  # as merging realises it
        if weight.dtype == x.dtype or not torch.is_autocast_enabled(x.device.type):
            return linear(x, weight, bias)
        return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, trained = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, d_out)
        grad_x = grad_value = grad_bias = None
        if ctx.needs_input_grad[0]:
            turned = weight if ctx.transposed else weight.t()  # (d_in, d_out)
            grad_x = linear(grad, turned.to(grad.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_value = value_grad(grad, x.reshape(-1, x.shape[-1]), index)
            if trained is not None:
                grad_value = grad_value * trained
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        return grad_x, grad_value, None, None, grad_bias, None, None, None


def attach_inplace(
    model: nn.Module,
    modules: Mapping[str, Any],
    selections: Mapping[str, Selection],
    tune_bias: bool = False,
) -> dict[str, InplaceLinear]:
    """Replace `modules` of the model by InplaceLinear layers on the same parameters.

    Args:
        model: a causal LM; all its parameters are frozen, only values are left to train.
        modules: name -> Linear or Conv1D, such as `adaptable_modules` gives, or some of them.
        selections: by the same names, on the device of the weights.
        tune_bias: train their biases too, of those that have one.

    Returns:
        The new layers by the same names.
    """
    layers = {
        name: InplaceLinear(module, selections[name], tune_bias) for name, module in modules.items()
    }
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    return layers


def detach_inplace(
    model: nn.Module, modules: Mapping[str, Any], layers: Mapping[str, InplaceLinear]
) -> None:
    """Undo `attach_inplace`: restore the weights' original bits and the old modules."""
    for name, layer in layers.items():
        layer.restore_()
        replace_module(model, name, modules[name])


@contextmanager
def inplace_training(
    model: Any,
    modules: Mapping[str, Any],
    selections: Mapping[str, Selection],
    tune_bias: bool = False,
) -> Iterator[dict[str, InplaceLinear]]:
    """Apply `attach_inplace` inside a block, and undo it however the block ends. Yields the layers.

    The model's modes (train or eval, and use_cache, which the Trainer switches off) are restored
    too. The model, or modules of it, may be compiled; it must then be called as a whole.
    """
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    layers = attach_inplace(model, modules, selections, tune_bias)
    head = model.get_output_embeddings()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def write_values(*forward: Any) -> None:
        for layer in layers.values():
            layer.write_values_(always=True)

    hook = model.register_forward_pre_hook(write_values)
    try:
        if type(head) is nn.Linear:
            model.set_output_embeddings(FrozenLinear(head))
        yield layers
    finally:
        hook.remove()
        if type(head) is nn.Linear:
            model.set_output_embeddings(head)
        detach_inplace(model, modules, layers)
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache


def magnitude_selections(modules: Mapping[str, Any], k: int) -> dict[str, Selection]:
    """Select by magnitude in every module, quantized or not, see `magnitude_index`.

    Raises:
        ShapeError: k is above a module's d_in.
    """
    return {
        name: Selection(magnitude_index(dense_weight(module), k))
        for name, module in modules.items()
    }
