"""Time decode steps of two checkouts of this repository by the length of their contexts.

A process for each checkout runs the base. For every number of requests and every length, both
compute the prompts once; then they take --steps decode steps in each round, in turn, while the
other one is stopped (SIGSTOP). A figure is the median step, a ratio is after / before within a
round. A case with more than --most-tokens in all is left out, since its prompts take minutes.

Writes contexts.json and contexts.png. Not measured: adapters, prefill, a GPU.

    python -m bench.contexts --before DIR --after DIR [--model demo] [--rounds 7] [--threads 2]
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import interleaved, new_parser, ratio, result_of, settings_of, spread, write
from bench.versus import SIDES, environment_of
from neuroada_serve.benchmark.peers import PeerProcess
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.plots import COLOURS, legend_beside, new_figure, png

WORKER = Path(__file__).with_name("contexts_worker.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 1 where a step got slower by more than the limit."""
    parser = new_parser("contexts", __doc__, model=None, seed=0)
    for side in SIDES:
        parser.add_argument(f"--{side}", type=Path, required=True, help="checkout")
    parser.add_argument("--model", default="demo", help="base model")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--most-tokens", type=int, default=80_000, help="of a case's prompts")
    parser.add_argument("--steps", type=int, default=16, help="of a round")
    parser.add_argument("--limit", type=float, default=0.02, help="most that may get worse")
    parser.add_argument("--threads", type=int, help="CPU threads; default: what torch takes")
    args = parser.parse_args(argv)
    console = Console(stderr=True, width=120)
    cases = [
        (requests, context)
        for requests, context in product(args.requests, args.contexts)
        if requests * context <= args.most_tokens
    ]

    found, facts = [], {}
    with ExitStack() as stack:
        workers = {}
        for side in SIDES:
            checkout = getattr(args, side).resolve()
            setup = {
                "root": str(checkout),
                "model": args.model,
                "threads": args.threads,
                "most_requests": max(args.requests),
                # Some steps more than are timed: prompts are computed one after the other.
                "most_tokens": 2 * max(args.contexts) + (args.rounds + 1) * args.steps + 2,
            }
            command = [sys.executable, str(WORKER)]
            with console.status(f"loading the model in {checkout}"):
                workers[side] = PeerProcess(command, setup, environment_of(checkout))
            stack.callback(workers[side].close)
            facts[side] = workers[side].ready
        vocab = range(facts["before"]["vocab"])
        for requests, context in cases:
            label = f"{requests} requests at {context:,} tokens"
            prompts = random_prompts(requests, context, vocab, f"{args.seed} {label}")
            for side in SIDES:
                with console.status(f"{label}: prompts, {side}"):
                    workers[side].ask({"prompts": prompts})
            ways = {side: partial(step_ms, workers[side], args.steps) for side in SIDES}
            rounds = interleaved(ways, args.rounds, console, label)
            found.append(figure_of(requests, context, rounds, args.limit))

    show(found, console)
    settings = {name: value for name, value in settings_of(args).items() if name not in SIDES}
    result = {"checkouts": facts, "cases": found, "not_measured": ["adapters", "prefill", "GPU"]}
    write(result_of("contexts", settings, result), args.out, plot)
    return 1 if any(case["worse"] for case in found) else 0


def step_ms(worker: PeerProcess, steps: int, number: int) -> float:
    """Median step of one round."""
    median: float = worker.ask({"steps": steps})["step_ms"]
    return median


# --- output ----------------------------------------------------------------------------------


def figure_of(
    requests: int, context: int, rounds: Mapping[str, Sequence[float]], limit: float
) -> dict[str, Any]:
    """Both sides of one case, the ratio after / before, and whether it is worse."""
    before, after = (rounds[side] for side in SIDES)
    median = ratio(after, before)
    return {
        "requests": requests,
        "context": context,
        "step_ms": {side: {**spread(rounds[side]), "rounds": list(rounds[side])} for side in SIDES},
        "ratio": median,
        "ratios": [a / b for a, b in zip(after, before, strict=True)],
        "worse": median > 1 + limit,
    }


def show(cases: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a row per case."""
    table = Table(title="decode step, ms; ratio after / before: median (least to greatest)")
    for heading in ("requests", "context", *SIDES, "ratio", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in cases:
        medians = (f"{case['step_ms'][side]['median']:.2f}" for side in SIDES)
        ratios = case["ratios"]
        text = f"{case['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        worse = "worse" if case["worse"] else ""
        table.add_row(str(case["requests"]), f"{case['context']:,}", *medians, text, worse)
    console.print(table)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw steps by context, a colour for each number of requests, before and after."""
    figure, axes = new_figure(8, 4.5)
    for colour, requests in zip(
        COLOURS[::2], dict.fromkeys(case["requests"] for case in result["cases"]), strict=False
    ):
        cases = [case for case in result["cases"] if case["requests"] == requests]
        contexts = [case["context"] for case in cases]
        for side, style in zip(SIDES, ("o--", "o-"), strict=True):
            medians = [case["step_ms"][side]["median"] for case in cases]
            label = f"{requests} {'request' if requests == 1 else 'requests'}, {side}"
            axes.plot(contexts, medians, style, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("decode step (ms)")
    legend_beside(axes)
    path.write_bytes(png(figure))


if __name__ == "__main__":
    raise SystemExit(main())
