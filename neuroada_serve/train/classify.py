"""A classifier's head in place of the model's own, for as long as it is trained.

A class is then predicted as an answer token is, at the last token of the text; so batches, loss and
scores are those of texts, with labels for a vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STD = 0.02  # initializer_range of most models, by which transformers makes its heads


class ClassHead(nn.Module):
    """Logits of classes, in float32 whatever the model computes in.

    weight: [labels, hidden_size] trainable float32, random by the seed.
    output: of the last forward. Some models scale or cap what their head gives; no classifier of
        transformers does.
    """

    def __init__(self, num_labels: int, hidden_size: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self._seed = seed
        self.weight = nn.Parameter(torch.empty(num_labels, hidden_size, device=device))
        self.output: Tensor | None = None
        self.reset_()

    @torch.no_grad()
    def reset_(self) -> None:
        """Begin anew, with the same random weights on every device."""
        generator = torch.Generator().manual_seed(self._seed)
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * _STD)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            self.output = F.linear(x.float(), self.weight)
        return self.output


@contextmanager
def class_head(model: Any, num_labels: int, seed: int) -> Iterator[ClassHead | None]:
    """Put a head for so many labels into a causal LM for the length of a block; for 0 none."""
    if num_labels == 0:
        yield None
        return
    own = model.get_output_embeddings()
    head = ClassHead(num_labels, own.in_features, seed, own.weight.device)
    model.set_output_embeddings(head)
    try:
        yield head
    finally:
        model.set_output_embeddings(own)
