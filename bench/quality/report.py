"""Results of the quality benchmark: medians and spreads, table, plot and document."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import write
from bench.quality.jobs import Settings
from bench.quality.plan import Part, Plan
from neuroada_serve.benchmark.report import plain
from neuroada_serve.plots import BLUE, GREY, RED, YELLOW, legend_beside, new_panels, png


def summary(header: Mapping[str, Any], plan: Plan) -> list[dict[str, Any]]:
    """Rows per set and method with mean, std, min and max of each figure over its seeds."""
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
    """Mean, std, min and max of the values that are numbers."""
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
    """Print a table per set, then the runs that were left out or failed."""
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
    """Draw scores by method, a panel per set of rows, into a PNG file."""
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
    """Print the tables, write the document and the plot."""
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
    show(result, console)
    scored = any("evals" in row for row in result["summary"])
    write(plain(result), out, plot if scored else None)
