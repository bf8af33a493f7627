"""Samples, checks and targets of the GPU benchmark, and the clock that ends it."""

import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import ratio as ratio_of

# name -> (most allowed, numerator, denominator)
TARGETS: dict[str, tuple[float, str, str]] = {
    "base step at batch 1, of the floor": (1.25, "decode/1/base", "floor/1/base"),
    "64 distinct k=1, of the base step": (1.03, "decode/64/k1/64", "decode/64/base"),
    "256 distinct k=1, of the base step": (1.08, "decode/256/k1/256", "decode/256/base"),
    "64 distinct k=8, of the base step": (1.15, "decode/64/k8/64", "decode/64/base"),
    "prefill k=1, of the base": (1.05, "prefill/k1/1/best", "prefill/base/1"),
    "prefill k=1 of four adapters, of the base": (1.06, "prefill/k1/4/best", "prefill/base/4"),
    "decode attention over blocks, 64 x 1,024, of contiguous": (
        *(1.02, "attention/64x1024/paged", "attention/64x1024/contiguous"),
    ),
    "decode attention over blocks, 1 x 4,096, of contiguous": (
        *(1.02, "attention/1x4096/paged", "attention/1x4096/contiguous"),
    ),
    "chunk of 512 after 4,096, of SDPA on gathered": (
        1.0,
        "chunk attention/512 after 4096/paged",
        "chunk attention/512 after 4096/SDPA on gathered",
    ),
    "mixed step of the base, of its parts one after the other": (
        *(1.0, "mixed/base/both", "mixed/base/one after the other"),
    ),
    "mixed step of four adapters k=1, of the base's": (1.06, "mixed/k1/both", "mixed/base/both"),
    "step with text made meanwhile, of text in between": (
        *(1.0, "text/meanwhile", "text/in between"),
    ),
    "batch of 10,000 resident k=1, of one of 64": (1.05, "resident/many", "resident/few"),
    "swap of the merged adapter k=1, of 1 ms": (1.0, "swap/k1", "one millisecond"),
}


@dataclass
class Report:
    """Everything measured, raw, and the deadline after which no part starts."""

    deadline: float
    device: torch.device
    samples_ms: dict[str, list[float]] = field(default_factory=dict)
    floors_ms: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def may_start(self, name: str, seconds: float) -> bool:
        """True where there is time for this; otherwise note it as left out."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.skipped.append(name)
        return False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part, and note its failure without ending the others."""
        started = time.monotonic()
        try:
            yield
        except Exception:
            self.errors[name] = traceback.format_exc(limit=-6)
            print(f"{name} failed\n{self.errors[name]}", file=sys.stderr)
        seconds = time.monotonic() - started
        self.facts.setdefault("seconds", {})[name] = round(seconds, 1)
        Console(stderr=True).print(f"{name}: {seconds:.0f} s")

    def median(self, name: str) -> float | None:
        """Median of samples, or a floor; None where it was not measured."""
        if name in self.floors_ms:
            return self.floors_ms[name]
        values = self.samples_ms.get(name)
        return statistics.median(values) if values else None


def time_ms(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Time a call in milliseconds: CUDA events around `repeats` calls without waiting between."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) * 1000 / repeats
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeats


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per millisecond that a copy on the device reads and writes."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [time_ms(lambda: target.copy_(source), device, 3) for _ in range(6)][1:]
    return 2 * num_bytes / statistics.median(times)


def met_targets(report: Report) -> dict[str, dict[str, Any]]:
    """Measured ratio of each target, the most allowed, and `met`; None where unmeasured."""
    found: dict[str, dict[str, Any]] = {}
    for name, (most, numerator, denominator) in TARGETS.items():
        a, b = report.samples_ms.get(numerator), report.samples_ms.get(denominator)
        ratio: float | None = None
        if a and b and len(a) == len(b):  # of one round each, so that drift hits both
            ratio = ratio_of(a, b)
        elif a and denominator in report.floors_ms:
            ratio = statistics.median(a) / report.floors_ms[denominator]
        found[name] = {
            "ratio": ratio,
            "at_most": most,
            "met": None if ratio is None else ratio <= most,
        }
    return found


def show(report: Report, targets: dict[str, dict[str, Any]], console: Console) -> None:
    """Print samples beside their base and floor, then targets and checks."""
    table = Table("measured", "ms (median)", "of base", "floor ms", "of floor")
    for name in report.samples_ms:
        ms = report.median(name)
        assert ms is not None
        storey, batch, *_ = [*name.split("/"), "", ""]
        base = {"decode": f"decode/{batch}/base", "lora": f"decode/{batch}/base"}.get(storey)
        if storey == "prefill":
            base = f"prefill/base/{name.split('/')[2]}" if name.count("/") > 1 else None
        base_ms = None if base is None else report.median(base)
        floor = report.floors_ms.get(name.replace("decode/", "floor/"))
        table.add_row(
            name,
            f"{ms:.3f}",
            "" if base_ms is None else f"{ms / base_ms:.3f}",
            "" if floor is None else f"{floor:.3f}",
            "" if floor is None else f"{ms / floor:.2f}",
        )
    console.print(table)
    goals = Table("target", "measured", "at most", "met")
    for name, goal in targets.items():
        ratio = "not measured" if goal["ratio"] is None else f"{goal['ratio']:.3f}"
        goals.add_row(name, ratio, f"{goal['at_most']}", str(goal["met"]))
    console.print(goals)
    for name, launches in report.facts.get("launches", {}).items():
        console.print(f"{launches['a layer']:.1f} launches a layer: {name}")
    for name in ("warm-up", "filled card"):
        for fact, value in report.facts.get(name, {}).items():
            console.print(f"{name}, {fact}: {value}")
    for name, passed in report.checks.items():
        console.print(f"{'pass' if passed else '[red]FAIL[/red]'}  {name}")
    if report.skipped:
        console.print(f"left out for time: {len(report.skipped)} parts")
