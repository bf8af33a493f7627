"""Examples through the model: batches, the logits that predict answers, and scores made of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroada_serve.train.classify import ClassHead
from neuroada_serve.train.correlation import pearson
from neuroada_serve.train.data import Example

_NOT_AN_ANSWER = -100
_PADDING = 0  # any token will do: nothing before it can see it, and nothing it predicts counts


@dataclass(frozen=True)
class Score:
    """How well a model gives the answers of some rows.

    loss: mean negative log likelihood per answer token, end token included, in nats; of a
        regression the mean squared error.
    figure: share of rows whose every answer token is the model's first choice after the true ones
        before it, and at the end any token that ends an answer (teacher forcing: what greedy
        decoding gives); of a classifier, its accuracy; of a regression, Pearson's correlation.
    """

    loss: float
    figure: float


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch, padded on the right.

    No attention mask is needed: under causal attention no token sees the padding behind it.

    Returns:
        input_ids: [rows, width] int64.
        labels: [rows, width] int64; the token itself where it belongs to an answer, else -100.
        targets: [rows] float32, of a regression alone.
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
    """A batch without padding: all rows one behind the other.

    Positions start anew with each row; by them transformers keeps rows from seeing each other.

    Returns:
        input_ids, labels, position_ids: [1, tokens] int64.
        targets: [rows] float32, of a regression alone.
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


def answer_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The predictions of a batch's answer tokens, and of no others: the output head is the widest
    layer of a small model, and its logits the largest tensor of any.

    Returns:
        logits: [answer_tokens, vocabulary] float32, row after row; of a classifier [rows, labels].
        targets: [answer_tokens] int64, the true tokens; of a regression [rows] float32.
        is_answer: [rows, width] bool, where they stand.
    """
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
    if isinstance(head, ClassHead):
        logits, head.output = head.output, None
    targets = batch["targets"] if "targets" in batch else batch["labels"][is_answer]
    return logits.float(), targets, is_answer


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over answer tokens: what `answer_logits` gives as a loss, see `Score`."""
    if targets.is_floating_point():
        return (logits.squeeze(1) - targets).square().sum()
    return F.cross_entropy(logits, targets, reduction="sum")


@torch.no_grad()
def score(
    model: Any, examples: Sequence[Example], batch_size: int, eos_token_ids: Collection[int] = ()
) -> Score:
    """Score a model on examples, in eval mode; the model is left in that mode.

    Batches are made of rows of like length. Sums inside a batch depend on its other rows by the
    usual float error, so the same examples and batch_size always give the same score.

    Args:
        model: a causal LM of transformers.
        examples: at least one.
        eos_token_ids: tokens that end an answer as well as the one an example has.
    """
    model.eval()
    by_length = sorted(examples, key=len)
    device = next(model.parameters()).device
    classifies = isinstance(model.get_output_embeddings(), ClassHead)  # labels, not tokens
    ends = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
    loss, tokens, exact = 0.0, 0, 0
    numbers: list[tuple[Tensor, Tensor]] = []  # given and true, of a regression
    for start in range(0, len(by_length), batch_size):
        batch = collate(by_length[start : start + batch_size])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits, targets, is_answer = answer_logits(model, batch)
        loss += answer_loss(logits, targets).item()
        tokens += len(targets)
        if targets.is_floating_point():
            numbers.append((logits.squeeze(1), targets))
            continue
        chosen = logits.argmax(dim=-1)
        matches = chosen == targets
        if not classifies:
            last = is_answer.sum(dim=1).cumsum(dim=0) - 1  # where each row's answer ends
            matches[last] |= torch.isin(chosen[last], ends)
        right = ~is_answer
        right[is_answer] = matches
        exact += int(right.all(dim=1).sum())
    if numbers:
        given, true = (torch.cat(side).tolist() for side in zip(*numbers, strict=True))
        return Score(loss / tokens, pearson(given, true))
    return Score(loss / tokens, exact / len(by_length))


@torch.no_grad()
def packs(model: Any) -> bool:
    """Whether rows of a packed batch keep from seeing each other in this model."""
    model.eval()
    device = next(model.parameters()).device
    vocabulary = int(model.config.vocab_size)
    logits = []
    for token in (0, 1):  # only the first row differs
        rows = [Example((token,) * 5, (token,)), Example((2 % vocabulary,) * 5, (0,))]
        batch = {name: tensor.to(device) for name, tensor in collate_packed(rows).items()}
        logits.append(answer_logits(model, batch)[0][1])
    return torch.equal(*logits)
