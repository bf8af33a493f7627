"""Compare two checkpoints of one architecture."""

from typing import Any

import torch
from torch import Tensor

from neuroada_serve.errors import ModelError
from neuroada_serve.model.loader import BaseModel, adaptable_modules, matrix_shape


def check_same_architecture(base: BaseModel, model: Any, name: str) -> None:
    """Refuse a model that is not of the base's architecture.

    Raises:
        ModelError: the model, of this name, is of another kind than the base, or has other layers.
    """
    ours, theirs = base.model.config.model_type, model.config.model_type
    if ours != theirs:
        raise ModelError(f"{name!r} is a {theirs} model, {base.spec.name!r} a {ours}")
    shapes = {module: matrix_shape(m) for module, m in adaptable_modules(model).items()}
    for module in sorted(base.spec.shapes.keys() | shapes.keys()):
        expected, found = base.spec.shapes.get(module), shapes.get(module)
        if expected != found:
            raise ModelError(
                f"{name!r} is not made as {base.spec.name!r} is: {module} is "
                f"{list(found) if found else 'absent'}, not "
                f"{list(expected) if expected else 'absent'}"
            )


def bias_difference(ours: Any, theirs: Any) -> Tensor | None:
    """Return the difference of two layers' biases, [d_out] float32; None where they are equal."""
    if ours.bias is None or theirs.bias is None:
        return None
    difference: Tensor = theirs.bias.detach().float() - ours.bias.detach().float()
    return difference if bool((difference != 0).any()) else None


def other_differences(base: Any, tuned: Any) -> list[str]:
    """Return the names of parameters that differ and that an adapter cannot change."""
    ours, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    adapted = {f"{m}.{kind}" for m in adaptable_modules(base) for kind in ("weight", "bias")}
    return [
        name
        for name in sorted((ours.keys() | theirs.keys()) - (adapted & ours.keys() & theirs.keys()))
        if name not in ours
        or name not in theirs
        or ours[name].shape != theirs[name].shape
        or not torch.equal(ours[name].float(), theirs[name].float())
    ]
