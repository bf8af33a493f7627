"""Compare what methods learn from the same data: NeuroAda, LoRA and full fine-tuning of one base.

Two sets to train on: commonsense_15k, then scored on its validation rows, BoolQ and ARC-Easy, and
math_10k, scored on held-out rows of its own, MultiArith and AddSub. For one set and seed every
method gets the same batches in the same order, the same AdamW (no weight decay, 10 % warm-up,
linear decay, gradients clipped to 1) and the loss on answers alone. Learning rates are tuned alike:
as many values for each method, on a log grid about its usual one, by the loss on rows kept out of
training, with one seed and fewer steps; then the best one with every seed. A best value at the edge
of its grid is flagged: a better one may lie outside.

    NeuroAda    float32 values, weights in the base's dtype; all linear layers of the blocks.
                Magnitude, random (of the seed) or gradient (the base's, of the first batches) index
    LoRA        peft, float32, alpha = 2 r, no dropout, the same layers; ranks whose parameters are
                those of k=8, eight times as many, and rank 1: the least there is, often above k=1's
    full        every parameter, embeddings and norms too, with a float32 master copy

A multiple-choice row is right if, after the answer's beginning that all its options share, the
right option's next token is the likeliest of the options'. Word problems are answered greedily by
the engine, from weights of the base's dtype, into which LoRA is merged; one is right if the last
number of the greedy answer is within 0.001 of the true one. `loss` is that of the reference answer.

Runs are spread over --workers processes, each line of OUT.runs.jsonl is one that is done; started
again with the same settings, it goes on from there, if need be on another machine: `parts` in the
report says which made which runs. --minutes: no run is started after that.

    python -m bench.quality --prepare rows.json.gz                  needs the data, not a GPU
    python -m bench.quality --prepared rows.json.gz --base FOLDER --minutes 4 --workers 8
    python -m bench.quality --prepared rows.json.gz --part 1/2      every second set and method
    python -m bench.quality --merge a.runs.jsonl b.runs.jsonl       reports on parts together

Not measured: bases of another size, long training (the longest here is some hundred steps), free
generation of multiple-choice answers, other layers or layouts for LoRA, tuning of anything but the
learning rate, whole test sets (rows are drawn once, the same for all). Memory on the CPU is not
taken. Seconds and memory are those of runs that share a machine, so they compare roughly.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.harness import ROOT, new_parser, result_of
from bench.quality.jobs import Settings
from bench.quality.methods import METHODS
from bench.quality.plan import Plan, RunsFile, read_runs, run_all
from bench.quality.report import finish
from bench.quality.rows import TASKS, load_prepared, prepare
from neuroada_serve.errors import UsageError
from neuroada_serve.model.loader import find_device, load_base
from neuroada_serve.model.source import resolve_model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 2 for a mistake in the arguments."""
    started = time.monotonic()
    args = _parser().parse_args(argv)
    console = Console(stderr=True, width=200)
    try:
        _run(args, started, console)
    except UsageError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("quality", __doc__, model=None, rounds=None)
    add = parser.add_argument
    add("--base", default="demo")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of *.jsonl.gz")
    add("--prepare", type=Path, metavar="FILE", help="write the rows as token ids, and end")
    add("--prepared", type=Path, metavar="FILE", help="rows that --prepare wrote")
    add("--merge", type=Path, nargs="+", metavar="RUNS", help="report on these, and end")
    add("--tasks", default=",".join(TASKS))
    add("--methods", default=",".join(METHODS))
    add("--part", default="1/1", metavar="I/N")
    add("--minutes", type=float, default=1e6)
    add("--workers", type=int, help="processes; default 8 on a GPU, 1 without")
    add("--device", default="auto")
    add("--dtype", default="auto", help="of the weights; the base's own by default")
    add("--steps", type=int, default=200)
    add("--tune-steps", type=int, default=80)
    add("--batch", type=int, default=16)
    add("--eval-batch", type=int, default=64)
    add("--seeds", type=int, default=3)
    add("--lr-values", type=int, default=4)
    add("--lr-factor", type=float, default=2.5)
    add("--usual-lr", nargs="*", default=[], metavar="METHOD=LR", help="other middles of grids")
    add("--max-new-tokens", type=int, default=128)
    add("--train-rows", type=int, default=4000)
    add("--tune-rows", type=int, default=300)
    add("--eval-rows", type=int, default=1000)
    add("--max-length", type=int, default=256, help="longer rows are left out, in tokens")
    return parser


def _run(args: argparse.Namespace, started: float, console: Console) -> None:
    if args.merge:
        _merge(args, console)
        return
    device = find_device(args.device)
    rows = args.prepared
    if args.prepare or rows is None:
        rows = args.prepare or args.out.with_suffix(".rows.json.gz")
        base = load_base(resolve_model(args.base), device="cpu")
        rows.parent.mkdir(parents=True, exist_ok=True)
        document = json.dumps(prepare(base, args.data, args), separators=(",", ":"))
        rows.write_bytes(gzip.compress(document.encode(), mtime=0))
        del base
    prepared = load_prepared(rows)
    if args.prepare:
        for name, task in prepared["tasks"].items():
            evals = {found: len(value["rows"]) for found, value in task["evals"].items()}
            console.print(name, {part: len(task[part]) for part in ("train", "tune")}, evals)
        console.print(f"{rows}: {rows.stat().st_size / 1e6:.1f} MB")
        return

    tasks, methods = _names(args.tasks, TASKS), _names(args.methods, METHODS)
    number, count = _part(args.part)
    pairs = [(task, method) for method in methods for task in tasks][number - 1 :: count]
    usual = {method: METHODS[method].usual_lr for method in methods}
    for given in args.usual_lr:
        name, _, value = given.partition("=")
        _names(name, METHODS)
        usual[name] = float(value)
    names = (
        *("steps", "tune_steps", "batch", "eval_batch", "seeds", "lr_values", "lr_factor"),
        *("max_new_tokens", "dtype"),
    )
    settings = Settings(**{name: getattr(args, name) for name in names}, usual_lr=usual)
    identity = {
        "settings": asdict(settings),
        "rows_sha256": hashlib.sha256(gzip.decompress(rows.read_bytes())).hexdigest(),
    }
    evals = {
        task: {
            name: {key: value for key, value in found.items() if key != "rows"}
            | {"rows": len(found["rows"])}
            for name, found in prepared["tasks"][task]["evals"].items()
        }
        for task in tasks
    }
    workers = args.workers or (8 if device.type == "cuda" else 1)
    header = result_of(
        "quality",
        asdict(settings),
        {
            "identity": identity,
            "sizes": prepared["sizes"],
            "base": prepared["base"],
            "device": str(device),
            "workers": workers,
            "tasks": tasks,
            "pairs": pairs,
            "evals": evals,
        },
    )
    header["versions"]["peft"] = metadata.version("peft")
    plan = Plan(pairs, settings)
    runs = RunsFile(args.out.with_suffix(".runs.jsonl"), header)
    plan.take(runs.parts)
    for key in [key for key, record in plan.records.items() if "error" in record]:
        del plan.records[key]  # tried again

    def done(record: dict[str, Any]) -> None:
        runs.parts[-1].records.append(record)
        plan.records[record["key"]] = record
        runs.append(record)
        what = record.get("evals") or record.get("tune_loss") or record.get("error")
        spent = f"{time.monotonic() - started:6.1f} s"
        console.print(spent, record["key"], f"{record.get('train_s', 0):.1f} s", what, markup=False)

    config = {
        "prepared": rows,
        "settings": asdict(settings),
        "base": args.base,
        "device": args.device,
        "threads": max(1, len(os.sched_getaffinity(0)) // workers),
    }
    try:
        run_all(plan, config, workers, started + 60 * args.minutes, done)
    finally:
        finish(header, runs.parts, plan, args.out, console)


def _names(given: str, known: Mapping[str, Any]) -> list[str]:
    names = given.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def _part(given: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", given)
    if found is None or int(found[1]) > int(found[2]):
        raise UsageError(f"--part {given}: give I/N with I from 1 to N, such as 1/2")
    return int(found[1]), int(found[2])


def _merge(args: argparse.Namespace, console: Console) -> None:
    """Report on the runs of several files of equal settings and rows together."""
    files = [read_runs(path) for path in args.merge]
    headers = [found[0].header for found in files]
    header = dict(headers[0])
    for path, other in zip(args.merge, headers, strict=True):
        if other["identity"] != header["identity"]:
            raise UsageError(f"{path} is of other settings or rows than {args.merge[0]}")
    pairs = {tuple(pair) for other in headers for pair in other["pairs"]}
    header["pairs"] = [(t, m) for m in METHODS for t in TASKS if (t, m) in pairs]
    header["tasks"] = [task for task in TASKS if any(task in other["tasks"] for other in headers)]
    header["evals"] = {task: found for other in headers for task, found in other["evals"].items()}
    plan = Plan(header["pairs"], Settings(**header["settings"]))
    parts = [part for found in files for part in found]
    plan.take(parts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    finish(header, parts, plan, args.out, console)


if __name__ == "__main__":
    sys.exit(main())
