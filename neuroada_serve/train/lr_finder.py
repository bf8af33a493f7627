"""Find a learning rate: try a few for some steps each, from the same start."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.train.data import TrainingData
from neuroada_serve.train.examples import Example
from neuroada_serve.train.head import TaskHead
from neuroada_serve.train.loop import Layers, Loop, Notify, values_of
from neuroada_serve.train.processes import current
from neuroada_serve.train.score import score

_FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the default
_STEPS = 20
_ROWS = 64  # scored after each


@dataclass(frozen=True)
class LearningRates:
    """The result of a search.

    tried: in ascending order. losses: after `steps` steps with each, None where it diverged.
    scored: "held-out" or "training" rows. best: the rate with the lowest loss.
    """

    tried: Sequence[float]
    losses: Sequence[float | None]
    steps: int
    scored: str
    best: float


def find_learning_rate(
    model: Any,
    layers: Layers,
    data: TrainingData,
    config: TrainConfig,
    notify: Notify,
    head: TaskHead | None = None,
) -> LearningRates:
    """Try learning rates around the default for 20 steps each; values are 0 before and after.

    A task's head learns at its own rate with each, and begins anew.

    Each trial is a small run with warm-up and decline, on the same batches, judged by the loss of
    held-out rows, or of training rows where none are held out.

    Raises:
        UsageError: the loss stopped being a number with every rate.
    """
    rows: Sequence[Example] = data.heldout[:_ROWS] or data.train[:_ROWS]
    scored = "held-out" if data.heldout else "training"
    tried = [min(1.0, factor * config.peak_lr) for factor in _FACTORS]
    losses: list[float | None] = []
    for lr in tried:
        once = replace(config, lr=lr)
        loop = Loop(model, layers, data.train, data.objective, once, _STEPS, head)
        try:
            loop.run(lambda: False, lambda message: None, f"lr {lr:.2g}")
            loss = score(model, rows, config.batch_size, data.objective).loss
        except UsageError:
            loss = math.nan
        [loss] = current().of_first([loss], next(model.parameters()).device)
        losses.append(loss if math.isfinite(loss) else None)
        told = "diverges" if losses[-1] is None else f"{scored} loss {loss:.4f}"
        notify(f"lr {lr:.2g}: {told} after {_STEPS} steps.")
        with torch.no_grad():
            for value in values_of(layers).values():
                value.zero_()
            if head is not None:
                head.reset_()
    known = [(loss, lr) for loss, lr in zip(losses, tried, strict=True) if loss is not None]
    if not known:
        raise UsageError("training diverges with every learning rate tried; try --dtype float32")
    best = min(known)[1]
    notify(f"Taking lr {best:.2g}.")
    return LearningRates(tried, losses, _STEPS, scored, best)
