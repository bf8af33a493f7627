"""Check every case against the reference op, before anything is timed.

In float32 the greedy tokens of a case must be those of the same engine with `bypass_add_` replaced
by `bypass_add_reference`. If two tokens are equally likely within a tolerance, either is right, and
the comparison of that request ends there. In the dtype that is timed only the first prefill and
decode step are compared. In both, the log probabilities of the likeliest tokens must agree: the
mean difference of each request must be within a tolerance. The reference always runs unmerged, so a
merged case checks the merge too.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor

import neuroada_serve.adapters.bank as bank
import neuroada_serve.model.bypass_linear as bypass_linear
from neuroada_serve.benchmark.cases import Case, Work
from neuroada_serve.benchmark.measure import OurEngine
from neuroada_serve.engine.cpu_decoder import CpuDecoder
from neuroada_serve.engine.cuda_graphs import DecodeGraphs
from neuroada_serve.errors import EngineError
from neuroada_serve.ops.bypass import BypassTable, TokenSlots, bypass_add_reference
from neuroada_serve.request import MAX_LOGPROBS, SamplingParams, TokenLogprob

# Largest mean difference of a request's log probabilities (nats). Summing in another order gives
# 1e-5 in float32. In the half dtypes every layer rounds, a merged one at other places than an
# unmerged one, and a kernel at other places than transformers' modules: on the demo base in
# bfloat16 that alone gives up to 0.15 (bench/results/throughput.json). This does not detect every
# missing adapter; float32 does.
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}
# Within this two tokens count as equally likely. A single logit is itself rounded: between 32 and
# 64 to a multiple of 0.25 in bfloat16, and of 1/32 in float16.
TIES = {"float32": 1e-3, "float16": 0.0625, "bfloat16": 0.5}
_REFERENCE_TOKENS = 64  # per call of the reference, which needs tokens * d_out * k floats

Answers = list[list[TokenLogprob]]


@dataclass(frozen=True)
class CaseCheck:
    """Result of checking one case in one dtype."""

    case: str
    dtype: str
    num_tokens: int  # compared
    num_ties: int  # requests whose comparison ended at two equally likely tokens
    num_wrong: int  # requests with a wrong token or log probabilities beyond the tolerance
    largest_difference: float  # of a request's log probabilities in the mean, nats
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.num_wrong == 0


class Checker:
    """Compares cases with the reference, which runs only once for equal work.

    Args:
        engine: the engine to check, in the dtype it was loaded with.
        steps: maximum number of tokens per request.
    """

    def __init__(self, engine: OurEngine, steps: int) -> None:
        self._engine = engine
        self._steps = steps
        self._expected: dict[Work, Answers] = {}

    def check(self, case: Case, works: Sequence[Work]) -> CaseCheck:
        """Compare one case with the reference.

        Raises:
            EngineError: a request failed, or the engine did not use the reference op.
        """
        dtype = str(self._engine.base.dtype).removeprefix("torch.")
        tolerance = TOLERANCES[dtype]
        num_tokens = num_ties = num_wrong = 0
        largest = 0.0
        for work in works:
            short = replace(work, output_len=min(self._steps, work.output_len))
            answers = _answers(self._engine, short)
            for ours, theirs in zip(answers, self._reference(short), strict=True):
                compared, difference, tie = _compare(ours, theirs, TIES[dtype])
                num_tokens += compared
                num_ties += tie
                num_wrong += not difference <= tolerance
                largest = max(largest, difference)
        label = f"{case.phase}, {case.concurrency} at once, {case.label}"
        return CaseCheck(label, dtype, num_tokens, num_ties, num_wrong, largest, tolerance)

    def _reference(self, work: Work) -> Answers:
        unmerged = replace(work, merged=False)
        if unmerged not in self._expected:
            with reference_op() as calls:
                self._expected[unmerged] = _answers(self._engine, unmerged, calls)
        return self._expected[unmerged]


@contextmanager
def reference_op() -> Iterator[list[int]]:
    """Make layers use the reference op for all tokens in the block.

    Yields a list that collects the number of tokens of each call. Everything that bypasses the op
    is off: values written into the weights for long runs of one adapter, recorded CUDA graphs, and
    kernels for whole steps.
    """
    calls: list[int] = []

    def bypass_add_(y: Tensor, x: Tensor, table: BypassTable, token_slots: TokenSlots) -> None:
        calls.append(len(token_slots.slots))
        for start in range(0, len(token_slots.slots), _REFERENCE_TOKENS):
            part = slice(start, start + _REFERENCE_TOKENS)
            slots = replace(token_slots, slots=token_slots.slots[part])
            y[part] = bypass_add_reference(y[part], x[part], table, slots)

    changes: list[tuple[Any, str, Any]] = [
        (bypass_linear, "bypass_add_", bypass_add_),
        (bank, "RUN_TOKENS", dict.fromkeys(bank.RUN_TOKENS, sys.maxsize)),
        (DecodeGraphs, "run", lambda *arguments: None),  # this step must run without a graph
        (CpuDecoder, "takes", lambda *arguments: False),  # nor as a kernel
    ]
    kept = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield calls
    finally:
        for (owner, name, _), value in zip(changes, kept, strict=True):
            setattr(owner, name, value)


def _answers(engine: OurEngine, work: Work, calls: list[int] | None = None) -> Answers:
    """Return the greedy tokens of every request, with the log probabilities of the likeliest.

    With `calls` of the reference op, every step must add to them if an adapter is in use.
    """
    params = SamplingParams(
        temperature=0, max_tokens=work.output_len, ignore_eos=True, logprobs=MAX_LOGPROBS
    )
    answers: dict[str, list[TokenLogprob]] = {}
    inner, names = engine.engine, engine.adapter_names(work)
    adapted = any(name is not None for name in names)
    with engine.merged_for(work):
        try:
            for i, (prompt, name) in enumerate(zip(work.prompts, names, strict=True)):
                answers[f"check-{i}"] = []
                inner.add_request(f"check-{i}", prompt, params, name)
            while inner.has_unfinished:
                if calls is not None:
                    calls.clear()
                for output in inner.step():
                    if output.error is not None:
                        raise EngineError(f"a request of the check failed: {output.error}")
                    answers[output.request_id] += output.logprobs
                if adapted and calls == []:
                    raise EngineError("the check is void: a step got around the reference op")
        except BaseException:
            for request_id in answers:
                inner.abort(request_id)
            inner.step()  # hands out the aborted ones, which the engine then discards
            raise
    return list(answers.values())


def _compare(
    ours: Sequence[TokenLogprob], theirs: Sequence[TokenLogprob], tie_within: float
) -> tuple[int, float, bool]:
    """Return (tokens compared, mean difference of log probabilities, whether it ended at a tie).

    The difference is infinite if the reference finds one of our tokens less likely than its own by
    more than `tie_within`.
    """
    differences: list[float] = []
    for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        expected = {token_id: logprob for token_id, _, logprob in b.top}
        differences += [abs(p - expected[i]) for i, _, p in a.top if i in expected]
        if a.token_id != b.token_id:
            tie = b.logprob - expected.get(a.token_id, -math.inf) <= tie_within
            return position + 1, fmean(differences or [math.inf]) if tie else math.inf, tie
    return len(theirs), fmean(differences or [math.inf]), False
