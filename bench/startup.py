"""Process start to first token, by phase: `neuroada generate demo "Say hi" --max-tokens 1`.

Every round starts a fresh process on warm caches (files in memory, model converted, fingerprint
kept) that runs the real command line and notes when each phase ends; this process adds the start,
the first byte of the answer and the end, on the same clock. Processor time is the whole process's,
and tells how far other work on the machine disturbed the clock. Prints a table, writes JSON; its
last line is that JSON. Not measured here: the first start after a boot or an installation, a GPU,
models beyond the demo.

    python bench/startup.py [--rounds 7] [--adapter DIR] [--out FILE]
"""

import argparse
import atexit
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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


def main() -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from neuroada_serve.benchmark.report import hardware

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--adapter", type=Path, help="load this adapter too and use it")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "startup.json")
    args = parser.parse_args()

    command = ["generate", "demo", "Say hi", "--max-tokens", "1"]
    if args.adapter is not None:
        command += ["--adapter", str(args.adapter)]
    run_once(command)  # fetches, converts and hashes where that is still to do; warms the caches
    samples: dict[str, list[float]] = {
        name: [] for name in [*PHASES, "to first token", "processor"]
    }
    for _ in track(range(args.rounds), "rounds", console=Console(stderr=True)):
        for name, seconds in run_once(command).items():
            samples[name].append(seconds)

    medians = {name: statistics.median(values) for name, values in samples.items()}
    table = Table("phase", "what it is", "median s", "worst s")
    for name, values in samples.items():
        what = (
            PHASES.get(name)
            or {
                "to first token": f"target {TARGET_S:g} s on 2 quiet cores",
                "processor": "processor time, all phases but the last",
            }[name]
        )
        table.add_row(name, what, f"{medians[name]:.2f}", f"{max(values):.2f}")
    Console(stderr=True).print(table)
    result = {
        "benchmark": "startup",
        "date": date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout.strip(),
        "hardware": hardware(),
        "load_average": os.getloadavg(),
        "versions": {
            name: version(name)
            for name in ("neuroada-serve", "torch", "transformers", "tokenizers")
        }
        | {"python": platform.python_version()},
        "settings": {
            "command": ["neuroada", *command],
            "rounds": args.rounds,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "target_s": TARGET_S,
        "median_s": medians,
        "samples_s": samples,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def run_once(command: list[str]) -> dict[str, float]:
    """Seconds of each phase of one fresh process."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
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


def child(command: list[str]) -> None:
    """Run the real command line, noting when each phase ends; the notes go to stderr at the end."""
    from neuroada_serve.cli import ask
    from neuroada_serve.cli.main import main
    from neuroada_serve.config import EngineConfig

    ends = {"interpreter": time.monotonic()}

    def noted(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            ends[phase] = time.monotonic()
            return result

        return run

    def when_imported(config: EngineConfig) -> None:
        """Settings are the first thing that is made once everything is imported."""
        check(config)
        ends["imports"] = time.monotonic()
        loader = sys.modules["neuroada_serve.model.loader"]
        for phase in ("model", "tokenizer"):
            setattr(loader, f"load_{phase}", noted(getattr(loader, f"load_{phase}"), phase))

    check = EngineConfig.__post_init__
    EngineConfig.__post_init__ = when_imported
    ask.llm_with = noted(ask.llm_with, "engine")
    sys.argv = ["neuroada", *command]

    def tell() -> None:
        print(json.dumps(ends | {"processor": time.process_time()}), file=sys.stderr)

    atexit.register(tell)
    main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
