"""`neuroada bench serving`: load a running OpenAI-style server, ours or another.

Requests go to /v1/completions, streamed, with random token ids as prompts. They are sent when they
are due, whether or not earlier ones have been answered (an open loop). A request's clock starts
when it is sent; with --max-concurrency it may be sent late, as in `vllm bench serve`.

    ttft    from sending to the first chunk that has a choice
    itl     between such chunks; a server may put several tokens into one
    tpot    (e2el - ttft) / (output tokens - 1); output tokens as the server counts them
    e2el    from sending to the end of the stream
"""

import asyncio
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from neuroada_serve.benchmark.measure import percentile
from neuroada_serve.benchmark.report import environment, progress_bar
from neuroada_serve.benchmark.settings import ServingConfig
from neuroada_serve.benchmark.workload import arrivals, assign, random_prompts
from neuroada_serve.errors import EngineError, UsageError

if TYPE_CHECKING:
    import httpx

_STOP_TIMEOUT_S = 30.0
_PERCENTS = (50, 90, 99)


@dataclass
class Sent:
    """One request and its result; times in milliseconds since it was sent."""

    sent_s: float  # since the start of the case
    model: str
    ttft_ms: float = math.nan
    itl_ms: list[float] = field(default_factory=list)
    e2el_ms: float = math.nan
    output_tokens: int = 0
    error: str | None = None

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first; 0 for a single token, as in vLLM."""
        rest = self.output_tokens - 1
        return (self.e2el_ms - self.ttft_ms) / rest if rest > 0 else 0.0

    def keeps(self, limits_ms: Mapping[str, float]) -> bool:
        """Return whether the request succeeded within every limit."""
        return self.error is None and all(
            getattr(self, f"{name}_ms") <= limit for name, limit in limits_ms.items()
        )


def bench_serving(config: ServingConfig, console: Console) -> dict[str, Any]:
    """Run every case in interleaved rounds; report.py describes the result.

    Raises:
        UsageError: httpx is not installed, the server cannot be reached or has no adapters.
        EngineError: our own server did not start, or no request of a case was answered.
    """
    if find_spec("httpx") is None:
        raise UsageError("bench serving needs httpx: pip install 'neuroada-serve[bench]'")
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in config.popularity}
    with _server(config, console) as base_url:
        base, adapters = asyncio.run(_models(base_url, config))
        with progress_bar(console) as progress:
            asyncio.run(_warm_up(base_url, config, [base, *adapters]))
            for number in range(config.rounds):
                for popularity in rounds:
                    one = _run_case(base_url, config, base, adapters, popularity, number, progress)
                    rounds[popularity].append(one)
    return {
        "schema": "neuroada-bench/1",
        "benchmark": "serving",
        **environment(),
        "settings": {
            **asdict(config),
            "base_url": base_url,
            "model": base,
            "adapters": adapters,
        },
        "cases": [
            {
                "popularity": popularity,
                "median": {
                    figure: statistics.median(one[figure] for one in ran)
                    for figure in ran[0]
                    if figure != "requests"
                },
                "rounds": ran,
            }
            for popularity, ran in rounds.items()
        ],
    }


def figures(
    requests: Sequence[Sent], duration_s: float, limits_ms: Mapping[str, float]
) -> dict[str, float]:
    """Compute the figures of one case in one round, under vLLM's names.

    Raises:
        EngineError: no request was answered.
    """
    good = [r for r in requests if r.error is None]
    if not good:
        raise EngineError(f"no request was answered; the first failed with: {requests[0].error}")
    samples = {
        "ttft_ms": [r.ttft_ms for r in good],
        "tpot_ms": [r.tpot_ms for r in good if r.output_tokens > 1],
        "itl_ms": [gap for r in good for gap in r.itl_ms],
        "e2el_ms": [r.e2el_ms for r in good],
    }
    return {
        "completed": len(good),
        "failed": len(requests) - len(good),
        "duration_s": duration_s,
        "request_throughput": len(good) / duration_s,
        "output_throughput": sum(r.output_tokens for r in good) / duration_s,
        "request_goodput": sum(r.keeps(limits_ms) for r in requests) / duration_s,
        **{
            f"{name}_p{percent}": percentile(values, percent) if values else math.nan
            for name, values in samples.items()
            for percent in _PERCENTS
        },
    }


# --- load ------------------------------------------------------------------------------------


def _run_case(
    base_url: str,
    config: ServingConfig,
    base: str,
    adapters: Sequence[str],
    popularity: str,
    number: int,
    progress: Progress,
) -> dict[str, Any]:
    """Run one case of one round; all cases of a round share arrivals and prompts."""
    seed = f"{config.seed} {number}"
    chosen = assign(popularity, config.num_prompts, max(1, len(adapters)), seed)
    models = [base if i is None else adapters[i] for i in chosen]
    due_s = arrivals(config.num_prompts, config.request_rate, config.burstiness, seed)
    prompts = random_prompts(config.num_prompts, config.input_len, range(config.vocab), seed)
    task = progress.add_task(f"{popularity}, round {number + 1}", total=config.num_prompts)
    requests, duration_s = asyncio.run(
        _send_all(base_url, config, models, prompts, due_s, lambda: progress.advance(task))
    )
    return {
        **figures(requests, duration_s, dict(config.goodput)),
        "requests": [asdict(request) for request in requests],
    }


async def _send_all(
    base_url: str,
    config: ServingConfig,
    models: Sequence[str],
    prompts: Sequence[Sequence[int]],
    due_s: Sequence[float],
    on_done: Any,
) -> tuple[list[Sent], float]:
    """Send every request when it is due; return (results, seconds until the last one ended)."""
    gate = asyncio.Semaphore(config.max_concurrency or len(models))
    started = time.perf_counter()

    async def one(model: str, prompt: Sequence[int], due: float) -> Sent:
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        async with gate:
            sent = await _complete(client, config, model, prompt, started)
        on_done()
        return sent

    async with _client(base_url, config) as client:
        requests = await asyncio.gather(*map(one, models, prompts, due_s))
    return requests, time.perf_counter() - started


async def _complete(
    client: "httpx.AsyncClient",
    config: ServingConfig,
    model: str,
    prompt: Sequence[int],
    started: float,
) -> Sent:
    """Request one streamed completion. A failure is kept in the result, not raised."""
    import httpx

    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": config.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    now = time.perf_counter()
    sent, sent_at, last = Sent(now - started, model), now, now
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                sent.error = f"HTTP {response.status_code}: {text[:200]}"
                return sent
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data:"))
                if "error" in chunk:
                    sent.error = str(chunk["error"])[:200]
                    return sent
                if usage := chunk.get("usage"):
                    sent.output_tokens = int(usage["completion_tokens"])
                if not chunk.get("choices"):
                    continue
                now = time.perf_counter()
                if math.isnan(sent.ttft_ms):
                    sent.ttft_ms = 1000 * (now - sent_at)
                else:
                    sent.itl_ms.append(1000 * (now - last))
                last = now
        sent.e2el_ms = 1000 * (last - sent_at)
        if math.isnan(sent.ttft_ms):
            sent.error = "the stream had no choice in it"
    except (httpx.HTTPError, ValueError) as error:
        sent.error = f"{type(error).__name__}: {error}"
    return sent


async def _models(base_url: str, config: ServingConfig) -> tuple[str, list[str]]:
    """Ask the server for the names of the base and of the adapters."""
    import httpx

    try:
        async with _client(base_url, config) as client:
            cards = (await client.get("/v1/models")).raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise UsageError(f"{base_url}/v1/models cannot be read: {error}") from error
    bases = [card["id"] for card in cards if not card.get("parent")]
    if not bases:
        raise UsageError(f"{base_url} lists no base model; name it with --model")
    base = config.model if config.base_url and config.model else bases[0]
    adapters = [card["id"] for card in cards if card.get("parent")]
    adapters = list(config.lora_modules) or sorted(adapters)
    if not adapters and set(config.popularity) != {"base"}:
        raise UsageError(
            f"{base_url} serves no adapters; start it with some, name them with --lora-modules, "
            "or measure --popularity base"
        )
    return base, adapters


async def _warm_up(base_url: str, config: ServingConfig, models: Sequence[str]) -> None:
    """Send one short request to each model, so that none is loaded while timed."""
    async with _client(base_url, config) as client:
        prompts = random_prompts(len(models), config.input_len, range(config.vocab), "warm up")
        for model, prompt in zip(models, prompts, strict=True):
            sent = await _complete(client, config, model, prompt, time.perf_counter())
            if sent.error is not None:
                raise UsageError(f"{base_url} does not answer as {model!r}: {sent.error}")


def _client(base_url: str, config: ServingConfig) -> "httpx.AsyncClient":
    import httpx

    return httpx.AsyncClient(
        base_url=base_url.rstrip("/").removesuffix("/v1"),
        timeout=config.timeout_s,
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )


# --- our own server --------------------------------------------------------------------------


@contextmanager
def _server(config: ServingConfig, console: Console) -> Iterator[str]:
    """Yield the URL of the server under test; run ours during the block if it is to be started."""
    if config.base_url is not None:
        yield config.base_url
        return
    assert config.model is not None
    with tempfile.TemporaryDirectory(prefix="neuroada-bench-") as folder:
        with console.status("making adapters"):
            _save_adapters(config, Path(folder))
        command = [sys.executable, "-m", "neuroada_serve", "serve", config.model, "--port", "0"]
        command += ["--adapter-dir", folder, "--max-waiting", str(max(256, config.num_prompts))]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                with console.status("starting the server"):
                    url = _address(process)
                yield url
            finally:
                process.terminate()
                try:
                    process.wait(_STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def _save_adapters(config: ServingConfig, folder: Path) -> None:
    from neuroada_serve.adapters.format import save_adapter
    from neuroada_serve.benchmark.adapters import magnitude_indices, random_adapter
    from neuroada_serve.model.loader import load_base
    from neuroada_serve.model.source import resolve_model

    assert config.model is not None
    base = load_base(resolve_model(config.model), device="cpu")
    indices = magnitude_indices(base, [config.k])[config.k]
    width = len(str(config.num_adapters - 1))
    for number in range(config.num_adapters):
        adapter = random_adapter(base.spec, indices, config.seed + number)
        save_adapter(adapter, folder / f"bench-{number:0{width}}")


def _address(process: "subprocess.Popen[str]") -> str:
    """Wait for our server and return its URL, which it prints once it is ready."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"Serving .* on (http://\S+)/v1", line):
            # Keep reading from here on, or the server blocks at a full pipe.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return found[1]
    raise EngineError("our server did not start: " + "".join(said[-5:]).strip())
