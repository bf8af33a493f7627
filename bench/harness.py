"""The frame of every script here: arguments, interleaved rounds, ratios, and the result's JSON.

A script runs as `python -m bench.NAME`. It prints tables on stderr, writes OUT (one JSON document,
and plots beside it) and prints that document as the last line of stdout. Each document names its
commit, versions, machine and settings; see `neuroada_serve/benchmark/report.py`.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from neuroada_serve.benchmark.report import environment, plain, progress_bar

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SCHEMA = "neuroada-bench/1"

K = TypeVar("K")
T = TypeVar("T")


def new_parser(
    name: str,
    description: str | None,
    *,
    model: str | None = "demo",
    rounds: int | None = 7,
    seed: int | None = None,
) -> argparse.ArgumentParser:
    """Parser of the arguments that scripts share; None leaves one out.

    Args:
        name: of the benchmark; results go to bench/results/NAME.json unless --out says otherwise.
        description: the script's docstring, whose first line is shown.
        seed: of random prompts, rows and arrivals.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=(description or "").splitlines()[0]
    )
    if model is not None:
        parser.add_argument("model", nargs="?", default=model, help="base model")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="samples of every figure")
    if seed is not None:
        parser.add_argument("--seed", type=int, default=seed, help="of everything drawn at random")
    out = RESULTS / f"{name}.json"
    parser.add_argument("--out", type=Path, default=out, help="JSON to write; plots go beside it")
    return parser


def interleaved(
    ways: Mapping[K, Callable[[int], T]],
    rounds: int,
    console: Console,
    label: str = "measuring",
    warm_up: bool = True,
) -> dict[K, list[T]]:
    """Run each way once per round, in turn, so that drift of the machine hits all alike.

    Every second round runs in the opposite order: none always follows the same other one.

    Args:
        ways: by name, called with the number of the round.
        warm_up: first run each way once with a number that no round has, and drop what it returns.

    Returns:
        By name, one result per round.
    """
    names = list(ways)
    samples: dict[K, list[T]] = {name: [] for name in names}
    with progress_bar(console) as progress:
        task = progress.add_task(label, total=(rounds + warm_up) * len(ways))
        for number in range(-1 if warm_up else 0, rounds):
            for name in names if number % 2 == 0 else reversed(names):
                found = ways[name](number if number >= 0 else rounds)
                if number >= 0:
                    samples[name].append(found)
                progress.update(task, advance=1, refresh=True)
    return samples


def ratio(some: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of some samples."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def settings_of(args: argparse.Namespace, **resolved: Any) -> dict[str, Any]:
    """Arguments as given but --out, CPU threads, and what stood for `auto`."""
    import torch

    given = {name: value for name, value in vars(args).items() if name != "out"}
    return {**given, "threads": torch.get_num_threads(), **resolved}


def result_of(
    name: str, settings: Mapping[str, Any], found: Mapping[str, Any], **facts: Any
) -> dict[str, Any]:
    """Document of a benchmark: name, date, commit, versions, machine, settings, then its figures.

    Args:
        facts: replace entries of `environment()`, such as the commit of another checkout.
    """
    document = {
        "schema": SCHEMA,
        "benchmark": name,
        **environment(),
        **facts,
        "settings": dict(settings),
        **found,
    }
    plained: dict[str, Any] = plain(document)
    return plained


def write(
    result: Mapping[str, Any],
    out: Path,
    plot: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> None:
    """Write the JSON and the plot, and print the JSON as the last line of stdout.

    Args:
        plot: draws the result into a PNG file.
    """
    document = json.dumps(result, allow_nan=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document + "\n")
    if plot is not None:
        plot(result, out.with_suffix(".png"))
    print(document, flush=True)
