"""All runs of the quality benchmark: their order, their processes and the file they go to."""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from bench.quality.jobs import Job, Settings, work
from neuroada_serve.benchmark.report import plain
from neuroada_serve.errors import UsageError

TUNING_SEED = 0


class Plan:
    """All runs in order of importance, which of them may start, and the records of those done."""

    def __init__(self, pairs: Sequence[tuple[str, str]], settings: Settings) -> None:
        self._pairs, self._settings = pairs, settings
        self.records: dict[str, dict[str, Any]] = {}
        self._taken: set[str] = set()

    def take(self, parts: Sequence["Part"]) -> None:
        """Add records of finished parts; one that failed gives way to one that did not."""
        for record in (record for part in parts for record in part.records):
            if "error" not in record or record["key"] not in self.records:
                self.records[record["key"]] = record

    def best_lr(self, task: str, method: str) -> float | None:
        """Rate of the lowest tuning loss; None before all are known, or if none is a number."""
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
        """All runs, in order of importance; final ones have lr nan until it is chosen."""
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
        """Take a run that can start now; None if all are taken or wait for others."""
        for job in self.jobs():
            if job.key not in self._taken and job.key not in self.records and job.lr >= 0:
                self._taken.add(job.key)
                return job
        return None

    def left_out(self) -> list[str]:
        """Keys of runs without a record."""
        return [job.key for job in self.jobs() if job.key not in self.records]


def run_all(
    plan: Plan,
    config: Mapping[str, Any],
    workers: int,
    deadline: float,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Run the plan in worker processes; `done` is called with each record as it comes."""
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
        UsageError: the file exists and is of other settings or rows.
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
        """Write one line and wait until it is on disk."""
        with self._path.open("a") as file:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass
class Part:
    """Runs of one machine and state of the code. header: settings and environment()."""

    header: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def made_by(self) -> dict[str, Any]:
        """Machine and state of the code."""
        names = ("commit", "modified", "versions", "hardware", "device", "workers")
        return {name: self.header.get(name) for name in names}


def read_runs(path: Path) -> list[Part]:
    """Read a file's parts, at least one; a line cut short by a kill is skipped."""
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
