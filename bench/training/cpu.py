"""Training steps on the CPU: a process per method, steps in turn."""

import argparse
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.harness import ROOT, interleaved
from bench.training.methods import Job, Method, random_batch
from neuroada_serve.benchmark.report import progress_bar


def work(model_name: str, method: Method, dtype: str, rows: int, width: int) -> None:
    """Take a step for every line on stdin, in a process of one method, and report its time."""
    from neuroada_serve.model.loader import load_base
    from neuroada_serve.model.source import resolve_model

    base = load_base(resolve_model(model_name), dtype=dtype, device="cpu")
    batch = random_batch(rows, width, base.model.config.vocab_size, "cpu")
    with ExitStack() as stack:
        job = Job(base.model, method, batch, stack)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        loaded = _memory_bytes("VmRSS")
        print(json.dumps({"parameters": job.parameters, "loaded_bytes": loaded}), flush=True)
        for _ in sys.stdin:
            started, cpu = time.perf_counter(), _cpu_seconds()
            job.step()
            found = {
                "step_s": time.perf_counter() - started,
                "cpu_s": _cpu_seconds() - cpu,
                "extra_bytes": _memory_bytes("VmHWM") - loaded,
            }
            print(json.dumps(found), flush=True)


def _memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class MethodProcess:
    """Process of one method, from outside."""

    def __init__(self, method: Method, arguments: list[str], trimmed: bool = False) -> None:
        own = ["--work", json.dumps(asdict(method))]
        trim = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.training", *arguments, *own],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(trim if trimmed else {})},
        )
        self.facts = self._read()

    def step(self) -> dict[str, Any]:
        """Have it take a step: its seconds, processor seconds and extra bytes at the peak."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_read` says what has become of it
        return self._read()

    def close(self) -> None:
        """End its input and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            hint = "; out of memory? measure fewer with --only" if code == -signal.SIGKILL else ""
            raise RuntimeError(f"a worker ended with code {code}{hint}")
        found: dict[str, Any] = json.loads(line)
        return found


def measure_cpu(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Per method its parameters, extra bytes at the peak, and seconds of every step."""
    arguments = [args.model, "--dtype", args.dtype, "--rows", str(args.rows)]
    arguments += ["--width", str(args.width)]
    found: dict[str, Any] = {}

    # 1. Memory, one after the other.
    with progress_bar(console) as progress:
        for method in progress.track(args.methods, description="memory"):
            process = MethodProcess(method, arguments, trimmed=True)
            peaks = [process.step()["extra_bytes"] for _ in range(2)]
            process.close()
            found[method.name] = {**process.facts, "extra_bytes": max(peaks)}

    # 2. Time, in turn; the first step, which makes the optimizer's state, warms up.
    processes = {method.name: MethodProcess(method, arguments) for method in args.methods}
    ways = {name: (lambda _, p=process: p.step()) for name, process in processes.items()}
    for name, steps in interleaved(ways, args.rounds, console, "steps").items():
        for figure in ("step_s", "cpu_s"):
            found[name][figure] = [step[figure] for step in steps]
        processes[name].close()
    return found
