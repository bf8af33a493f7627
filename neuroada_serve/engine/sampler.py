"""The next token of each sequence from its logits."""

import secrets
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.request import SamplingParams

_LARGEST = 1e30  # bound of biased logits: as good as infinite, and sums of them stay finite
_NUCLEUS = 1024  # top_p is looked for among this many tokens first; a full sort is slow


@dataclass(frozen=True)
class Sampled:
    """One token; logprob and top (id, logprob) are natural logs of the model's own distribution,
    before penalties and temperature, and None / empty unless asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def new_generator(params: SamplingParams, index: int) -> torch.Generator | None:
    """The random numbers of choice `index`; they do not depend on batch or device."""
    if params.greedy:
        return None
    generator = torch.Generator("cpu")
    seed = secrets.randbits(63) if params.seed is None else params.seed + index
    return generator.manual_seed(seed % 2**63)


def score(logits: Tensor, token_ids: Seq[int], num_top: int) -> list[Sampled]:
    """The logprob of given tokens, and of the num_top most likely ones, per row of logits."""
    logprobs = logits.log_softmax(-1)
    wanted = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    own = logprobs.gather(1, wanted).squeeze(1).tolist()
    values, ids = logprobs.topk(num_top)
    rows = zip(token_ids, own, ids.tolist(), values.tolist(), strict=True)
    return [Sampled(t, p, tuple(zip(i, v, strict=True))) for t, p, i, v in rows]


@torch.inference_mode()  # the runner's logits are its tensors, and change in no other mode
def sample(logits: Tensor, sequences: Seq[Sequence]) -> list[Sampled | None]:
    """Choose one token per row.

    Args:
        logits: [num_sequences, vocab] float32; may be changed.
        sequences: whose rows they are.

    Returns:
        Per row the token, or None where the logits are not finite.
    """
    if not sequences:
        return []
    finite = logits.amax(-1).isfinite().tolist()
    plain = {
        i: logits[i : i + 1].clone()
        for i, s in enumerate(sequences)
        if s.params.logprobs is not None and finite[i]
    }
    for i, sequence in enumerate(sequences):
        if finite[i]:
            _penalise_(logits[i], sequence)
    chosen = logits.argmax(-1).tolist()
    for i, sequence in enumerate(sequences):
        if finite[i] and not sequence.params.greedy:
            chosen[i] = _draw(logits[i], sequence)

    results: list[Sampled | None] = []
    for i, sequence in enumerate(sequences):
        if not finite[i]:
            results.append(None)
        elif i in plain:
            results += score(plain[i], [chosen[i]], sequence.params.logprobs or 0)
        else:
            results.append(Sampled(chosen[i]))
    return results


def _penalise_(row: Tensor, sequence: Sequence) -> None:
    params = sequence.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*sequence.prompt_token_ids, *sequence.output_token_ids}))
        seen = seen.to(row.device)
        scores = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.output_token_ids:
        answered = torch.tensor(sequence.output_token_ids, device=row.device)
        ids, counts = torch.unique(answered, return_counts=True)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        biases = torch.tensor(list(params.logit_bias.values()), device=row.device)
        row[ids] += biases.clamp(-_LARGEST, _LARGEST)
    if len(sequence.output_token_ids) < params.min_tokens:
        row[torch.tensor(sequence.end_token_ids, device=row.device, dtype=torch.int64)] = -torch.inf


def _draw(row: Tensor, sequence: Sequence) -> int:
    """One token by temperature, top_k, top_p and min_p; one uniform number per token."""
    params = sequence.params
    uniform = float(torch.rand((), generator=sequence.random, dtype=torch.float64))
    # Bounded and measured from the best token: the lowest temperatures give -inf and 0, never nan.
    row = row.clamp(max=_LARGEST)
    probs = ((row - row.max()) / max(params.temperature, 1 / _LARGEST)).softmax(-1)
    vocab = len(probs)
    limit = params.top_k if 0 < params.top_k < vocab else vocab

    # Candidates, most likely first where a filter needs that order.
    ids: Tensor | None = None
    if limit < vocab or params.top_p < 1:
        probs, ids = _nucleus(probs, limit, params.top_p)
    if params.min_p > 0:
        keep = probs >= params.min_p * probs.max()
        ids = keep.nonzero().squeeze(1) if ids is None else ids[keep]
        probs = probs[keep]
    cumulative = probs.double().cumsum(0)
    at = int(torch.searchsorted(cumulative, cumulative[-1] * uniform, right=True))
    at = min(at, len(probs) - 1)
    return at if ids is None else int(ids[at])


def _nucleus(probs: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The top_k most likely tokens, of those the fewest that have top_p of their probability."""
    if top_k == len(probs):
        # All tokens together have probability 1, so a nucleus that ends early is the nucleus.
        values, ids = probs.topk(min(_NUCLEUS, top_k))
        keep = values.cumsum(0) - values < top_p
        if not bool(keep[-1]):
            return values[keep], ids[keep]
    values, ids = probs.topk(top_k)
    keep = (values.cumsum(0) - values) / values.sum() < top_p
    return values[keep], ids[keep]
