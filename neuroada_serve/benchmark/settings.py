"""Settings of the benchmarks, frozen. The help text of a field is the help text of its flag."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuroada_serve.benchmark.workload import MERGED, check_popularity
from neuroada_serve.errors import UsageError

PEERS = ("peft", "vllm")
SLOS = ("ttft", "tpot", "e2el")  # vLLM's names: first token, per output token, end to end


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class OfflineConfig:
    """One run of `bench throughput` or `bench latency`."""

    concurrency: tuple[int, ...] = _option((1, 4, 16), "Requests that run at once, as in 1,4,16.")
    popularity: tuple[str, ...] = _option(
        ("identical", "distinct", "merged"),
        "Who uses which adapter, one or more of identical, distinct, uniform, zipf:A, merged and "
        "half-merged (the other half runs on the base), separated by commas. The base alone is "
        "always measured.",
    )
    k: tuple[int, ...] = _option((1, 8), "Kept inputs per neuron of the adapters, as in 1,8.")
    num_adapters: int = _option(16, "Adapters that uniform and zipf:A draw from.")
    prompt_len: int = _option(32, "Tokens per prompt.")
    output_len: int = _option(64, "New tokens per request; end tokens do not count.")
    prefill_len: int = _option(512, "Tokens of the prompt in the prefill cases; 0 leaves them out.")
    num_prompts: int = _option(8, "Requests per case and round.")
    rounds: int = _option(5, "Every round runs each case once, in turn; medians need five.")
    seed: int = _option(0, "Seed of prompts, adapters and popularity.")
    text_file: Path | None = _option(
        None, "Take prompts from this text, cut or repeated; default: random token ids."
    )
    dtype: str = _option("auto", "Weight dtype: auto (as stored), float32, bfloat16 or float16.")
    device: str = _option("auto", "Torch device; auto takes cuda where there is one.")
    threads: int | None = _option(None, "CPU threads of every engine; default: what torch takes.")
    max_num_batched_tokens: int = _option(512, "Most tokens that our engine computes in one step.")
    deterministic: bool = _option(False, "Run our engine with --deterministic.")
    check: bool = _option(
        True, "Compare every case with the reference op first; a mismatch ends the run."
    )
    peers: tuple[str, ...] = _option(
        (), "peft or vllm: run the same work there too, with LoRA adapters. Repeatable."
    )
    peer_python: Path | None = _option(
        None, "Python that has vLLM, such as DIR/bin/python; default: this one."
    )
    peer_eager: bool | None = _option(None, "vLLM's enforce_eager; default: vLLM's own choice.")
    lora_rank: int = _option(8, "Rank of the peers' LoRA adapters.")

    def __post_init__(self) -> None:
        for name in ("concurrency", "k", "popularity"):
            if not getattr(self, name):
                raise UsageError(f"{name} must name at least one")
        for name in ("concurrency", "k"):
            if min(getattr(self, name)) < 1:
                raise UsageError(f"{name} must be at least 1, got {min(getattr(self, name))}")
        for name in ("num_adapters", "prompt_len", "num_prompts", "rounds", "lora_rank"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.output_len < 2:
            raise UsageError(f"output_len must be at least 2 to time a step, got {self.output_len}")
        if self.prefill_len < 0:
            raise UsageError(f"prefill_len must be at least 0, got {self.prefill_len}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.threads}")
        for popularity in self.popularity:
            check_popularity(popularity)
        for peer in self.peers:
            if peer not in PEERS:
                raise UsageError(f"peer must be one of {', '.join(PEERS)}, got {peer!r}")
        if self.text_file is not None and not self.text_file.is_file():
            raise UsageError(f"no file {str(self.text_file)!r}")
        if self.peer_python is not None and not self.peer_python.is_file():
            raise UsageError(f"no Python at {str(self.peer_python)!r}")

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer that every engine is sized for."""
        return max(self.prompt_len + self.output_len, self.prefill_len + 1) + 1


@dataclass(frozen=True)
class ServingConfig:
    """One run of `bench serving`. Names are those of `vllm bench serve` where it has one."""

    base_url: str | None = _option(
        None, "A running OpenAI-style server, such as http://127.0.0.1:8000; default: start ours."
    )
    model: str | None = _option(
        None,
        "With --base-url the base's name there, default the first of /v1/models; otherwise the "
        "base to serve: a local folder, a .gguf file, demo, or a hub id.",
    )
    lora_modules: tuple[str, ...] = _option(
        (),
        "Names of adapters on the server, as in a,b,c; default: all of /v1/models. Needs "
        "--base-url.",
    )
    popularity: tuple[str, ...] = _option(
        ("base", "uniform"),
        "Who uses which adapter, one or more of base, identical, distinct, uniform and zipf:A, "
        "separated by commas; each is one case.",
    )
    num_adapters: int = _option(16, "Adapters that our own server is started with.")
    k: int = _option(1, "Kept inputs per neuron of those adapters.")
    num_prompts: int = _option(64, "Requests per case.")
    request_rate: float = _option(math.inf, "Requests per second; inf sends all at once.")
    burstiness: float = _option(
        1.0, "1 is a Poisson process; Gamma arrivals come in bursts below 1, evenly above."
    )
    max_concurrency: int | None = _option(None, "Most requests open at once.")
    input_len: int = _option(32, "Tokens per prompt.")
    output_len: int = _option(32, "New tokens per request; end tokens do not count.")
    goodput: tuple[tuple[str, float], ...] = _option(
        (),
        "Limits in milliseconds that a good request keeps, of ttft, tpot and e2el, as in "
        "'ttft:500 tpot:50'. Repeatable.",
    )
    rounds: int = _option(1, "Every round runs each case once, in turn.")
    seed: int = _option(0, "Seed of arrivals, prompts, adapters and popularity.")
    vocab: int = _option(1000, "Prompts are random token ids below this.")
    timeout_s: float = _option(600.0, "Longest wait for one request.")

    def __post_init__(self) -> None:
        if self.base_url is None and self.model is None:
            raise UsageError("give --base-url of a running server, or --model to start ours")
        if self.lora_modules and self.base_url is None:
            raise UsageError("--lora-modules needs --base-url; our own server makes its adapters")
        for popularity in self.popularity:
            if popularity != "base":
                check_popularity(popularity)
            if popularity in MERGED:
                raise UsageError(f"{popularity} is a case of throughput and latency only")
        for name in ("num_adapters", "k", "num_prompts", "input_len", "output_len", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("request_rate", "burstiness", "timeout_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise UsageError(f"max_concurrency must be at least 1, got {self.max_concurrency}")
        if self.vocab < 2:
            raise UsageError(f"vocab must be at least 2, got {self.vocab}")


def parse_goodput(texts: list[str]) -> tuple[tuple[str, float], ...]:
    """Limits such as "ttft:500 tpot:50", in milliseconds.

    Raises:
        UsageError: an unknown name, or no positive number.
    """
    limits = []
    for pair in " ".join(texts).replace(",", " ").split():
        name, _, value = pair.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            limit_ms = math.nan
        if name not in SLOS or not limit_ms > 0:
            raise UsageError(f"goodput takes {', '.join(SLOS)} as NAME:MILLISECONDS, got {pair!r}")
        limits.append((name, limit_ms))
    return tuple(limits)
