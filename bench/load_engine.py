"""The streams and the long prompt of bench/load.py, on an engine in this process."""

import statistics
import time
from typing import Any

from neuroada_serve.benchmark.measure import percentile
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.engine.engine import Engine
from neuroada_serve.request import SamplingParams


class Load:
    """The streams and the prompt, on one engine.

    Args:
        stream_len, prompt_len: tokens of their prompts.
        steps: to time of the streams alone, until it is known how many the prompt takes.
    """

    def __init__(
        self,
        engine: Engine,
        num_streams: int,
        stream_len: int,
        prompt_len: int,
        steps: int,
        seed: int,
    ) -> None:
        self.engine = engine
        self.num_streams = num_streams
        self.steps = steps
        self._stream_len = stream_len
        self._prompt_len = prompt_len
        self._seed = seed
        self._vocab = range(int(engine.base.model.config.get_text_config().vocab_size))
        self._block_bytes = engine._cache.num_bytes // engine._cache.num_blocks
        self._token_bytes = engine.kv_budget.layout.bytes_per_token

    def stream_prompts(self, number: int) -> list[list[int]]:
        """Prompts of the streams in a round."""
        seed = f"{self._seed} streams {number}"
        return random_prompts(self.num_streams, self._stream_len, self._vocab, seed)

    def long_prompt(self, number: int) -> list[int]:
        """The long prompt of a round."""
        seed = f"{self._seed} prompt {number}"
        return random_prompts(1, self._prompt_len, self._vocab, seed)[0]

    def run_alone(self, number: int, num_steps: int | None = None) -> dict[str, Any]:
        """Gaps of the streams by themselves."""
        self.add_streams(number)
        gaps = self._gaps(num_steps or self.steps)
        self.abort()
        return gaps

    def run_beside(self, number: int) -> dict[str, Any]:
        """Gaps of the streams while the prompt is computed, its seconds, and KV in use."""
        self.add_streams(number)
        self.add_prompt(number)
        found = self._gaps(None)
        self.steps = len(found["step_end_ms"])
        self.abort()
        return found

    def run_prompt(self, number: int) -> dict[str, Any]:
        """Seconds of the prompt by itself."""
        self.add_prompt(number)
        started = time.perf_counter()
        while not any(output.request_id == "prompt" for output in self.engine.step()):
            pass
        seconds = time.perf_counter() - started
        self.abort()
        return {"prompt_s": seconds}

    @property
    def most_stream_tokens(self) -> int:
        """Tokens of a stream that is not to end by itself."""
        return self.engine.max_model_len - self._stream_len

    def add_streams(self, number: int, max_tokens: int | None = None) -> None:
        """Start the streams: each has a token when this returns."""
        params = greedy(max_tokens or self.most_stream_tokens)
        for i, prompt in enumerate(self.stream_prompts(number)):
            self.engine.add_request(f"stream{i}", prompt, params)
        waiting = {f"stream{i}" for i in range(self.num_streams)}
        while waiting:
            waiting -= {output.request_id for output in self.engine.step()}

    def add_prompt(self, number: int, max_tokens: int = 2) -> None:
        """Queue the prompt."""
        self.engine.add_request("prompt", self.long_prompt(number), greedy(max_tokens))

    def abort(self) -> None:
        """Abort whatever runs."""
        for name in ["prompt", *(f"stream{i}" for i in range(self.num_streams))]:
            self.engine.abort(name)
        self.finish()

    def finish(self) -> None:
        """Step until nothing is left."""
        while self.engine.has_unfinished:
            self.engine.step()

    def _gaps(self, num_steps: int | None) -> dict[str, Any]:
        """Gaps of the streams over some steps; None: until the prompt's first token."""
        started = time.perf_counter()
        last = dict.fromkeys((f"stream{i}" for i in range(self.num_streams)), started)
        gaps: list[float] = []
        moments, used, needed = [], [], []
        ended = False
        while not ended:
            outputs = self.engine.step()
            now = time.perf_counter()
            moments.append(1e3 * (now - started))
            if num_steps is None:
                used.append(self.engine.metrics.kv.used * self._block_bytes)
                needed.append(self._tokens() * self._token_bytes)
            for output in outputs:
                assert output.error is None, output.error
                if output.request_id in last:
                    gaps.append(1e3 * (now - last[output.request_id]))
                    last[output.request_id] = now
            is_first = any(output.request_id == "prompt" for output in outputs)
            ended = is_first if num_steps is None else len(moments) == num_steps
        found: dict[str, Any] = {
            "gap_ms": {
                "median": statistics.median(gaps),
                "p99": percentile(gaps, 99),
                "worst": max(gaps),
                "count": len(gaps),
            },
            "step_end_ms": moments,
        }
        if num_steps is None:
            found["prompt_s"] = moments[-1] / 1e3
            found |= {"kv_used_bytes": used, "kv_needed_bytes": needed}
        return found

    def _tokens(self) -> int:
        """Computed tokens of all running sequences."""
        return sum(sequence.num_computed for sequence in self.engine._scheduler.running.values())


def greedy(max_tokens: int) -> SamplingParams:
    """Answers of full length."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
