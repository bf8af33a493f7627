"""One run of the quality benchmark, and the process that takes them."""

import copy
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.quality.methods import METHODS, number_accuracy, score, train
from bench.quality.rows import batches_of, load_prepared
from neuroada_serve.benchmark.report import plain
from neuroada_serve.errors import DataError
from neuroada_serve.model.loader import BaseModel, load_base
from neuroada_serve.model.source import resolve_model


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
        """Name of the run, the same in every process."""
        lr = f"/{self.lr:.3g}" if self.phase == "tune" else ""
        return f"{self.task}/{self.method}/{self.phase}/{self.seed}{lr}"


@dataclass(frozen=True)
class Settings:
    """Settings that results depend on, beside the rows; runs of equal settings belong together."""

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


def run_job(
    job: Job, base: BaseModel, prepared: Mapping[str, Any], settings: Settings
) -> dict[str, Any]:
    """Train and score. The record has the job's fields, parameters, losses, seconds and memory."""
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
    """Take jobs until None comes, and answer each with its record.

    The process ends as soon as the one that started it is gone, even in the middle of a run.
    """
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
