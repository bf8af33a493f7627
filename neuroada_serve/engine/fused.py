"""The elementwise parts of a model, fused: by torch.compile on CUDA, by our kernels on the CPU.

transformers writes a norm as six launches, a rotary embedding as ten. At batch 1 those launches
take longer than the bytes they move. Compiling just these parts, not the model, takes seconds and
has nothing to break the graph: no cache, no adapters, no Python state.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from neuroada_serve.engine.known_code import GATED_MLP, RMS_NORM, has_code
from neuroada_serve.ops import cpu_team
from neuroada_serve.ops.cpu_norm import RmsNorm

logger = logging.getLogger(__name__)

_ROTARY = "apply_rotary_pos_emb"
_gates: dict[type, Callable[..., Any]] = {}  # by activation


@cache  # torch.compile keeps a few variants per function, however many models a process has
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function)


class _Fused:
    """A compiled function that is the plain one again once it cannot be compiled."""

    def __init__(self, function: Callable[..., Any], compiler: Callable[..., Any]) -> None:
        self._function = function
        self._run = compiler(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._run(*args, **kwargs)
        except Exception:
            if self._run is self._function:
                raise
            name = self._function.__qualname__
            logger.warning("%s cannot be compiled and runs as it is", name, exc_info=True)
            self._run = self._function
            return self._function(*args, **kwargs)


def compile_elementwise(
    model: nn.Module, compiler: Callable[..., Any] = _compiled
) -> list[nn.Module]:
    """Compile the model's norms, rotary embedding and gated activation.

    Only the model's own modules change, not their classes, and a module whose code is not of the
    known form stays as it is.

    Returns:
        The changed modules; `del module.forward` undoes one.
    """
    fused: dict[Any, _Fused] = {}  # one compilation serves all layers
    changed: list[nn.Module] = []

    def shared(key: Any, function: Callable[..., Any]) -> _Fused:
        if key not in fused:
            fused[key] = _Fused(function, compiler)
        return fused[key]

    for module in model.modules():
        forward: Any = type(module).forward
        code = getattr(forward, "__code__", None)
        if code is None:
            continue
        if type(module).__name__.endswith("RMSNorm"):
            new = partial(shared(forward, forward), module)
        elif has_code(module, GATED_MLP):
            act: Any = module.act_fn
            if any(True for _ in act.parameters()):
                continue
            new = partial(_gated_mlp, module, shared(type(act), _gate_of(act)))
        elif _ROTARY in code.co_names:
            rotary = forward.__globals__[_ROTARY]
            new = partial(_with_global(forward, _ROTARY, shared(rotary, rotary)), module)
        else:
            continue
        module.forward = new
        changed.append(module)
    return changed


def use_cpu_kernels(model: nn.Module) -> list[nn.Module]:
    """Compute Llama-like norms of 16-bit models on the CPU by one kernel each.

    Returns:
        The changed modules; `del module.forward` undoes one.
    """
    changed: list[nn.Module] = []
    for module in model.modules():
        if not has_code(module, RMS_NORM):
            continue
        norm: Any = module
        weight = norm.weight.detach()
        if weight.element_size() == 2 and cpu_team.supports(weight):
            norm.forward = partial(
                _norm, norm, RmsNorm(weight, norm.variance_epsilon), weight.dtype
            )
            changed.append(module)
    return changed


def _norm(module: Any, kernel: RmsNorm, dtype: torch.dtype, x: torch.Tensor) -> Any:
    if x.dtype == dtype and x.is_contiguous():
        return kernel(x)
    return type(module).forward(module, x)


def _gate_of(act: Callable[..., Any]) -> Callable[..., Any]:
    """The product in a gated MLP, the same function for all activations of one class."""

    def gate(gated: torch.Tensor, up: torch.Tensor) -> Any:
        return act(gated) * up

    return _gates.setdefault(type(act), gate)


def _gated_mlp(module: Any, gate: Callable[..., Any], x: torch.Tensor) -> Any:
    """LlamaMLP.forward with its product as one function."""
    return module.down_proj(gate(module.gate_proj(x), module.up_proj(x)))


def _with_global(function: Any, name: str, value: Any) -> Any:
    """Copy a function, with another meaning of one global name."""
    changed = FunctionType(
        function.__code__,
        {**function.__globals__, name: value},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed
