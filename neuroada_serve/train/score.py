"""Examples through the model: batches, the logits that predict answers, and scores made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroada_serve.train.data import Example

_NOT_AN_ANSWER = -100
_PADDING = 0  # any token will do: nothing before it can see it, and nothing it predicts counts


@dataclass(frozen=True)
class Score:
    """How well a model gives the answers of some rows.

    loss: mean negative log likelihood per answer token, end token included, in nats.
    exact_match: share of rows whose every answer token, end token included, is the model's first
        choice after the true ones before it (teacher forcing: what greedy decoding gives).
    """

    loss: float
    exact_match: float


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch, padded on the right.

    No attention mask is needed: under causal attention no token sees the padding behind it.

    Returns:
        input_ids: [rows, width] int64.
        labels: [rows, width] int64; the token itself where it belongs to an answer, else -100.
        first_answer: the first column that holds an answer token.
    """
    width = max(map(len, examples))
    input_ids = torch.full((len(examples), width), _PADDING)
    labels = torch.full((len(examples), width), _NOT_AN_ANSWER)
    for row, example in enumerate(examples):
        start, stop = len(example.prompt_ids), len(example)
        input_ids[row, :stop] = torch.tensor(example.prompt_ids + example.answer_ids)
        labels[row, start:stop] = torch.tensor(example.answer_ids)
    first_answer = min(len(example.prompt_ids) for example in examples)
    return {"input_ids": input_ids, "labels": labels, "first_answer": first_answer}


def answer_logits(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The predictions of a batch's answer tokens. The output head skips what comes before them.

    Returns:
        logits: [answer_tokens, vocabulary] float32, row after row.
        targets: [answer_tokens] int64, the true tokens.
        is_answer: [rows, width - first_answer] bool, where they stand.
    """
    first = batch["first_answer"]
    input_ids = batch["input_ids"]
    keep = input_ids.shape[1] - first + 1  # a token is predicted by the position before it
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=keep).logits
    labels = batch["labels"][:, first:]
    is_answer = labels != _NOT_AN_ANSWER
    return logits[:, -keep:-1][is_answer].float(), labels[is_answer], is_answer


@torch.no_grad()
def score(model: Any, examples: Sequence[Example], batch_size: int) -> Score:
    """Score a model on examples, in eval mode; the model is left in that mode.

    Batches are made of rows of like length. Sums inside a batch depend on its other rows by the
    usual float error, so the same examples and batch_size always give the same score.

    Args:
        model: a causal LM that takes logits_to_keep.
        examples: at least one.
    """
    model.eval()
    by_length = sorted(examples, key=len)
    device = next(model.parameters()).device
    loss, tokens, exact = 0.0, 0, 0
    for start in range(0, len(by_length), batch_size):
        batch = collate(by_length[start : start + batch_size])
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        logits, targets, is_answer = answer_logits(model, batch)
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        tokens += len(targets)
        right = ~is_answer
        right[is_answer] = logits.argmax(dim=-1) == targets
        exact += int(right.all(dim=1).sum())
    return Score(loss / tokens, exact / len(by_length))
