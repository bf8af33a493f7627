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

from neuroada_serve.engine.faults import is_device_fault
from neuroada_serve.engine.known_code import GATED_MLP, RMS_NORM, has_code
from neuroada_serve.engine.memory import is_out_of_memory
from neuroada_serve.engine.retry import Retry
from neuroada_serve.ops import cpu_team
from neuroada_serve.ops.cpu_norm import RmsNorm

logger = logging.getLogger(__name__)

_ROTARY = "apply_rotary_pos_emb"
_FIRST_PAUSE, _LONGEST_PAUSE = 4096, 1 << 20  # calls; a step makes a few for each layer
_gates: dict[type, Callable[..., Any]] = {}  # by activation


@cache  # torch.compile keeps a few variants per function, however many models a process has
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function)


class _Fused:
    """A compiled function; the plain one while it cannot be compiled, which is tried again after a
    pause."""

    def __init__(self, function: Callable[..., Any], compiler: Callable[..., Any]) -> None:
        self._function = function
        self._compiled = compiler(function)
        self.retry = Retry(_FIRST_PAUSE, _LONGEST_PAUSE)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.retry.pass_turn()
        if not self.retry.is_due:
            return self._function(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except Exception as error:
            if is_device_fault(error) or is_out_of_memory(error):
                raise
            result = self._function(*args, **kwargs)  # if it fails as well, that is the failure
            self.retry.fail()
            name = self._function.__qualname__
            logger.warning(
                "%s cannot be compiled and runs as it is; it is tried again %s",
                *(name, self.retry),
                exc_info=True,
            )
            return result


class Elementwise:
    """The parts of a model that have been compiled.

    modules: those that have changed; `del module.forward` undoes one.
    """

    def __init__(self, compiler: Callable[..., Any]) -> None:
        self.modules: list[nn.Module] = []
        self._compiler = compiler
        self._functions: dict[Any, _Fused] = {}  # one compilation serves all layers

    @property
    def num_failed_compilations(self) -> int:
        """Times that a part could not be compiled, or failed when it was first run."""
        return sum(function.retry.num_failed for function in self._functions.values())

    def shared(self, key: Any, function: Callable[..., Any]) -> _Fused:
        """Return the compiled function of this key."""
        if key not in self._functions:
            self._functions[key] = _Fused(function, self._compiler)
        return self._functions[key]


def compile_elementwise(model: nn.Module, compiler: Callable[..., Any] = _compiled) -> Elementwise:
    """Compile the model's norms, rotary embedding and gated activation.

    Only the model's own modules change, not their classes, and a module whose code is not of the
    known form stays as it is.
    """
    fused = Elementwise(compiler)
    for module in model.modules():
        forward: Any = type(module).forward
        code = getattr(forward, "__code__", None)
        if code is None:
            continue
        if type(module).__name__.endswith("RMSNorm"):
            new = partial(fused.shared(forward, forward), module)
        elif has_code(module, GATED_MLP):
            act: Any = module.act_fn
            if any(True for _ in act.parameters()):
                continue
            new = partial(_gated_mlp, module, fused.shared(type(act), _gate_of(act)))
        elif _ROTARY in code.co_names:
            rotary = forward.__globals__[_ROTARY]
            new = partial(_with_global(forward, _ROTARY, fused.shared(rotary, rotary)), module)
        else:
            continue
        module.forward = new
        fused.modules.append(module)
    return fused


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
