"""Find the sizes from which one way of computing is faster than another on the CPU.

Constants in the code rest on these.

    lanes      a decode step with few lanes, computed one by one or side by side
               (cpu_blocks.FEW_LANES)
    threads    one layer's `bypass_add_` in one thread or in all (cpu_team.THREADED_ENTRIES)
    kernel     a prompt as one kernel or through transformers' modules (cpu_decoder.MAX_TOKENS)
    runs       a prompt of one adapter through the weights or token by token, as one kernel
               (cpu_decoder.RUN_TOKENS) and through the modules (bank.RUN_TOKENS)

Both ways are run in turn; every figure is the median of --rounds, every ratio that of the rounds'
own ratios: below 1 the first way is faster. Not measured: a GPU (`bench/gpu`).

    python -m bench.choices [MODEL] [--rounds 7]
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import new_parser, ratio, result_of, settings_of, write
from neuroada_serve.adapters import bank
from neuroada_serve.benchmark.adapters import magnitude_indices, random_adapter
from neuroada_serve.benchmark.measure import run_requests
from neuroada_serve.benchmark.report import progress_bar
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine import cpu_decoder
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import resolve_model
from neuroada_serve.ops import cpu_blocks, cpu_team
from neuroada_serve.ops.bypass import BypassTable, TokenSlots, bypass_add_

KS = (1, 8)
LANES = (1, 2, 3, 4, 5, 6, 8)
THREAD_LANES = (1, 2, 4, 8, 16)
WIDTHS = (192, 576, 1536)
PROMPTS = (16, 64, 128, 256, 512, 1024)
RUNS = (4, 8, 16, 24, 32, 48, 64, 128, 192, 256, 512)
NEVER, ALWAYS = 10**9, 0


@dataclass(frozen=True)
class Choice:
    """Two ways to do the same, at one size."""

    name: str
    size: int
    k: int
    first: Callable[[], float]  # ms
    second: Callable[[], float]


@dataclass(frozen=True)
class Answer:
    """Times of both ways of one choice."""

    name: str
    size: int
    k: int
    first_ms: float
    second_ms: float
    ratio: float  # of the first's time to the second's
    rounds: list[tuple[float, float]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run both ways of every choice in turn."""
    parser = new_parser("choices", __doc__)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(argv)
    console = Console(stderr=True)

    choices = lane_choices(args.model, args.steps) + thread_choices() + prompt_choices(args.model)
    answers: list[Answer] = []
    with progress_bar(console) as progress:
        for choice in progress.track(choices, description="measuring"):
            choice.first(), choice.second()
            rounds = [(choice.first(), choice.second()) for _ in range(args.rounds)]
            answers.append(
                Answer(
                    choice.name,
                    choice.size,
                    choice.k,
                    statistics.median(a for a, _ in rounds),
                    statistics.median(b for _, b in rounds),
                    ratio(*zip(*rounds, strict=True)),
                    rounds,
                )
            )

    for name in dict.fromkeys(answer.name for answer in answers):
        table = Table(title=name)
        for column in ("size", "k", "first ms", "second ms", "first / second"):
            table.add_column(column, justify="right")
        for a in (a for a in answers if a.name == name):
            times = f"{a.first_ms:.3f}", f"{a.second_ms:.3f}", f"{a.ratio:.2f}"
            table.add_row(str(a.size), str(a.k), *times)
        console.print(table)
    found = {"choices": [asdict(answer) for answer in answers], "not_measured": ["GPU"]}
    write(result_of("choices", settings_of(args), found), args.out)


def new_engine(model: str, **config: Any) -> Engine:
    """Engine with an adapter per lane and k, named by both."""
    base = load_base(resolve_model(model))
    indices = magnitude_indices(base, KS)
    most = max(PROMPTS)
    settings = {"max_num_batched_tokens": most, "max_num_seqs": 16, "prefix_cache_memory": 0}
    engine = Engine(base, EngineConfig(**settings, **config))
    for k in KS:
        for number in range(max(LANES)):
            engine.adapters.add_resident(
                f"k{k}-{number}", random_adapter(base.spec, indices[k], number)
            )
    return engine


def lane_choices(model: str, steps: int) -> list[Choice]:
    """Lanes one by one, or side by side."""
    engine = new_engine(model)
    vocab = range(int(engine.base.model.config.get_text_config().vocab_size))

    def step(few: int, k: int, lanes: int) -> float:
        names = [f"k{k}-{number}" for number in range(lanes)]
        with patch.object(cpu_blocks, "FEW_LANES", few):
            prompts = random_prompts(lanes, 16, vocab, 0)
            return statistics.median(run_requests(engine, prompts, names, steps).step_ms)

    return [
        Choice(
            "lanes: one by one, or side by side",
            lanes,
            k,
            lambda k=k, lanes=lanes: step(NEVER, k, lanes),
            lambda k=k, lanes=lanes: step(ALWAYS, k, lanes),
        )
        for k in KS
        for lanes in LANES
    ]


def thread_choices(repeats: int = 40) -> list[Choice]:
    """One thread, or all. Sizes are lanes * d_out * k; each call has tables that no cache holds."""
    choices = []
    for width in WIDTHS:
        for k in KS:
            index = torch.rand(width, width).topk(k, dim=1).indices.int()
            tables = [
                BypassTable(index.clone(), torch.randn(16, width, k).bfloat16())
                for _ in range(repeats)
            ]
            for lanes in THREAD_LANES:

                def call(least: int, tables: list[BypassTable] = tables, n: int = lanes) -> float:
                    x = torch.randn(n, tables[0].d_out).bfloat16()
                    y, slots = torch.zeros_like(x), TokenSlots(tuple(range(n)), x.device)
                    with patch.object(cpu_team, "THREADED_ENTRIES", least):
                        start = time.perf_counter()
                        for table in tables:
                            bypass_add_(y, x, table, slots)
                        return (time.perf_counter() - start) / len(tables) * 1e3

                name = "threads: one, or all"
                one, every = (lambda c=call: c(NEVER)), (lambda c=call: c(ALWAYS))
                choices.append(Choice(name, lanes * width * k, k, one, every))
    return sorted(choices, key=lambda choice: (choice.k, choice.size))


def prompt_choices(model: str) -> list[Choice]:
    """A prompt as one kernel or by modules, and through the weights or token by token."""
    with patch.object(cpu_decoder, "MAX_TOKENS", max(PROMPTS)):
        by_kernel = new_engine(model)
    by_modules = new_engine(model, enforce_eager=True)
    vocab = range(int(by_kernel.base.model.config.get_text_config().vocab_size))

    def prefill(engine: Engine, tokens: int, k: int | None, run_tokens: int = NEVER) -> float:
        names = [None if k is None else f"k{k}-0"]
        prompts = random_prompts(1, tokens, vocab, tokens)
        with (
            patch.object(cpu_decoder, "MAX_TOKENS", NEVER),
            patch.object(cpu_decoder, "RUN_TOKENS", run_tokens),
            patch.dict(bank.RUN_TOKENS, cpu=run_tokens),
        ):
            return run_requests(engine, prompts, names, 1).wall_s * 1e3

    choices = [
        Choice(
            "kernel: one kernel, or modules",
            tokens,
            0,
            lambda n=tokens: prefill(by_kernel, n, None),
            lambda n=tokens: prefill(by_modules, n, None),
        )
        for tokens in PROMPTS
    ]
    for way, engine in (("one kernel", by_kernel), ("modules", by_modules)):
        choices += [
            Choice(
                f"runs, {way}: through the weights, or token by token",
                tokens,
                k,
                lambda e=engine, n=tokens, k=k: prefill(e, n, k, ALWAYS),
                lambda e=engine, n=tokens, k=k: prefill(e, n, k),
            )
            for k in KS
            for tokens in RUNS
        ]
    return choices


if __name__ == "__main__":
    main()
