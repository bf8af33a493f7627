"""Results of the training benchmark: ratios between methods, table and plot."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import ratio
from neuroada_serve.plots import BLUE, GREY, new_panels, png


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians per method, and their ratios to those of other methods; of times within a round."""
    made: dict[str, Any] = {}
    for name, one in found.items():
        if "left_out" in one:
            continue
        made[name] = {"step_s": statistics.median(one["step_s"])}
        made[name]["extra_gib"] = one["extra_bytes"] / 2**30
        if "peak_bytes" in one:
            made[name]["peak_gib"] = one["peak_bytes"] / 2**30
        for other in found:
            beside = found[other]
            if other == name or "left_out" in beside or other.startswith("neuroada"):
                continue
            memory = "peak_bytes" if "peak_bytes" in one else "extra_bytes"
            made[name][f"of {other}"] = {
                "step": ratio(one["step_s"], beside["step_s"]),
                "memory": one[memory] / beside[memory] if beside[memory] else None,
            }
    return made


def show(found: dict[str, Any], made: dict[str, Any], console: Console) -> None:
    """Print a row per method."""
    table = Table("method", "trained", "step s", "of official k=8", "memory GiB", "of official k=8")
    for name, one in found.items():
        if name not in made:
            table.add_row(name, "", one["left_out"])
            continue
        mine = made[name]
        ratio = mine.get("of official k=8", {})
        memory = mine.get("peak_gib", mine["extra_gib"])
        shares = [f"{ratio[what]:.2f}" if ratio.get(what) else "" for what in ("step", "memory")]
        cells = [f"{one['parameters']:,}", f"{mine['step_s']:.3f}", shares[0], f"{memory:.2f}"]
        table.add_row(name, *cells, shares[1])
    console.print(table)


def title_of(settings: Mapping[str, Any]) -> str:
    """Model, dtype and batch."""
    size = f"{settings['rows']} x {settings['width']}"
    return f"{settings['model']}, {settings['dtype']}, batch {size}"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw seconds and memory by method into a PNG file."""
    found, made = result["methods"], result["summary"]
    names = list(reversed(list(made)))
    colors = [BLUE if name.startswith("neuroada") else GREY for name in names]
    figure, (left, right) = new_panels(1, 2, 12, 0.9 + 0.3 * len(names), sharey=True)
    left.barh(names, [made[name]["step_s"] for name in names], color=colors)
    for place, name in enumerate(names):
        steps = found[name]["step_s"]
        left.plot(steps, [place] * len(steps), ".", color="black", markersize=3)
    left.set(xlabel="seconds per step; dots: every step")
    whole = "peak_gib" in made[names[0]]
    kind = "peak_gib" if whole else "extra_gib"
    right.barh(names, [made[name][kind] for name in names], color=colors)
    right.set(xlabel="peak GiB" + ("" if whole else " above what was loaded"))
    for side, form in ((left, "%.3g"), (right, "%.2f")):
        side.bar_label(side.containers[0], fmt=form, padding=12, fontsize=8)
        side.grid(visible=False, axis="y")
        side.set_xlim(right=1.15 * side.get_xlim()[1])
    figure.suptitle(title_of(result["settings"]))
    path.write_bytes(png(figure))
