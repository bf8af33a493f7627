"""Time the start to the first token, by phase: `neuroada generate demo "Say hi" --max-tokens 1`.

Every round starts a fresh process on warm caches (files in memory, model converted, fingerprint
kept) that runs the real command line and notes when each phase ends; this process adds the start,
the first byte of the answer and the end, on the same clock. Processor time is the whole process's,
and tells how far other work on the machine disturbed the clock. Not measured: the first start after
a boot or an installation, a GPU.

    python -m bench.startup [MODEL] [--rounds 7] [--adapter DIR] [--out FILE]
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.harness import ROOT, interleaved, new_parser, result_of, settings_of, write

CHILD = Path(__file__).with_name("startup_child.py")
TARGET_S = 6.0  # to the first token
PHASES = {
    "interpreter": "Python, and the command line's own imports",
    "imports": "torch, transformers and the engine",
    "model": "config, modules and mapped weights",
    "tokenizer": "tokenizer and chat template",
    "engine": "fingerprint, bypass layers, adapter",
    "first token": "template, prompt of 32 tokens, sampling, text",
    "exit": "end of the process",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Start the command line once to warm the caches, then once per round."""
    parser = new_parser("startup", __doc__)
    parser.add_argument("--adapter", type=Path, help="load this adapter too and use it")
    args = parser.parse_args(argv)
    console = Console(stderr=True)

    command = ["generate", args.model, "Say hi", "--max-tokens", "1"]
    if args.adapter is not None:
        command += ["--adapter", str(args.adapter)]
    # The first start fetches, converts and hashes where that is still to do.
    [rounds] = interleaved({"start": lambda _: run_once(command)}, args.rounds, console).values()
    samples = {name: [took[name] for took in rounds] for name in rounds[0]}
    medians = {name: statistics.median(values) for name, values in samples.items()}
    explained = PHASES | {
        "to first token": f"target {TARGET_S:g} s on 2 quiet cores",
        "processor": "processor time, all phases but the last",
    }
    table = Table("phase", "contents", "median s", "worst s")
    for name, values in samples.items():
        table.add_row(name, explained[name], f"{medians[name]:.2f}", f"{max(values):.2f}")
    console.print(table)
    settings = settings_of(args, command=["neuroada", *command])
    found = {
        "load_average": os.getloadavg(),
        "target_s": TARGET_S,
        "median_s": medians,
        "samples_s": samples,
    }
    write(result_of("startup", settings, found), args.out)


def run_once(command: list[str]) -> dict[str, float]:
    """Run one fresh process: seconds of each phase."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(CHILD), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    process.stdout.read(1)
    first_token = time.monotonic()
    _, errors = process.communicate()
    ended = time.monotonic()
    if process.returncode != 0:
        sys.exit(errors.decode())
    ends = json.loads(errors.splitlines()[-1])

    took = {
        "interpreter": ends["interpreter"] - started,
        "imports": ends["imports"] - ends["interpreter"],
        "model": ends["model"] - ends["imports"],
        "tokenizer": ends["tokenizer"] - ends["model"],
        "engine": ends["engine"] - ends["tokenizer"],
        "first token": first_token - ends["engine"],
        "exit": ended - first_token,
    }
    return took | {"to first token": first_token - started, "processor": ends["processor"]}


if __name__ == "__main__":
    main()
