"""The sampler: the next token of each sequence from its logits.

All rows of a step go through one pass on the logits' device; parameters become tensors, and a row
costs only what its own parameters ask for. In the usual case the host waits once, for the tokens.

The vocabulary is searched in two steps, blocks first and then inside one of them, which costs a CPU
less than an argmax, a topk or a running sum over all of it (bench/LOG.md).
"""

import math
import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.request import SamplingParams

_LARGEST = 1e30  # bound of biases: as good as infinite, and sums of them stay finite
_NUCLEUS = 64  # top_p is looked for among this many tokens first; a full sort is slow
_BLOCK = 64  # tokens in a block of the vocabulary, or the largest power of two that divides it
_WIDER = 16  # times as many tokens are looked among where those did not hold the nucleus
_CHUNK = 1 << 20  # logits that a CPU works on at a time: they stay in its cache
_BELOW_ONE = 1 - 2**-53  # times a sum this stays below the sum, so that a draw ends inside it


@dataclass(frozen=True)
class Sampled:
    """A sampled token. logprob and top (id, logprob) are natural logs of the model's own
    distribution, before penalties and temperature; None / empty unless asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Draws:
    """The random numbers of one choice. They do not depend on batch or device."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed % 2**63)
        self._returned: float | None = None

    def next(self) -> float:
        """Return the next number in [0, 1)."""
        uniform, self._returned = self._returned, None
        if uniform is None:
            uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        return uniform

    def rewind(self, uniform: float) -> None:
        """Make the last number the next one again: it has chosen nothing."""
        self._returned = uniform


def new_draws(params: SamplingParams, index: int) -> Draws | None:
    """Return the random numbers of choice `index`; None if it draws none."""
    if params.greedy:
        return None
    return Draws(secrets.randbits(63) if params.seed is None else params.seed + index)


def score(logits: Tensor, token_ids: Seq[int], num_top: int) -> list[Sampled]:
    """Return the logprob of given tokens, and of the num_top most likely ones, per row of
    logits."""
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
        logits: [num_sequences, vocab] float32, contiguous; may be changed.
        sequences: whose rows they are.

    Returns:
        Per row the token, or None where the logits are not finite.

    Where it fails, for want of memory, say, no random number is used up.
    """
    if not sequences:
        return []
    uniforms: dict[int, float] = {}
    try:
        return _sample(logits, sequences, uniforms)
    except BaseException:
        for row, uniform in uniforms.items():
            sequences[row].random.rewind(uniform)
        raise


def _sample(
    logits: Tensor, sequences: Seq[Sequence], uniforms: dict[int, float]
) -> list[Sampled | None]:
    """Sample as `sample` does; `uniforms` gets the random numbers by row."""
    # 1. Every row's best token; a nan or an infinity is the best of its row.
    chosen = _argmax(logits)  # (num_sequences)
    finite = logits.gather(1, chosen.unsqueeze(1)).squeeze(1).isfinite()
    complete = torch.ones_like(finite)

    # 2. Rows that are not simply greedy.
    reported = [i for i, s in enumerate(sequences) if s.params.logprobs is not None]
    originals = logits[reported] if reported else logits[:0]
    adjusted = [i for i, s in enumerate(sequences) if _is_adjusted(s)]
    _adjust_(logits, sequences, adjusted)
    if greedy := [i for i in adjusted if sequences[i].params.greedy]:
        chosen[greedy] = _argmax(logits[greedy])
    for i, sequence in enumerate(sequences):
        if not sequence.params.greedy:
            uniforms[i] = sequence.random.next()
    _draw_(chosen, complete, logits, sequences, uniforms, _NUCLEUS)

    # 3. One transfer. Where a flat distribution cut the nucleus short, look among more tokens.
    token_ids, is_finite, is_complete = torch.stack([chosen, finite, complete]).tolist()
    nucleus = _NUCLEUS
    while short := {i: u for i, u in uniforms.items() if is_finite[i] and not is_complete[i]}:
        nucleus *= _WIDER
        _draw_(chosen, complete, logits, sequences, short, nucleus)
        token_ids, is_complete = torch.stack([chosen, complete]).tolist()

    results = [Sampled(t) if f else None for t, f in zip(token_ids, is_finite, strict=True)]
    if reported:
        num_top = [sequences[i].params.logprobs or 0 for i in reported]
        scores = score(originals, [token_ids[i] for i in reported], max(num_top))
        for i, num, one in zip(reported, num_top, scores, strict=True):
            if is_finite[i]:
                results[i] = Sampled(one.token_id, one.logprob, one.top[:num])
    return results


# --- penalties -------------------------------------------------------------------------------


def _is_penalised(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    )


def _is_adjusted(sequence: Sequence) -> bool:
    """Return whether the next token is chosen from other logits than the model's."""
    params = sequence.params
    too_short = len(sequence.output_token_ids) < params.min_tokens
    return _is_penalised(params) or bool(params.logit_bias) or too_short


def _adjust_(logits: Tensor, sequences: Seq[Sequence], adjusted: Seq[int]) -> None:
    """Apply repetition, presence and frequency penalties, then biases, then bans of end tokens."""
    penalties, biases, bans = _Entries(), _Entries(), _Entries()
    for row in adjusted:
        sequence = sequences[row]
        params = sequence.params
        if _is_penalised(params):
            seen = sequence.count_tokens()
            counts = np.array(seen.counts)
            once = params.presence_penalty * (counts > 0)
            divisor = np.full(len(counts), max(params.repetition_penalty, 1 / _LARGEST))
            penalties.add(
                row, np.array(seen.ids), divisor, once + params.frequency_penalty * counts
            )
        if params.logit_bias:
            if sequence.biases is None:
                values = np.array(list(params.logit_bias.values()), np.float64)
                ids = np.array(list(params.logit_bias), np.int64)
                sequence.biases = ids, values.clip(-_LARGEST, _LARGEST)
            biases.add(row, *sequence.biases)
        if len(sequence.output_token_ids) < params.min_tokens:
            bans.add(row, list(sequence.end_token_ids))

    if penalties:
        at, divisor, minus = penalties.on(logits.device)
        scores = logits[at]
        logits[at] = torch.where(scores > 0, scores / divisor, scores * divisor) - minus
    if biases:
        at, plus = biases.on(logits.device)
        logits[at] += plus
    if bans:
        (at,) = bans.on(logits.device)
        logits[at] = -torch.inf


class _Entries:
    """Single logits of many rows and a value for each, gathered on the host."""

    def __init__(self) -> None:
        self._rows: list[Any] = []
        self._ids: list[Any] = []
        self._values: list[tuple[Any, ...]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, ids: Any, *values: Any) -> None:
        self._rows.append(np.full(len(ids), row))
        self._ids.append(np.asarray(ids, np.int64))
        self._values.append(values)

    def on(self, device: torch.device) -> tuple[Any, ...]:
        """Return ((rows, ids), values, ...) on a device, each [num_entries]."""
        at = tuple(
            torch.from_numpy(np.concatenate(parts)).to(device) for parts in (self._rows, self._ids)
        )
        values = zip(*self._values, strict=True)
        return at, *(torch.from_numpy(np.concatenate(v)).float().to(device) for v in values)


# --- draws -----------------------------------------------------------------------------------


def _num_candidates(params: SamplingParams, vocab: int, nucleus: int) -> int:
    """Return how many tokens to sort for a draw; 0: none, any token is drawn by its id.

    Follows from a row's own parameters, or its draws would depend on the rows beside it.
    """
    if 0 < params.top_k < vocab:
        return min(vocab, max(nucleus, 1 << (params.top_k - 1).bit_length()))
    return min(vocab, nucleus) if params.top_p < 1 else 0


def _draw_(
    chosen: Tensor,
    complete: Tensor,
    logits: Tensor,
    sequences: Seq[Sequence],
    uniforms: Mapping[int, float],
    nucleus: int,
) -> None:
    """Draw one token for some rows by temperature, top_k, top_p and min_p.

    Args:
        chosen: [num_sequences] int64, where the tokens go.
        complete: [num_sequences] bool, becomes False where top_p reaches beyond `nucleus`.
        logits: [num_sequences, vocab] float32.
        sequences: whose rows they are.
        uniforms: row -> a number in [0, 1), for the rows to draw.
        nucleus: how many tokens to look for top_p among.
    """
    vocab = logits.shape[1]
    groups: dict[int, list[int]] = {}
    for row in uniforms:
        num = _num_candidates(sequences[row].params, vocab, nucleus)
        groups.setdefault(num, []).append(row)
    for num, group in groups.items():
        size = max(1, _CHUNK // vocab) if logits.device.type == "cpu" else len(group)
        for start in range(0, len(group), size):
            rows = group[start : start + size]
            params = [sequences[row].params for row in rows]
            table = [
                [max(p.temperature, 1 / _LARGEST) for p in params],
                [p.top_k if 0 < p.top_k < vocab else vocab for p in params],
                [p.top_p for p in params],
                [p.min_p for p in params],
                [uniforms[row] for row in rows],
            ]
            columns = torch.tensor(table, dtype=torch.float64, device=logits.device).unsqueeze(2)
            temperature, top_k, top_p, min_p, uniform = columns  # (num_rows, 1) each
            at = torch.tensor(rows, device=logits.device)
            weights = _weigh_(logits.index_select(0, at), temperature.float())
            if num:
                drawn = _draw_from_best(weights, num, top_k, top_p, min_p, uniform)
                chosen[at], complete[at] = drawn
                continue
            if any(p.min_p for p in params):
                weights *= weights >= min_p.float()
            chosen[at] = _draw_from_all(weights, uniform)


def _weigh_(rows: Tensor, temperature: Tensor) -> Tensor:
    """Turn logits into weights, in place: probabilities times a constant of the row.

    The best token weighs 1. Measured from it, the lowest temperatures give -inf and 0, never nan.
    """
    rows -= rows.amax(-1, keepdim=True)
    rows /= temperature
    return rows.exp_()


def _draw_from_all(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens from weights [num_rows, vocab] by the inverse of their running sum."""
    blocks = _blocks(weights)  # (num_rows, num_blocks, size)
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    target = uniform * cumulative[:, -1:]
    block = _position(cumulative, target)
    # Where the target lies within its block, as a share: sums of blocks are rounded.
    own = sums.gather(1, block)
    share = (target - cumulative.gather(1, block) + own) / own
    inside = _pick(blocks, block).double().cumsum(-1)
    token = _position(inside, share.clamp(0, _BELOW_ONE) * inside[:, -1:])
    return (block * blocks.shape[2] + token).squeeze(1)


def _draw_from_best(
    weights: Tensor, num: int, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw tokens from the num of largest weight; return them, and whether these hold all that
    top_p keeps.

    Parameters are [num_rows, 1].
    """
    vocab = weights.shape[1]
    values, ids = _topk(weights, num)
    # Equal values come in the order of their ids, on every device.
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).double().sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)

    within = torch.arange(num, device=weights.device) < top_k
    values = values * within
    everything = weights.sum(-1, keepdim=True).double()
    total = torch.where(top_k < vocab, values.sum(-1, keepdim=True), everything)
    nucleus = (values.cumsum(-1) - values) / total < top_p
    complete = (top_k < vocab) | ~nucleus[:, -1:] | (num == vocab)
    keep = within & nucleus & (values >= min_p)  # the first ones of each row
    cumulative = (values * keep).cumsum(-1)
    token = _position(cumulative, uniform * cumulative[:, -1:])
    return ids.gather(1, token).squeeze(1), complete.squeeze(1)


def _position(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return where the running sum of each row first exceeds the target: [num_rows, 1]."""
    at = torch.searchsorted(cumulative, target, right=True)
    return at.clamp(max=cumulative.shape[1] - 1)  # rows that are not finite


# --- searches in two steps -------------------------------------------------------------------


def _blocks(rows: Tensor) -> Tensor:
    """Return a view [num_rows, num_blocks, size]."""
    num_rows, vocab = rows.shape
    size = math.gcd(vocab, _BLOCK)
    return rows.view(num_rows, vocab // size, size)


def _pick(blocks: Tensor, at: Tensor) -> Tensor:
    """Return one block of each row, [num_rows, size]; at is [num_rows, 1]."""
    return blocks.gather(1, at.unsqueeze(2).expand(-1, -1, blocks.shape[2])).squeeze(1)


def _argmax(rows: Tensor) -> Tensor:
    """Return the best token of each row; nan counts as the best."""
    blocks = _blocks(rows)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    token = _pick(blocks, block).argmax(-1, keepdim=True)
    return (block * blocks.shape[2] + token).squeeze(1)


def _topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row and their ids."""
    blocks = _blocks(rows)
    num_blocks, size = blocks.shape[1:]
    if k * 4 >= num_blocks or size == 1:
        return rows.topk(k, sorted=False)
    # Each of the k largest lies in one of the k blocks with the largest maximums.
    best = blocks.amax(-1).topk(k, sorted=False).indices  # (num_rows, k)
    values = blocks.gather(1, best.unsqueeze(2).expand(-1, -1, size)).flatten(1)
    values, at = values.topk(k, sorted=False)
    return values, best.gather(1, at // size) * size + at % size
