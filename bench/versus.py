"""Measure two checkouts of this repository against each other in one run.

Each round starts a process with an engine for both checkouts and runs every case of `neuroada bench
throughput` in them (16 requests on the base, with distinct adapters of k=1 and k=8, with one
merged, and a long prompt), each case --repeats times in turn. One process is stopped (SIGSTOP)
while the other works. They are new in every round because a process keeps its luck: where its
memory lies makes equal code several percent faster or slower for as long as it lives. Then each
round starts `neuroada generate` anew on both and takes the time to its first token.

A ratio is after / before within a round. A figure is worse if the median ratio passes --limit to
the wrong side. Beside rates, each case has the processor time of its process, which other work on
the machine disturbs less.

    python -m bench.versus --before DIR --after DIR [--model demo] [--rounds 7] [--threads 2]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import interleaved, new_parser, ratio, result_of, spread, write
from neuroada_serve.benchmark.peers import PeerProcess

WORKER = Path(__file__).with_name("versus_worker.py")
SIDES = ("before", "after")
START = "start to first token, s"
PROCESSOR = "processor_s"  # as the worker names it
LOAD = {
    "concurrency": [16],
    "popularity": ["distinct", "merged"],
    "k": [1, 8],
    "check": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 1 where a figure is worse by more than the limit."""
    parser = new_parser("versus", __doc__, model=None, seed=0)
    for side in SIDES:
        parser.add_argument(f"--{side}", type=Path, required=True, help="checkout")
    parser.add_argument("--model", default="demo", help="base model")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a case in one round")
    parser.add_argument("--limit", type=float, default=0.02, help="most that may get worse")
    parser.add_argument("--threads", type=int, help="CPU threads; default: what torch takes")
    parser.add_argument("--output-len", type=int, default=64, help="new tokens of every request")
    parser.add_argument("--prefill-len", type=int, default=512, help="of the long prompt")
    parser.add_argument("--no-start", action="store_true", help="leave the start out")
    args = parser.parse_args(argv)
    checkouts = {side: getattr(args, side).resolve() for side in SIDES}
    console = Console(stderr=True, width=140)

    facts, samples = throughput(args, checkouts, console)
    if not args.no_start:
        samples[START] = starts(args.model, args.rounds, checkouts, console)
    figures = {name: compared(name, by_side, args.limit) for name, by_side in samples.items()}
    show(figures, console)
    settings = {
        "model": args.model,
        "rounds": args.rounds,
        "repeats": args.repeats,
        "seed": args.seed,
        "limit": args.limit,
        **load_of(args),
    }
    write(result_of("versus", settings, {"checkouts": facts, "figures": figures}), args.out)
    return 1 if any(figure["worse"] for figure in figures.values()) else 0


def load_of(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of `neuroada bench throughput`, as JSON."""
    names = ("seed", "threads", "output_len", "prefill_len")
    return LOAD | {name: getattr(args, name) for name in names}


def environment_of(checkout: Path) -> dict[str, str]:
    """Environment in which a process imports this checkout, with the command line's settings."""
    environ = {**os.environ, "PYTHONPATH": str(checkout), "TOKENIZERS_PARALLELISM": "false"}
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environ.keys():
        environ["GOMP_SPINCOUNT"] = "2000"
    return environ


# --- throughput ------------------------------------------------------------------------------


def throughput(
    args: argparse.Namespace, checkouts: Mapping[str, Path], console: Console
) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """(facts of each checkout, figure -> side -> one sample per round)."""
    facts: dict[str, Any] = {}
    samples: dict[str, dict[str, list[float]]] = {}
    for number in range(args.rounds):
        with ExitStack() as stack:
            workers = {}
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                setup = {"root": str(checkouts[side]), "model": args.model, "config": load_of(args)}
                environ = environment_of(checkouts[side])
                with console.status(f"round {number + 1}: loading the model in {checkouts[side]}"):
                    worker = PeerProcess([sys.executable, str(WORKER)], setup, environ)
                stack.callback(worker.close)
                workers[side] = worker
            facts = {side: workers[side].ready for side in SIDES}
            cases = facts["before"]["cases"]
            assert facts["after"]["cases"] == cases, "the checkouts have different cases"
            ways = {
                (case, side): partial(run_case, workers[side], case, number * args.repeats)
                for case in range(len(cases))
                for side in SIDES
            }
            found = interleaved(ways, args.repeats, console, f"round {number + 1}")
        for (case, side), repeats in found.items():
            for figure in repeats[0]:
                by_side = samples.setdefault(f"{cases[case]}: {figure}", {})
                median = statistics.median(one[figure] for one in repeats)
                by_side.setdefault(side, []).append(median)
    return facts, samples


def run_case(worker: PeerProcess, case: int, first: int, number: int) -> dict[str, float]:
    """Figures of one run of a case, with the prompts of round `first + number`."""
    figures: dict[str, float] = worker.ask({"case": case, "round": first + number})
    return figures


# --- start -----------------------------------------------------------------------------------


def starts(
    model: str, rounds: int, checkouts: Mapping[str, Path], console: Console
) -> dict[str, list[float]]:
    """Seconds from the call of `neuroada generate` to its first token, by side."""
    ways = {side: (lambda _, c=checkout: start_s(model, c)) for side, checkout in checkouts.items()}
    return interleaved(ways, rounds, console, START)


def start_s(model: str, checkout: Path) -> float:
    """Seconds to the first byte of the answer of a fresh process."""
    command = [sys.executable, "-m", "neuroada_serve", "generate", model, "Say hi"]
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, "--max-tokens", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        cwd=checkout,  # `-m` looks there first
        env=environment_of(checkout),
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        took = time.perf_counter() - started
        _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{checkout}: {errors.decode()}")
    return took


# --- output ----------------------------------------------------------------------------------


def compared(name: str, samples: Mapping[str, Sequence[float]], limit: float) -> dict[str, Any]:
    """Both sides of one figure, the ratio after / before, and whether it is worse."""
    before, after = (samples[side] for side in SIDES)
    median = ratio(after, before)
    return {
        "before": {**spread(before), "rounds": list(before)},
        "after": {**spread(after), "rounds": list(after)},
        "ratio": median,
        "ratios": [a / b for a, b in zip(after, before, strict=True)],
        "worse": median > 1 + limit if is_time(name) else median < 1 - limit,
    }


def is_time(name: str) -> bool:
    """True for figures of which less is better; the others are rates."""
    return name == START or name.endswith(PROCESSOR)


def show(figures: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print a row per figure."""
    table = Table("figure", title="medians; ratio after / before: median (least to greatest)")
    for heading in (*SIDES, "ratio", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, figure in figures.items():
        medians = (f"{figure[side]['median']:.4g}" for side in SIDES)
        ratios = figure["ratios"]
        text = f"{figure['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        table.add_row(name, *medians, text, "worse" if figure["worse"] else "")
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
