"""Frozen linear layers with room for bypasses, and the way a step's plan reaches them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_serve.model.loader import adaptable_modules, is_transposed, matrix_shape
from neuroada_serve.ops.bypass import BypassTable, bypass_add_
from neuroada_serve.ops.held_values import HeldValues
from neuroada_serve.ops.matrix import (
    DenseMatrix,
    FrozenMatrix,
    PackedMatrix,
    frozen_matrix,
    multiply_in_pieces,
    packed_matrix,
    packs_faster,
)
from neuroada_serve.ops.step_plan import StepPlan

# Layers of one parent that read the same input in every model that has them.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


# Rows of a product where all have one shape (`attach_bypass`). So many decodes cost what one does,
# since the weights must be read; of prompts, more at once are faster and padding is dearer
# (bench/LOG.md).
DECODE_ROWS, PROMPT_ROWS = 32, 64


class BypassContext:
    """Carries the running forward's plan to the layers of one model.

    fixed_shapes: multiply in pieces of DECODE_ROWS and PROMPT_ROWS.
    """

    def __init__(self, fixed_shapes: bool = False) -> None:
        self.plan: StepPlan | None = None
        self.fixed_shapes = fixed_shapes
        self._num_decodes = 0

    @contextmanager
    def applying(self, plan: StepPlan, num_decodes: int = 0) -> Iterator[None]:
        """Apply a plan in every layer until the block ends; refuse nesting.

        Args:
            num_decodes: of its tokens, which come first; the others are of prompts.
        """
        assert self.plan is None, "a forward is already running on this model"
        self.plan, self._num_decodes = plan, num_decodes
        try:
            yield
        finally:
            self.plan = None

    def multiply(self, matrix: FrozenMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product for x [tokens, d_in] of the running forward."""
        if not self.fixed_shapes:
            return matrix.multiply(x, bias)
        decodes, prompts = x[: self._num_decodes], x[self._num_decodes :]
        sizes = ((decodes, DECODE_ROWS), (prompts, PROMPT_ROWS))
        parts = [multiply_in_pieces(matrix, part, bias, n) for part, n in sizes if len(part)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class BypassSite:
    """Linear layers that read the same input, multiplied as one matrix.

    Args:
        members: name -> layer, in the order of their rows; only a lone one may be transposed.
        context: has the running forward's plan.
        pack: store the matrix the way that is fastest here; the layers keep no weight then.
    """

    def __init__(
        self, members: Mapping[str, nn.Module], context: BypassContext, pack: bool = False
    ) -> None:
        self.name = next(iter(members))
        self.rows: dict[str, slice] = {}
        start = 0
        for name, member in members.items():
            self.rows[name] = slice(start, start + matrix_shape(member)[0])
            start = self.rows[name].stop
        self._d_out = start
        self._context = context
        first = members[self.name]
        weight = _joined([m.weight for m in members.values()])
        assert weight is not None
        self.bias = _joined([m.bias for m in members.values()])
        transposed = is_transposed(first)
        self.matrix: FrozenMatrix = (
            frozen_matrix(weight, transposed) if pack else DenseMatrix(weight, transposed)
        )
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._unread: set[str] = set()

    @property
    def d_outs(self) -> dict[str, int]:
        """Modules with their number of rows, in order."""
        return {name: rows.stop - rows.start for name, rows in self.rows.items()}

    def output(self, name: str, x: Tensor) -> Tensor:
        """Return one member's y [..., d_out] for x [..., d_in]; the first call computes all
        members."""
        if x is not self._input or name not in self._unread:
            self._output = self._forward(x)
            self._input, self._unread = x, set(self.rows)
        assert self._output is not None
        y = self._output if len(self.rows) == 1 else self._output[..., self.rows[name]]
        self._unread.remove(name)
        if not self._unread:
            self._input = self._output = None
        return y

    def _forward(self, x: Tensor) -> Tensor:
        plan = self._context.plan
        if plan is None:
            return self.matrix.multiply(x, self.bias)
        tokens = x.view(-1, x.shape[-1])
        if plan.runs:
            y = self._multiply_runs(tokens, plan)
        else:
            y = self._context.multiply(self.matrix, tokens, self.bias)
        for table, token_slots in plan.calls(self.name):
            rows = y if table.d_out == self._d_out else y[:, table.rows]
            bypass_add_(rows, tokens, table, token_slots)
        return y.view(*x.shape[:-1], -1)

    def _multiply_runs(self, x: Tensor, plan: StepPlan) -> Tensor:
        """Multiply x [tokens, d_in], each run by a weight and a bias that hold its values."""
        y = x.new_empty(len(x), self._d_out)
        done = 0
        with HeldValues(self.matrix).for_a_while() as held:
            for run in plan.runs:
                if run.start > done:
                    held.release()
                    self.matrix.multiply(x[done : run.start], self.bias, y[done : run.start])
                adds = run.added(self.name)
                held.hold(adds)
                rows = slice(run.start, run.stop)
                self.matrix.multiply(x[rows], self._bias_with(adds), y[rows])
                done = run.stop
        if done < len(x):
            self.matrix.multiply(x[done:], self.bias, y[done:])
        return y

    def _bias_with(self, adds: Sequence[tuple[BypassTable, int, int]]) -> Tensor | None:
        """Return the bias with values added, summed in float32 and rounded once."""
        adds = [add for add in adds if add[0].index is None]
        if not adds or self.bias is None:
            return self.bias
        total = self.bias.to(torch.float32, copy=True)
        for table, slot, sign in adds:
            total[table.rows] += sign * table.bypass[slot, :, 0].float()
        return total.to(self.bias.dtype)


class BypassLinear(nn.Module):
    """A layer y = W x + b with each token's bypass on top; its share of a BypassSite.

    Its weight changes only by merging, see `model/merge.py`. Where the site's matrix is packed,
    `weight` is a copy made when asked for, and stands in `state_dict` like any other.
    """

    bias: Tensor | None

    def __init__(self, base: nn.Module, name: str, site: BypassSite) -> None:
        super().__init__()
        self.name = name
        self.site = site
        self._rows = site.rows[name]
        self.d_out, self.d_in = matrix_shape(base)
        self.register_parameter("bias", base.bias if isinstance(base.bias, nn.Parameter) else None)
        if self.bias is not None and site.bias is not None:  # merging changes the site's
            self.bias.data = site.bias[self._rows]
        self._packed = isinstance(site.matrix, PackedMatrix)
        self._transposed = is_transposed(base)
        if not self._packed:
            assert isinstance(base.weight, nn.Parameter)
            if len(site.rows) > 1:  # the layer's rows of the common matrix
                base.weight.data = site.matrix.dense()[self._rows]
            self.weight = base.weight

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._packed:
            weight = self.site.matrix.dense()[self._rows]
            return weight.t().contiguous() if self._transposed else weight
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        return self.site.matrix.entries.device

    def forward(self, x: Tensor) -> Tensor:
        return self.site.output(self.name, x)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed:
            destination[prefix + "weight"] = self.weight


class PackedLinear(nn.Module):
    """A frozen linear layer without a bypass, on a packed copy of its weight where that is faster:
    the output head.

    The weight itself stays, since the input embedding may be the same tensor.

    Args:
        fixed_shapes: multiply in pieces of DECODE_ROWS.
    """

    bias: Tensor | None

    def __init__(self, base: nn.Linear, fixed_shapes: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.matrix: FrozenMatrix = (
            packed_matrix(base.weight) if packs_faster(base.weight) else DenseMatrix(base.weight)
        )
        self._fixed_shapes = fixed_shapes

    def forward(self, x: Tensor) -> Tensor:
        if not self._fixed_shapes:
            return self.matrix.multiply(x, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        y = multiply_in_pieces(self.matrix, rows, self.bias, DECODE_ROWS)
        return y.view(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class AttachedBypass:
    """The layers that `attach_bypass` put into a model.

    layers: by module name.
    sites: site -> its modules in the order of their rows, with their d_out.
    context: hands a forward's plan to the layers.
    """

    layers: Mapping[str, BypassLinear]
    sites: Mapping[str, Mapping[str, int]]
    context: BypassContext


def attach_bypass(model: Any, fixed_shapes: bool = False) -> AttachedBypass:
    """Replace every adaptable module of the model, and its output head where that is faster.

    Layers that read the same input are multiplied together. On the CPU, bf16 weights are packed;
    the model then has no plain copy of them.

    Args:
        fixed_shapes: have every product in one of two shapes, so that a token's result does not
            depend on how many others there are.
    """
    context = BypassContext(fixed_shapes)
    modules = adaptable_modules(model)
    layers: dict[str, BypassLinear] = {}
    sites: dict[str, dict[str, int]] = {}
    for names in _groups(modules):
        site = BypassSite({name: modules[name] for name in names}, context, pack=True)
        sites[site.name] = site.d_outs
        for name in names:
            layers[name] = BypassLinear(modules.pop(name), name, site)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[name])
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and (fixed_shapes or packs_faster(head.weight)):
        model.set_output_embeddings(PackedLinear(head, fixed_shapes))
    return AttachedBypass(layers, sites, context)


def plain_layers(model: nn.Module) -> dict[str, BypassLinear]:
    """Return a BypassLinear on the parameters of every adaptable module; the model stays as it
    is."""
    context = BypassContext()
    return {
        name: BypassLinear(module, name, BypassSite({name: module}, context))
        for name, module in adaptable_modules(model).items()
    }


def _joined(tensors: Sequence[Any]) -> Tensor | None:
    """Put weights or biases one below the other; a single one is not copied; without any return
    None."""
    parts = [t.detach() for t in tensors if isinstance(t, Tensor)]
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None


def _groups(modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Group the names of all modules by what can be multiplied as one matrix."""
    groups: dict[str, list[str]] = {}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        alike = next((same for same in _SAME_INPUT if child in same), None)
        if alike is None or is_transposed(module):
            groups[name] = [name]
            continue
        bias = module.bias is not None
        weight = module.weight
        key = f"{parent}.{alike[0]} {matrix_shape(module)[1]} {bias} {weight.dtype} {weight.device}"
        groups.setdefault(key, []).append(name)
    return list(groups.values())
