"""Quantize a base to 8 or 4 bits with bitsandbytes while an adapter is trained beside it.

What is trained fits the quantized base; the adapter still names the base it was quantized from, and
is served on that.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuroada_serve.errors import UsageError
from neuroada_serve.model.loader import is_transposed, replace_module
from neuroada_serve.model.quiet import quiet_bitsandbytes

Quantize = Literal["none", "int8", "nf4"]

_BLOCK = 64  # weights that share a scale in nf4


def quantize_(model: Any, modules: Mapping[str, nn.Module], how: Quantize) -> dict[str, nn.Module]:
    """Replace linear layers of a model by quantized ones, in place, and release their weights.

    Args:
        modules: name -> nn.Linear of the model.
        how: int8 (a scale per row) or nf4 (4 bits, a scale per 64 weights).

    Returns:
        The new layers by the same names.

    Raises:
        UsageError: bitsandbytes is not installed, or a module is no nn.Linear.
    """
    if how == "none":
        return dict(modules)
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            'a quantized base needs bitsandbytes: run pip install "neuroada-serve[quantize]"'
        )
    for name, module in modules.items():
        if type(module) is not nn.Linear:
            raise UsageError(
                f"{name} is a {type(module).__name__}; only nn.Linear can be quantized: train this "
                "base with --quantize none"
            )
        if how == "nf4" and module.in_features % _BLOCK:
            raise UsageError(
                f"nf4 takes {_BLOCK} inputs at a time, and {name} has {module.in_features}; train "
                "with --quantize int8"
            )
    quantized = {}
    for name, module in modules.items():
        assert isinstance(module, nn.Linear)
        quantized[name] = _quantized(module, how)
        replace_module(model, name, quantized[name])
    return quantized


def _quantized(module: nn.Linear, how: Quantize) -> nn.Module:
    with quiet_bitsandbytes():
        from bitsandbytes import nn as layers

    shape, bias = (module.in_features, module.out_features), module.bias is not None
    dtype, device = module.weight.dtype, module.weight.device
    made: nn.Module
    if how == "nf4":
        made = layers.Linear4bit(*shape, bias=bias, compute_dtype=dtype, quant_type="nf4")
    else:
        made = layers.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
    made.load_state_dict(module.state_dict())
    if bias:
        made.bias.data = made.bias.data.to(dtype)
    return made.to(device)


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight [d_out, d_in] that a layer computes with, dequantized if it is
    quantized."""
    weight: Any = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes import functional

        dense: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return dense
    if weight.dtype == torch.int8:
        from bitsandbytes import functional

        state: Any = module.state  # it takes over both tensors in the first forward
        values = weight.CB if weight.CB is not None else state.CB
        scales = weight.SCB if weight.SCB is not None else state.SCB
        dense = functional.int8_vectorwise_dequant(values, scales)
        return dense
    plain: Tensor = weight.detach()
    return plain.t() if is_transposed(module) else plain
