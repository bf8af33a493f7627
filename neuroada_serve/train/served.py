"""Score a served adapter on the held-out rows of the one that is to replace it."""

from pathlib import Path
from typing import Any

import torch

from neuroada_serve.adapters.format import Adapter
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.adapters.select import Selection
from neuroada_serve.errors import AdapterError
from neuroada_serve.model.loader import BaseModel, adaptable_modules
from neuroada_serve.train.data import TrainingData
from neuroada_serve.train.inplace import inplace_training
from neuroada_serve.train.score import Score, score


def adapter_at(folder: Path, base: BaseModel, digest: str) -> Adapter | None:
    """Load the adapter in a folder; None if it is not the version of this digest, or does not fit
    the base."""
    try:
        adapter = load_adapter(folder, base.spec)
    except (AdapterError, OSError):
        return None
    return adapter if adapter.digest == digest else None


def score_of_adapter(
    base: BaseModel, adapter: Adapter, data: TrainingData, batch_size: int
) -> Score | None:
    """Score an adapter on the held-out rows; None where it is of another task.

    The base's weights change meanwhile, and have their original bits again afterwards.
    """
    if adapter.config.task != data.task or not data.heldout:
        return None
    modules: dict[str, Any] = adaptable_modules(base.model)
    modules = {name: modules[name] for name in adapter.modules}
    device = base.device
    selections = {
        name: Selection(part.index.to(device), None) for name, part in adapter.modules.items()
    }
    biased = any(part.bias is not None for part in adapter.modules.values())
    with (
        data.objective.head(base.model, 0) as head,
        inplace_training(base.model, modules, selections, biased) as layers,
        torch.no_grad(),
    ):
        for name, layer in layers.items():
            layer.value.copy_(adapter.modules[name].bypass)
            bias = adapter.modules[name].bias
            if bias is not None and layer.bias_value is not None:
                layer.bias_value.copy_(bias)
        if head is not None and adapter.head is not None:
            head.weight.copy_(adapter.head)
        return score(base.model, data.heldout, batch_size, data.objective)
