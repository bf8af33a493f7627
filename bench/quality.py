"""What methods learn from the same data: NeuroAda, LoRA and full fine-tuning of one small base.

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
import copy
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.quality_methods import METHODS, number_accuracy, score, train
from bench.quality_rows import TASKS, batches_of, load_prepared, prepare
from neuroada_serve.benchmark.report import environment, plain
from neuroada_serve.errors import DataError, UsageError
from neuroada_serve.model.loader import (
    BaseModel,
    find_device,
    load_base,
)
from neuroada_serve.model.source import resolve_model
from neuroada_serve.plots import BLUE, GREY, RED, YELLOW, legend_beside, new_panels, png

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "neuroada-bench/1"
TUNING_SEED = 0


@dataclass(frozen=True)
class Job:
    """One run. phase: "base" (nothing is trained), "tune" or "final"."""

    task: str
    method: str
    phase: str
    seed: int
    lr: float
    steps: int

    @property
    def key(self) -> str:
        lr = f"/{self.lr:.3g}" if self.phase == "tune" else ""
        return f"{self.task}/{self.method}/{self.phase}/{self.seed}{lr}"


@dataclass(frozen=True)
class Settings:
    """What results depend on, beside the rows; runs of equal settings belong together."""

    steps: int
    tune_steps: int
    batch: int
    eval_batch: int
    seeds: int
    lr_values: int
    lr_factor: float
    max_new_tokens: int
    dtype: str
    usual_lr: dict[str, float] = field(default_factory=dict)

    def grid(self, method: str) -> list[float]:
        """Rising learning rates, `lr_factor` apart, about the method's usual one."""
        usual = self.usual_lr.get(method, METHODS[method].usual_lr)
        middle = (self.lr_values - 1) / 2
        return [usual * self.lr_factor ** (i - middle) for i in range(self.lr_values)]


# --- one run ---------------------------------------------------------------------------------


def run_job(
    job: Job, base: BaseModel, prepared: Mapping[str, Any], settings: Settings
) -> dict[str, Any]:
    """A run's record: the job's fields, "key", parameters, losses, scores, seconds and memory."""
    task = prepared["tasks"][job.task]
    cuda = base.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    record: dict[str, Any] = {**asdict(job), "key": job.key, "parameters": 0, "train_loss": []}

    def scores(model: Any) -> None:
        if cuda:
            torch.cuda.synchronize()
        record["train_s"] = time.perf_counter() - started
        if cuda:
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if job.phase != "final":
            record["tune_loss"] = score(model, task["tune"], settings.eval_batch)["loss"]
        if job.phase != "tune":
            record["evals"] = {}
            for name, found in task["evals"].items():
                record["evals"][name] = score(model, found["rows"], settings.eval_batch)
                if found["kind"] == "number":
                    record["evals"][name]["accuracy"] = number_accuracy(
                        base, model, found["rows"], settings.max_new_tokens
                    )
        record["eval_s"] = time.perf_counter() - started - record["train_s"]

    if job.phase == "base":
        scores(base.model)
        return record
    model = copy.deepcopy(base.model)
    if not cuda:  # where rows are short, the fused attention's backward is the slower one
        model.set_attn_implementation("eager")
    rows = batches_of(task["train"], settings.batch, job.steps, job.seed)
    for count, losses in train(model, METHODS[job.method], rows, job.seed, job.lr):
        record["parameters"], record["train_loss"] = count, [round(loss, 5) for loss in losses]
        scores(model)
    return record


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def work(connection: Connection, config: Mapping[str, Any]) -> None:
    """A worker: takes jobs until it is sent None, answers each with its record; ends when whoever
    started it has been killed, and not only after the run under way."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(config["threads"])
    torch.set_float32_matmul_precision("high")
    prepared = load_prepared(config["prepared"])
    settings = Settings(**config["settings"])
    base = load_base(resolve_model(config["base"]), settings.dtype, config["device"])
    if base.spec.fingerprint != prepared["fingerprint"]:
        raise DataError("the rows were prepared for another base; run --prepare with this one")
    connection.send(None)
    while (job := connection.recv()) is not None:
        try:
            record = run_job(job, base, prepared, settings)
        except Exception:  # one run's failure is no other's
            record = {**asdict(job), "key": job.key, "error": traceback.format_exc(limit=-4)}
        connection.send(plain(record))


# --- all runs --------------------------------------------------------------------------------


class Plan:
    """Which runs there are, which may start, and what they rest on."""

    def __init__(self, pairs: Sequence[tuple[str, str]], settings: Settings) -> None:
        self._pairs, self._settings = pairs, settings
        self.records: dict[str, dict[str, Any]] = {}
        self._taken: set[str] = set()

    def take(self, parts: Sequence["Part"]) -> None:
        """Records of finished parts; one that failed gives way to one that did not."""
        for record in (record for part in parts for record in part.records):
            if "error" not in record or record["key"] not in self.records:
                self.records[record["key"]] = record

    def best_lr(self, task: str, method: str) -> float | None:
        """The rate of the lowest tuning loss; None before all are known, or if none is a number."""
        losses = {}
        for job in self._tuning(task, method):
            if (record := self.records.get(job.key)) is None:
                return None
            loss = record.get("tune_loss")
            if isinstance(loss, float) and math.isfinite(loss):
                losses[job.lr] = loss
        return min(losses, key=losses.__getitem__) if losses else None

    def _tuning(self, task: str, method: str) -> list[Job]:
        steps = self._settings.tune_steps
        grid = self._settings.grid(method)
        return [Job(task, method, "tune", TUNING_SEED, lr, steps) for lr in grid]

    def jobs(self) -> Iterator[Job]:
        """All of them, in order of importance; final ones with lr nan until it is chosen."""
        for task in dict.fromkeys(task for task, _ in self._pairs):
            yield Job(task, "base", "base", TUNING_SEED, 0.0, 0)
        for i in range(self._settings.lr_values):
            for pair in self._pairs:
                yield self._tuning(*pair)[i]
        for seed in range(1, self._settings.seeds + 1):
            for pair in self._pairs:
                lr = self.best_lr(*pair)
                steps = self._settings.steps
                yield Job(*pair, "final", seed, math.nan if lr is None else lr, steps)

    def next_job(self) -> Job | None:
        """One that can start now, taken; None if all are taken or wait for others."""
        for job in self.jobs():
            if job.key not in self._taken and job.key not in self.records and job.lr >= 0:
                self._taken.add(job.key)
                return job
        return None

    def left_out(self) -> list[str]:
        return [job.key for job in self.jobs() if job.key not in self.records]


def run_all(
    plan: Plan,
    config: Mapping[str, Any],
    workers: int,
    deadline: float,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Run what the plan has over worker processes; `done` is told each record as it comes."""
    if not plan.left_out() or time.monotonic() >= deadline:
        return
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, config), daemon=True)
        process.start()
        theirs.close()
        processes[ours] = process
    busy: dict[Connection, Job | None] = dict.fromkeys(processes)  # None: it is loading
    idle: list[Connection] = []
    while busy or idle:
        while idle and time.monotonic() < deadline and (job := plan.next_job()) is not None:
            connection = idle.pop()
            connection.send(job)
            busy[connection] = job
        if not busy:
            break
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            job = busy.pop(connection)
            try:
                record = connection.recv()
            except EOFError:
                processes[connection].join()
                code = processes[connection].exitcode
                if job is not None:
                    record = {**asdict(job), "key": job.key, "error": f"exit code {code}"}
                    done(record)
                continue
            idle.append(connection)
            if record is not None:
                done(record)
    for connection in idle:
        connection.send(None)
    for process in processes.values():
        process.join()


class RunsFile:
    """OUT.runs.jsonl: a header for every machine and state of the code, each before its records.

    Every line is flushed to disk.

    Raises:
        UsageError: it is there, of other settings or rows.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.parts: list[Part] = []
        if path.exists() and path.stat().st_size:
            self.parts = read_runs(path)
            if self.parts[0].header["identity"] != header["identity"]:
                raise UsageError(f"{path} is of other settings or rows; move it or change --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if self.parts and not path.read_bytes().endswith(b"\n"):  # cut short by a kill
            with path.open("a") as file:
                file.write("\n")
        if not self.parts or self.parts[-1].made_by != Part(plain(header)).made_by:
            self.parts.append(Part(plain(header)))
            self.append(header)

    def append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass
class Part:
    """What one machine and state of the code has done. header: settings and environment()."""

    header: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def made_by(self) -> dict[str, Any]:
        names = ("commit", "modified", "versions", "hardware", "device", "workers")
        return {name: self.header.get(name) for name in names}


def read_runs(path: Path) -> list[Part]:
    """The file's parts, at least one. A line cut short by a kill is passed over."""
    parts: list[Part] = []
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "identity" in found:
            parts.append(Part(found))
        elif parts:
            parts[-1].records.append(found)
        else:
            break
    if not parts:
        raise UsageError(f"{path} is no runs file: its first line has no settings")
    return parts


# --- output ----------------------------------------------------------------------------------


def summary(header: Mapping[str, Any], plan: Plan) -> list[dict[str, Any]]:
    """A row per set and method with what its seeds gave: mean, std, min and max of each figure."""
    settings = Settings(**header["settings"])
    rows = []
    for task, method in [*((t, "base") for t in header["tasks"]), *map(tuple, header["pairs"])]:
        phase = "base" if method == "base" else "final"
        records = [
            record
            for record in plan.records.values()
            if (record["task"], record["method"], record["phase"]) == (task, method, phase)
            and "error" not in record
        ]
        row: dict[str, Any] = {"task": task, "method": method, "seeds": len(records)}
        if method != "base":
            grid, lr = settings.grid(method), plan.best_lr(task, method)
            row["lr"], row["grid"] = lr, grid
            row["tune_loss"] = [
                plan.records.get(job.key, {}).get("tune_loss") for job in plan._tuning(task, method)
            ]
            row["edge"] = lr is not None and len(grid) > 1 and lr in (grid[0], grid[-1])
        if records:
            row["parameters"] = records[0]["parameters"]
            row["train_s"] = statistics.median(record["train_s"] for record in records)
            row["eval_s"] = statistics.median(record["eval_s"] for record in records)
            row["peak_memory_gib"] = records[0].get("peak_memory_gib")
            row["evals"] = {
                name: {
                    figure: spread([record["evals"][name][figure] for record in records])
                    for figure in found
                }
                for name, found in records[0]["evals"].items()
            }
        rows.append(row)
    return rows


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    numbers = [v for v in values if isinstance(v, float | int) and math.isfinite(v)]
    if not numbers:
        return {"values": list(values), "mean": None, "std": None, "min": None, "max": None}
    return {
        "values": list(values),
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "min": min(numbers),
        "max": max(numbers),
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    for task, evals in result["evals"].items():
        title = f"{task}: accuracy in %, mean ± std (min..max) of the seeds; loss of the reference"
        table = Table("method", "parameters", "lr", title=title)
        for name, found in evals.items():
            table.add_column(name if found["kind"] != "loss" else f"{name} loss", justify="right")
            if found["kind"] != "loss":
                table.add_column("loss", justify="right")
        table.add_column("train s", justify="right")
        table.add_column("GiB", justify="right")
        majority = [
            cell
            for found in evals.values()
            for cell in (
                ["-"] if found["kind"] == "loss" else [f"{100 * found['majority']:.1f}", "-"]
            )
        ]
        table.add_row("commonest answer", "-", "-", *majority, "-", "-")
        for row in result["summary"]:
            if row["task"] != task:
                continue
            lr = "-" if row.get("lr") is None else f"{row['lr']:.2g}" + " edge" * row["edge"]
            if "evals" not in row:
                cells = ["left out"] + [""] * (len(majority) - 1)
                table.add_row(row["method"], "", lr, *cells, "", "")
                continue
            cells = []
            for name, found in evals.items():
                if found["kind"] != "loss":
                    cells.append(_cell(row["evals"][name]["accuracy"], 100, 1))
                cells.append(_cell(row["evals"][name]["loss"], 1, 3, with_range=False))
            memory = row["peak_memory_gib"]
            last = f"{row['train_s']:.1f}", "-" if memory is None else f"{memory:.1f}"
            table.add_row(row["method"], f"{row['parameters']:,}", lr, *cells, *last)
        console.print(table)
    if result["left_out"]:
        console.print(f"left out: {len(result['left_out'])} runs:", ", ".join(result["left_out"]))
    for key, error in result["errors"].items():
        console.print(f"failed: {key}: {error.strip().splitlines()[-1]}")


def _cell(found: Mapping[str, Any], scale: float, digits: int, with_range: bool = True) -> str:
    if found["mean"] is None:
        return "not a number"
    text = f"{scale * found['mean']:.{digits}f}"
    if found["std"] is not None:
        text += f" ±{scale * found['std']:.{digits}f}"
        if with_range:
            text += f" ({scale * found['min']:.{digits}f}..{scale * found['max']:.{digits}f})"
    return text


def plot(result: Mapping[str, Any], path: Path) -> None:
    panels = [(task, name) for task, evals in result["evals"].items() for name in evals]
    columns = 3
    lines = math.ceil(len(panels) / columns)
    figure, flat = new_panels(lines, columns, 6 * columns, 3.9 * lines)
    for axes, (task, name) in zip(flat, panels, strict=False):
        kind, majority = (result["evals"][task][name][key] for key in ("kind", "majority"))
        figure_name, scale = ("loss", 1) if kind == "loss" else ("accuracy", 100)
        rows = [row for row in result["summary"] if row["task"] == task and "evals" in row]
        labels = [row["method"] for row in rows if row["method"] != "base"]
        for row in rows:
            found = row["evals"][name][figure_name]
            if found["mean"] is None:
                continue
            if row["method"] == "base":
                axes.axhline(scale * found["mean"], color=GREY, linestyle="--", label="base")
                continue
            x = labels.index(row["method"])
            values = [scale * value for value in found["values"] if value is not None]
            axes.plot([x] * len(values), values, "o", color=BLUE, alpha=0.6)
            axes.plot([x], [scale * found["mean"]], "_", color=RED, markersize=16, mew=2)
        if majority is not None:
            axes.axhline(100 * majority, color=YELLOW, linestyle=":", label="commonest answer")
        axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
        axes.set(title=f"{task}: {name}", ylabel="loss" if kind == "loss" else "accuracy, %")
        legend_beside(axes)
    for axes in flat[len(panels) :]:
        axes.set_visible(False)
    path.write_bytes(png(figure))


def finish(
    header: Mapping[str, Any], parts: Sequence[Part], plan: Plan, out: Path, console: Console
) -> None:
    """Write the document and the plot, and print the table and, last, the document."""
    errors = {key: found["error"] for key, found in plan.records.items() if "error" in found}
    result = {
        **header,
        "parts": [
            part.made_by
            | {"date": part.header["date"], "runs": [record["key"] for record in part.records]}
            for part in parts
        ],
        "worker_s": sum(r.get("train_s", 0) + r.get("eval_s", 0) for r in plan.records.values()),
        "summary": summary(header, plan),
        "left_out": plan.left_out(),
        "errors": errors,
        "runs": list(plan.records.values()),
        "not_measured": [
            "bases of another size",
            "long training",
            "free generation of multiple-choice answers",
            "tuning of anything but the learning rate",
            "whole test sets",
            "memory on the CPU",
        ],
    }
    document = json.dumps(plain(result), allow_nan=False)
    out.write_text(document + "\n")
    show(result, console)
    if any("evals" in row for row in result["summary"]):
        plot(result, out.with_suffix(".png"))
    print(document)


# --- the command -----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", default="demo")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of *.jsonl.gz")
    add("--prepare", type=Path, metavar="FILE", help="write the rows as token ids, and end")
    add("--prepared", type=Path, metavar="FILE", help="rows that --prepare wrote")
    add("--merge", type=Path, nargs="+", metavar="RUNS", help="report on these, and end")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "quality.json")
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
    facts = environment()
    facts["versions"]["peft"] = metadata.version("peft")
    evals = {
        task: {
            name: {key: value for key, value in found.items() if key != "rows"}
            | {"rows": len(found["rows"])}
            for name, found in prepared["tasks"][task]["evals"].items()
        }
        for task in tasks
    }
    workers = args.workers or (8 if device.type == "cuda" else 1)
    header = {
        "schema": SCHEMA,
        "benchmark": "quality",
        **facts,
        "identity": identity,
        "settings": asdict(settings),
        "sizes": prepared["sizes"],
        "base": prepared["base"],
        "device": str(device),
        "workers": workers,
        "tasks": tasks,
        "pairs": pairs,
        "evals": evals,
    }
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
    """One report on the runs of several files of equal settings and rows."""
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
