"""Time what a decode step does beside its forward and sampling: scheduling, adapters, text.

Runs --batch requests with an adapter each and k=1, and times whole steps and, inside them, what
belongs to the device: the forward (the kernel of a known model, or the model's modules) and the
choice of tokens from the logits. Host work is the rest. Not measured: HTTP, a GPU.

    python -m bench.host [MODEL] [--batch 16] [--steps 200]
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from bench.harness import new_parser, result_of, settings_of, write
from neuroada_serve.benchmark.adapters import magnitude_indices, random_adapter
from neuroada_serve.benchmark.measure import percentile
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine import step_executor
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import resolve_model
from neuroada_serve.ops.cpu_forward import CpuForward
from neuroada_serve.request import SamplingParams

SAMPLING = {
    "greedy": SamplingParams(temperature=0, ignore_eos=True),
    "top_p": SamplingParams(temperature=0.8, top_p=0.9, seed=0, ignore_eos=True),
}
WARM_UP = 5  # steps


def main(argv: Sequence[str] | None = None) -> None:
    """Time both kinds of sampling, one after the other."""
    parser = new_parser("host", __doc__, rounds=None)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    base = load_base(resolve_model(args.model))
    indices = magnitude_indices(base, [1])
    engine = Engine(base, EngineConfig(max_num_seqs=args.batch, prefix_cache_memory=0))
    for number in range(args.batch):
        engine.adapters.add_resident(str(number), random_adapter(base.spec, indices[1], number))
    vocab = range(int(base.model.config.get_text_config().vocab_size))
    prompts = random_prompts(args.batch, 16, vocab, 0)

    table = Table(title=f"{args.batch} requests, each its own adapter")
    columns = (
        "sampling",
        "step ms",
        "forward ms",
        "sampling ms",
        "host ms",
        "host p99",
        "host share",
    )
    for column in columns:
        table.add_column(column, justify="right")
    results: dict[str, Any] = {}
    for name, params in SAMPLING.items():
        steps, forwards, samplings = timed_steps(engine, prompts, params, args.steps)
        host = [s - f - c for s, f, c in zip(steps, forwards, samplings, strict=True)]
        share = statistics.median(h / s for h, s in zip(host, steps, strict=True))
        results[name] = {
            "step_ms": steps,
            "forward_ms": forwards,
            "sampling_ms": samplings,
            "host_share": share,
        }
        times = steps, forwards, samplings, host
        medians = (f"{statistics.median(values):.2f}" for values in times)
        table.add_row(name, *medians, f"{percentile(host, 99):.2f}", f"{share:.3f}")
    Console(stderr=True).print(table)
    found = {"sampling": results, "not_measured": ["HTTP", "GPU"]}
    write(result_of("host", settings_of(args, dtype=str(base.dtype)), found), args.out)


def timed_steps(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, count: int
) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of `count` decode steps: (steps, their forwards, their choices of tokens)."""
    params = replace(params, max_tokens=count + WARM_UP + 1)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params, str(number))
    spent = {"forward": 0.0, "sampling": 0.0}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[part] += (time.perf_counter() - start) * 1e3

        return run

    steps, forwards, samplings = [], [], []
    model = engine.base.model
    with (
        patch.object(CpuForward, "_run", timed("forward", CpuForward._run)),
        patch.object(model, "forward", timed("forward", model.forward)),
        patch.object(step_executor, "sample", timed("sampling", step_executor.sample)),
    ):
        while engine.has_unfinished:
            spent.update(forward=0.0, sampling=0.0)
            start = time.perf_counter()
            engine.step()
            steps.append((time.perf_counter() - start) * 1e3)
            forwards.append(spent["forward"])
            samplings.append(spent["sampling"])
    return steps[-count:], forwards[-count:], samplings[-count:]


if __name__ == "__main__":
    main()
