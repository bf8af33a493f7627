"""A task's own output head in place of the model's, while it is trained.

A class is then predicted as an answer token is, at the last token of the text: batches and scores
are those of texts, with labels for a vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STD = 0.02  # initializer_range of most models, by which transformers makes its heads


class TaskHead(nn.Module):
    """A linear head that computes in float32, whatever the model computes in.

    weight: [rows, hidden_size] trainable float32, random by the seed.
    output: of the last forward. Some models scale or cap what their own head gives; transformers'
        classifiers do not.
    """

    def __init__(self, rows: int, hidden_size: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self._seed = seed
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, device=device))
        self.output: Tensor | None = None
        self.reset_()

    @torch.no_grad()
    def reset_(self) -> None:
        """Draw the weights anew: the same ones, on every device."""
        generator = torch.Generator().manual_seed(self._seed)
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * _STD)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            self.output = F.linear(x.float(), self.weight)
        return self.output


@contextmanager
def task_head(model: Any, rows: int, seed: int) -> Iterator[TaskHead | None]:
    """Give a causal LM a head of so many rows inside a block; with 0 rows it keeps its own."""
    if rows == 0:
        yield None
        return
    own = model.get_output_embeddings()
    head = TaskHead(rows, own.in_features, seed, own.weight.device)
    model.set_output_embeddings(head)
    try:
        yield head
    finally:
        model.set_output_embeddings(own)
