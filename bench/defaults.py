"""Score adapters trained with default flags on three spreadsheets of 120 rows in five classes.

For each: `neuroada train demo --data X.csv --out OUT` and nothing else, then `neuroada eval` on
rows of the same generator that training has not seen; one of them as a classifier, too. Defaults
were not chosen on these, but on the tasks of `--choosing`.

    python -m bench.defaults
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.defaults_rows import FOR_CHOICES, REPORTED, Task
from bench.harness import new_parser, result_of, settings_of, write

ROWS, FRESH = 120, 100


def main(argv: Sequence[str] | None = None) -> None:
    """Train and score on each spreadsheet; results so far are kept if the rest is interrupted."""
    parser = new_parser("defaults", __doc__, model=None, rounds=None, seed=0)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tasks", help="names, comma-separated; default all")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--fresh", type=int, default=FRESH, help="rows scored afterwards")
    parser.add_argument("--choosing", action="store_true", help="the tasks for choosing defaults")
    parser.add_argument("--classify", default="routing", help="task that is a classifier's, too")
    parser.add_argument("flags", nargs="*", help="of train, behind --, for choosing")
    args = parser.parse_args(argv)
    tasks = FOR_CHOICES if args.choosing else REPORTED
    if args.tasks:
        tasks = tuple(task for task in tasks if task.name in args.tasks.split(","))
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for task in tasks:
            kinds = ["CAUSAL_LM", *(["SEQ_CLS"] if task.name == args.classify else [])]
            for kind in kinds:
                results.append(run(task, kind, args, Path(scratch)))
                write(result_of("defaults", settings_of(args), {"tasks": results}), args.out)


def run(task: Task, kind: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train with default flags; score on rows that training has not seen."""
    rows = task.rows(args.rows, args.seed)
    fresh = task.rows(args.fresh, args.seed + 1000, frozenset(text for text, _ in rows))
    data, unseen = folder / f"{task.name}.csv", folder / f"{task.name}-fresh.csv"
    write_csv(data, rows)
    write_csv(unseen, fresh)
    out = folder / f"{task.name}-{kind}"
    flags = [*(["--task-type", kind] if kind == "SEQ_CLS" else []), *args.flags]
    command = ["train", args.model, "--data", str(data), "--out", str(out), *flags]
    started = time.monotonic()
    told = neuroada(command).stderr
    seconds = time.monotonic() - started
    metadata = json.loads((out / "adapter_config.json").read_text())["metadata"]
    scored = neuroada(
        ["eval", args.model, "--adapter", str(out), "--data", str(unseen), "--no-base", "--json"]
    )
    found = json.loads(scored.stdout)
    figure = "accuracy" if kind == "SEQ_CLS" else "exact_match"
    recipe, scores = metadata["recipe"], metadata["scores"]
    return {
        "task": task.name,
        "kind": kind,
        "rows": len(rows),
        "flags": flags,
        "heldout_rows": scores["heldout_rows"],
        "baseline": scores["baseline"][figure],
        "before": scores["before"],
        "after": scores["after"],
        "fresh_rows": len(fresh),
        f"fresh_{figure}": found[figure],
        "steps": recipe["steps"],
        "kept_step": recipe["kept_step"],
        "passes": recipe["epochs"],
        "train_seconds": round(seconds, 1),
        "ended": [line for line in told.splitlines() if line.startswith("Ended")],
        "samples": metadata["samples"],
    }


def write_csv(path: Path, rows: list[list[str]]) -> None:
    """Write a spreadsheet of texts and labels."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)


def neuroada(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run the command line; end with its output where it fails."""
    command = [sys.executable, "-m", "neuroada_serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done


if __name__ == "__main__":
    main()
