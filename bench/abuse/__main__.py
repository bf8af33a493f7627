"""Measure what one client can do to all others.

It sends bodies that are bombs, prompts too long to fit, and opens connections that send nothing.
Starts a server of its own on loopback and abuses it for a few minutes, with bounded numbers:

- body bombs: 2 MiB of small parts in each place that takes some; meanwhile /health is asked for all
  the time, so its slowest answer shows how long the event loop was held;
- 60 clients send the largest prompt and leave at once; then another asks for one token;
- 900 clients send half of their headers; when the server closes them, and what another client sees;
- 1,200 silent connections where a process may have 1,024 descriptors; what another client sees, and
  how many lines the log gets.

`--code DIR` serves another checkout, for a comparison. Parts that OUT has of an earlier run
stay. Client and server share the processor, so times are upper bounds. Not measured: a network, a
GPU, several attackers at once.

    python -m bench.abuse [MODEL] [--rounds 3] [--only PART,PART] [--code DIR] [--out FILE]
"""

import json
import resource
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.abuse.attacks import (
    DESCRIPTORS,
    NUM_HALF_OPEN,
    NUM_LARGE,
    NUM_SILENT,
    measure_bombs,
    measure_descriptors,
    measure_half_open,
    measure_large_prompts,
)
from bench.abuse.server import Server, server
from bench.harness import ROOT, new_parser, result_of, write
from neuroada_serve.benchmark.report import commit_of


def main() -> None:
    """Run the attacks asked for, each on a server of its own."""
    parser = new_parser("abuse", __doc__, rounds=3)
    parser.add_argument("--code", type=Path, default=ROOT, help="checkout to serve")
    parser.add_argument("--wait", type=float, default=20.0, help="seconds for half-open clients")
    parser.add_argument("--only", default="bombs,large_prompts,half_open,descriptors")
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    code = args.code.resolve()
    parts: dict[str, Callable[[Server], dict[str, Any]]] = {
        "bombs": lambda running: measure_bombs(running, args.rounds),
        "large_prompts": lambda running: measure_large_prompts(running, args.rounds),
        "half_open": lambda running: measure_half_open(running, args.wait),
        "descriptors": measure_descriptors,
    }
    found: dict[str, Any] = {}
    if args.out.is_file():
        earlier = json.loads(args.out.read_text())
        found = {name: earlier[name] for name in parts if name in earlier}
    for name in args.only.split(","):
        measure = parts[name]
        with server(args.model, code, DESCRIPTORS if name == "descriptors" else None) as running:
            found[name] = measure(running)
    print_table(found)
    settings = {"model": args.model, "rounds": args.rounds}
    write(result_of("abuse", settings, found, **commit_of(code)), args.out)


def print_table(results: Mapping[str, Any]) -> None:
    """Print what others see beside each attack."""
    table = Table("abuse", "what others see", "median", "worst")

    def row(abuse: str, what: str, values: list[float], unit: str) -> None:
        if values:
            median, worst = statistics.median(values), max(values)
            table.add_row(abuse, what, f"{median:.3g} {unit}", f"{worst:.3g} {unit}")

    for name, found in results.get("bombs", {}).items():
        row(f"bomb, {name}", "event loop held", found["held_ms"], "ms")
        row("", f"refused after, {found['memory_mib']:.0f} MiB", found["answer_s"], "s")
    if large := results.get("large_prompts"):
        row("none", "one token", large["alone_s"], "s")
        row(f"{NUM_LARGE} largest prompts, left", "one token", large["after_60_left_s"], "s")
        row("", "the next", large["the_next_s"], "s")
    if half := results.get("half_open"):
        row("none", "one token", half["alone_s"], "s")
        row(f"{NUM_HALF_OPEN} half-open", "one token", half["beside_them_s"], "s")
        row("", f"{half['gone']} gone, the last after", [half["last_gone_after_s"]], "s")
    if few := results.get("descriptors"):
        row(f"{NUM_SILENT} silent", "health", [few["beside_them_s"]], "s")
        row("", f"health afterwards; {few['log_lines']} log lines", [few["afterwards_s"]], "s")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
