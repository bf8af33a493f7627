"""Run requests through an engine, and compute figures from the times of their tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from neuroada_serve.benchmark.adapters import magnitude_indices, random_adapter
from neuroada_serve.benchmark.cases import Work
from neuroada_serve.benchmark.settings import OfflineConfig
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.errors import EngineError
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import ModelSource
from neuroada_serve.request import SamplingParams


@dataclass(frozen=True)
class Timeline:
    """Times of the tokens of requests that were all submitted at once.

    token_s: by request, ascending times of its tokens, in seconds since the submission.
    wall_s: time of the whole call, from the submission to its return.
    num_prompt_tokens: of all requests together.
    """

    token_s: tuple[tuple[float, ...], ...]
    wall_s: float
    num_prompt_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of the whole call."""
        return sum(map(len, self.token_s)) / self.wall_s

    @property
    def all_started_s(self) -> float:
        """Time of the last request's first token, after which the engine only decodes."""
        return max(times[0] for times in self.token_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Throughput from `all_started_s` to the last token."""
        stamps = self._decode_stamps
        produced = sum(t > self.all_started_s for times in self.token_s for t in times)
        return produced / (stamps[-1] - stamps[0])

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second, up to `all_started_s`."""
        return self.num_prompt_tokens / self.all_started_s

    @property
    def step_ms(self) -> list[float]:
        """Time of every decode step: between successive moments at which tokens came."""
        return [1000 * float(gap) for gap in np.diff(self._decode_stamps)]

    @property
    def ttft_ms(self) -> list[float]:
        """Time to first token, per request."""
        return [1000 * times[0] for times in self.token_s]

    @property
    def tpot_ms(self) -> list[float]:
        """Time per output token after the first, per request."""
        return [1000 * (times[-1] - times[0]) / (len(times) - 1) for times in self.token_s]

    @cached_property
    def _decode_stamps(self) -> list[float]:
        moments = sorted({t for times in self.token_s for t in times})
        return [t for t in moments if t >= self.all_started_s]


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolate linearly between the two nearest values, as numpy and vLLM do."""
    return float(np.percentile(values, percent))


class Runner(Protocol):
    """An engine that runs work, ours or a peer."""

    name: str

    def run(self, work: Work) -> Timeline: ...


class OurEngine:
    """This package's engine, with random adapters.

    Args:
        source: the base model.
        config: settings for loading the base and making the adapters.
        dtype: of the weights; separate from `config`, as the check runs in float32 too.
        num_adapters: number of adapters of every k.
    """

    name = "neuroada"

    def __init__(
        self, source: ModelSource, config: OfflineConfig, dtype: str, num_adapters: int
    ) -> None:
        base = load_base(source, dtype, config.device)
        self.base = base
        indices = magnitude_indices(base, config.k)
        most = config.max_num_batched_tokens
        settings = EngineConfig(
            dtype=dtype,
            device=config.device,
            max_num_seqs=max(config.concurrency),
            max_model_len=min(config.max_model_len, base.max_model_len),
            max_num_batched_tokens=None if most is None else max(most, *config.concurrency),
            deterministic=config.deterministic,
            prefix_cache_memory=0,  # rounds repeat their prompts
        )
        self.engine = Engine(base, settings)
        for k in dict.fromkeys(config.k):
            for number in range(num_adapters):
                adapter = random_adapter(base.spec, indices[k], config.seed + number)
                self.engine.adapters.add_resident(_name(k, number), adapter)

    def run(self, work: Work) -> Timeline:
        with self.merged_for(work):
            return run_requests(
                self.engine, work.prompts, self.adapter_names(work), work.output_len
            )

    def switch_times_ms(self, k: int, rounds: int) -> dict[str, list[float]]:
        """Measure merging an adapter, swapping it for another, and unmerging that."""
        actions: dict[str, Callable[[], None]] = {
            "merge": lambda: self.engine.adapters.merging.merge(_name(k, 0)),
            "swap": lambda: self.engine.adapters.merging.merge(_name(k, 1)),
            "unmerge": self.engine.adapters.merging.unmerge,
        }
        times_ms: dict[str, list[float]] = {action: [] for action in actions}
        for _ in range(rounds):
            for action, act in actions.items():
                started = time.perf_counter()
                act()
                if self.base.device.type == "cuda":
                    torch.cuda.synchronize()
                times_ms[action].append(1000 * (time.perf_counter() - started))
        return times_ms

    @contextmanager
    def merged_for(self, work: Work) -> Iterator[None]:
        """Merge the adapter of this work, if any, and unmerge it after the block."""
        if not work.merged:
            yield
            return
        self.engine.adapters.merging.merge(_name(work.k, 0))
        try:
            yield
        finally:
            self.engine.adapters.merging.unmerge()

    def adapter_names(self, work: Work) -> list[str | None]:
        """Return the name of each request's adapter in our engine."""
        return [None if number is None else _name(work.k, number) for number in work.adapters]


def _name(k: int | None, number: int) -> str:
    return f"k{k}-{number}"


def run_requests(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    output_len: int,
) -> Timeline:
    """Answer all prompts in one batch, greedily and at full length. As in `LLM`, prompts take all
    the tokens of a step that they can.

    Raises:
        EngineError: a request failed.
    """
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    token_s: dict[str, list[float]] = {}
    started = time.perf_counter()
    for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        token_s[f"bench-{i}"] = []
        engine.add_request(f"bench-{i}", prompt, params, adapter)
    with engine.pace.unbounded():
        while engine.has_unfinished:
            outputs = engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                if output.error is not None:
                    raise EngineError(f"a request of the benchmark failed: {output.error}")
                token_s[output.request_id] += [now] * len(output.token_ids)
    wall_s = time.perf_counter() - started
    return Timeline(
        token_s=tuple(tuple(times) for times in token_s.values()),
        wall_s=wall_s,
        num_prompt_tokens=sum(map(len, prompts)),
    )
