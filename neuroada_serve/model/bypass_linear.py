"""A frozen linear layer with room for bypasses, and the way a batch reaches it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from neuroada_serve.model.loader import adaptable_modules, is_transposed
from neuroada_serve.ops.bypass import TokenSlots, bypass_add_
from neuroada_serve.ops.weights import flat_positions, read_entries, write_entries_


class BypassBatch(Protocol):
    """What one forward adds, module by module; made by the adapter bank."""

    def calls(self, module: str) -> Sequence[tuple[Tensor, Tensor, TokenSlots]]:
        """(index, bypass, token_slots) of each `bypass_add_` that this module needs."""
        ...


class BypassContext:
    """Carries the running forward's batch to the layers of one model."""

    def __init__(self) -> None:
        self._batch: BypassBatch | None = None

    @contextmanager
    def forward_batch(self, batch: BypassBatch) -> Iterator[None]:
        """Apply `batch` in every layer until the block ends. Refuses nesting."""
        assert self._batch is None, "a forward is already running on this model"
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def calls(self, module: str) -> Sequence[tuple[Tensor, Tensor, TokenSlots]]:
        return () if self._batch is None else self._batch.calls(module)


class BypassLinear(nn.Module):
    """y = W x + b, and each token's bypass on top.

    Holds the very parameters of the layer it replaces, under the same names. Its weight changes
    only through `write_entries_` (merge and unmerge).
    """

    bias: Tensor | None

    def __init__(self, base: nn.Module, name: str, context: BypassContext) -> None:
        super().__init__()
        assert isinstance(base.weight, nn.Parameter)
        self.weight = base.weight
        self.register_parameter("bias", base.bias if isinstance(base.bias, nn.Parameter) else None)
        self.transposed = is_transposed(base)
        self.name = name
        self._context = context

    @property
    def d_out(self) -> int:
        return int(self.weight.shape[1 if self.transposed else 0])

    @property
    def d_in(self) -> int:
        return int(self.weight.shape[0 if self.transposed else 1])

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        y = F.linear(x, weight, self.bias)
        for call in self._context.calls(self.name):
            bypass_add_(y.view(-1, self.d_out), x.reshape(-1, self.d_in), *call)
        return y

    def positions(self, index: Tensor) -> Tensor:
        """Flat weight positions of index [d_out, k], as [d_out * k] int64."""
        return flat_positions(index.to(self.weight.device), self.weight, self.transposed)

    def read_entries(self, positions: Tensor) -> Tensor:
        return read_entries(self.weight, positions)

    def write_entries_(self, positions: Tensor, values: Tensor) -> None:
        write_entries_(self.weight, positions, values)


def bypass_layers(model: nn.Module, context: BypassContext) -> dict[str, BypassLinear]:
    """A BypassLinear on the parameters of every adaptable module; the model stays as it is."""
    modules = adaptable_modules(model)
    return {name: BypassLinear(module, name, context) for name, module in modules.items()}


def attach_bypass(model: nn.Module) -> tuple[dict[str, BypassLinear], BypassContext]:
    """Replace every adaptable module of the model by a BypassLinear on the same parameters."""
    context = BypassContext()
    layers = bypass_layers(model, context)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layers, context
