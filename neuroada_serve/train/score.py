"""Score a model on examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuroada_serve.train.batches import predict
from neuroada_serve.train.examples import Example
from neuroada_serve.train.objectives import Objective


@dataclass(frozen=True)
class Score:
    """A model's score on some rows.

    loss: mean over the targets of the objective's loss.
    figure: see `tasks.Task.figure`.
    """

    loss: float
    figure: float


@torch.no_grad()
def score(model: Any, examples: Sequence[Example], batch_size: int, objective: Objective) -> Score:
    """Score a model on examples, in eval mode; the model is left in that mode.

    Batches are made of rows of like length. Sums inside a batch depend on its other rows by the
    usual float error, so the same examples and batch_size always give the same score.

    Args:
        model: a causal LM of transformers, with the head of the objective's task.
        examples: at least one.
    """
    model.eval()
    by_length = sorted(examples, key=len)
    device = next(model.parameters()).device
    loss, targets = 0.0, 0
    outcomes = []
    for start in range(0, len(by_length), batch_size):
        batch = objective.collate(by_length[start : start + batch_size])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        found = predict(model, batch)
        loss += objective.loss(found).item()
        targets += len(found.targets)
        outcomes.append(objective.outcomes(found))
    return Score(loss / targets, objective.figure(torch.cat(outcomes)))
