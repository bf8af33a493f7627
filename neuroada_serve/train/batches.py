"""Batches of examples, and the logits that predict their answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuroada_serve.train.examples import Example
from neuroada_serve.train.head import TaskHead

_NOT_AN_ANSWER = -100
_PADDING = 0  # any token will do: nothing before it can see it, and nothing it predicts counts


class Predictions(NamedTuple):
    """A model's predictions of a batch's answer tokens, row after row.

    logits: [answer_tokens, vocabulary] float32; of a task with a head [rows, head_rows].
    targets: [answer_tokens] int64, the true tokens; [rows] float32 where a number is learnt.
    is_answer: [rows, width] bool, where the answer tokens stand.
    """

    logits: Tensor
    targets: Tensor
    is_answer: Tensor


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pad examples on the right to one batch.

    No attention mask is needed: under causal attention no token sees the padding behind it.

    Returns:
        input_ids: [rows, width] int64.
        labels: [rows, width] int64; the token itself where it belongs to an answer, else -100.
        targets: [rows] float32, only where a number is learnt.
    """
    width = max(map(len, examples))
    input_ids = torch.full((len(examples), width), _PADDING)
    labels = torch.full((len(examples), width), _NOT_AN_ANSWER)
    for row, example in enumerate(examples):
        start, stop = len(example.prompt_ids), len(example)
        input_ids[row, :stop] = torch.tensor(example.prompt_ids + example.answer_ids)
        labels[row, start:stop] = torch.tensor(example.answer_ids)
    return {"input_ids": input_ids, "labels": labels} | _targets(examples)


def _targets(examples: Sequence[Example]) -> dict[str, Tensor]:
    targets = [example.target for example in examples if example.target is not None]
    assert len(targets) in (0, len(examples)), "all rows are of one task"
    return {"targets": torch.tensor(targets)} if targets else {}


def collate_packed(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Put examples into a batch one behind the other, without padding.

    Positions start anew with each row; by them transformers keeps rows from seeing each other.

    Returns:
        input_ids, labels, position_ids: [1, tokens] int64.
        targets: [rows] float32, only where a number is learnt.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for example in examples:
        ids += [*example.prompt_ids, *example.answer_ids]
        labels += [_NOT_AN_ANSWER] * len(example.prompt_ids) + list(example.answer_ids)
        positions += range(len(example))
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([values]) for name, values in batch.items()} | _targets(examples)


def predict(model: Any, batch: dict[str, Tensor]) -> Predictions:
    """Predict a batch's answer tokens, and no others: the output head is the widest layer of a
    small model, and its logits are the largest tensor of any."""
    is_answer = batch["labels"] != _NOT_AN_ANSWER
    predicts = is_answer.roll(-1, dims=1)  # each token is predicted by the position before it

    def only_predicting(head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0][predicts],)  # (answer_tokens, hidden)

    # `logits_to_keep` would do the same, but as a mask only in the newest transformers, and as a
    # count it makes the head copy itself once per row.
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(only_predicting)
    try:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    if isinstance(head, TaskHead):
        logits, head.output = head.output, None
    targets = batch["targets"] if "targets" in batch else batch["labels"][is_answer]
    return Predictions(logits.float(), targets, is_answer)


@torch.no_grad()
def packs(model: Any) -> bool:
    """Say whether rows of a packed batch keep from seeing each other in this model."""
    model.eval()
    device = next(model.parameters()).device
    vocabulary = int(model.config.vocab_size)
    logits = []
    for token in (0, 1):  # only the first row differs
        rows = [Example((token,) * 5, (token,)), Example((2 % vocabulary,) * 5, (0,))]
        batch = {name: tensor.to(device) for name, tensor in collate_packed(rows).items()}
        logits.append(predict(model, batch).logits[1])
    return torch.equal(*logits)
