"""Settings of the benchmarks, frozen. Each field is also a flag and a variable, see `options`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from neuroada_serve.benchmark.workload import MERGED, check_popularity
from neuroada_serve.config import EngineConfig, TrainConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.options import at_least, integers, option, redefined, words

PEERS = ("peft", "vllm")
SLOS = ("ttft", "tpot", "e2el")  # vLLM's names: first token, per output token, end to end


def parse_goodput(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Parse limits such as "ttft:500 tpot:50", in milliseconds.

    Raises:
        UsageError: a name is unknown, or a limit is not a positive number.
    """
    limits = []
    for pair in " ".join(texts).replace(",", " ").split():
        name, _, value = pair.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            limit_ms = math.nan
        if name not in SLOS or not limit_ms > 0:
            raise UsageError(f"takes {', '.join(SLOS)} as NAME:MILLISECONDS, got {pair!r}")
        limits.append((name, limit_ms))
    return tuple(limits)


@dataclass(frozen=True)
class OfflineConfig:
    """Settings of `bench throughput`."""

    variables: ClassVar[str] = "NEUROADA_BENCH_"

    concurrency: tuple[int, ...] = option(
        (1, 4, 16), "Requests that run at once, as in 1,4,16.", "Load", read=integers
    )
    popularity: tuple[str, ...] = option(
        ("identical", "distinct", "merged"),
        "Distribution of requests over adapters: one or more of identical, distinct, uniform, "
        "zipf:A, merged and half-merged (the other half runs on the base), separated by commas. "
        "The base alone is always measured.",
        "Load",
        read=words,
    )
    k: tuple[int, ...] = option(
        (1, 8), "Kept inputs per neuron of the adapters, as in 1,8.", "Adapters", read=integers
    )
    num_adapters: int = option(16, "Adapters that uniform and zipf:A draw from.", "Adapters")
    prompt_len: int = option(32, "Tokens per prompt.", "Load")
    output_len: int = option(64, "New tokens per request; end tokens do not count.", "Load")
    prefill_len: int = option(
        512, "Tokens of the prompt in the prefill cases; 0 leaves them out.", "Load"
    )
    num_prompts: int = option(8, "Requests per case and round.", "Load", flag="")
    rounds: int = option(
        5, "Rounds; each runs every case once, in turn. Medians need five.", "Load"
    )
    seed: int = redefined(
        TrainConfig, "seed", help="Seed of prompts, adapters and popularity.", group="Load"
    )
    text_file: Path | None = option(
        None, "Take prompts from this text, cut or repeated; default: random token ids.", "Load"
    )
    dtype: str = redefined(EngineConfig, "dtype", group="Engine")
    device: str = redefined(EngineConfig, "device", group="Engine")
    threads: int | None = option(
        None, "CPU threads of every engine; default: torch's own number.", "Engine"
    )
    max_num_batched_tokens: int | None = redefined(
        EngineConfig,
        "max_num_batched_tokens",
        help="Maximum number of tokens that our engine computes in one step; default: its own.",
        group="Engine",
    )
    deterministic: bool = option(False, "Run our engine with --deterministic.", "Engine")
    check: bool = option(
        True, "Compare every case with the reference op first; a mismatch ends the run.", "Load"
    )
    peers: tuple[str, ...] = option(
        (),
        "Other engine that runs the same work, with LoRA adapters: peft or vllm. Repeatable.",
        "Peers",
        flag="peer",
        metavar="peft|vllm",
        repeated=True,
    )
    peer_python: Path | None = option(
        None, "Python with vLLM installed, such as DIR/bin/python; default: this one.", "Peers"
    )
    peer_eager: bool | None = option(
        None, "vLLM's enforce_eager; default: vLLM's own choice.", "Peers"
    )
    lora_rank: int = option(8, "Rank of the peers' LoRA adapters.", "Peers")

    def __post_init__(self) -> None:
        for name in ("concurrency", "k", "popularity"):
            if not getattr(self, name):
                raise UsageError(f"{name} must name at least one")
        for name in ("concurrency", "k"):
            if min(getattr(self, name)) < 1:
                raise UsageError(f"{name} must be at least 1, got {min(getattr(self, name))}")
        at_least(self, num_adapters=1, prompt_len=1, num_prompts=1, rounds=1, lora_rank=1)
        at_least(self, prefill_len=0, threads=1)
        if self.output_len < 2:
            raise UsageError(f"output_len must be at least 2 to time a step, got {self.output_len}")
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
        """Maximum number of tokens, prompt and answer together, for every engine."""
        return max(self.prompt_len + self.output_len, self.prefill_len + 1) + 1


@dataclass(frozen=True)
class LatencyConfig(OfflineConfig):
    """Settings of `bench latency`."""

    concurrency: tuple[int, ...] = redefined(OfflineConfig, "concurrency", (1,))
    popularity: tuple[str, ...] = redefined(OfflineConfig, "popularity", ("identical", "merged"))
    prefill_len: int = redefined(OfflineConfig, "prefill_len", 0, flag="")
    num_prompts: int = redefined(OfflineConfig, "num_prompts", flag=None)


@dataclass(frozen=True)
class ServingConfig:
    """Settings of `bench serving`, named as in `vllm bench serve` if it has them."""

    variables: ClassVar[str] = "NEUROADA_BENCH_"

    base_url: str | None = option(
        None,
        "A running OpenAI-style server, such as http://127.0.0.1:8000; default: start ours.",
        "Server",
    )
    model: str | None = option(
        None,
        "With --base-url the base's name there, default the first of /v1/models; otherwise the "
        "base to serve: a local folder, a .gguf file, demo, or a hub id.",
        "Server",
    )
    lora_modules: tuple[str, ...] = option(
        (),
        "Names of adapters on the server, as in a,b,c; default: all of /v1/models. Needs "
        "--base-url.",
        "Adapters",
        read=words,
    )
    popularity: tuple[str, ...] = option(
        ("base", "uniform"),
        "Distribution of requests over adapters: one or more of base, identical, distinct, "
        "uniform and zipf:A, separated by commas; each is one case.",
        "Load",
        read=words,
    )
    num_adapters: int = redefined(
        OfflineConfig, "num_adapters", help="Adapters that our own server is started with."
    )
    k: int = option(TrainConfig.k, "Kept inputs per neuron of those adapters.", "Adapters")
    num_prompts: int = option(64, "Requests per case.", "Load")
    request_rate: float = option(math.inf, "Requests per second; inf sends all at once.", "Load")
    burstiness: float = option(
        1.0, "1 is a Poisson process; Gamma arrivals come in bursts below 1, evenly above.", "Load"
    )
    max_concurrency: int | None = option(None, "Maximum number of requests open at once.", "Load")
    input_len: int = option(32, "Tokens per prompt.", "Load")
    output_len: int = option(32, "New tokens per request; end tokens do not count.", "Load")
    goodput: tuple[tuple[str, float], ...] = option(
        (),
        "Limits of a good request, in milliseconds, on ttft, tpot and e2el, as in "
        "'ttft:500 tpot:50'. Repeatable.",
        "Load",
        metavar="NAME:MS",
        read=parse_goodput,
        repeated=True,
    )
    rounds: int = option(1, "Rounds; each runs every case once, in turn.", "Load")
    seed: int = redefined(
        OfflineConfig, "seed", help="Seed of arrivals, prompts, adapters and popularity."
    )
    vocab: int = option(1000, "Prompts are random token ids below this.", "Load")
    timeout_s: float = option(600.0, "Longest wait for one request.", "Server")

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
        at_least(self, num_adapters=1, k=1, num_prompts=1, input_len=1, output_len=1, rounds=1)
        at_least(self, max_concurrency=1, vocab=2)
        for name in ("request_rate", "burstiness", "timeout_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, got {getattr(self, name)}")
