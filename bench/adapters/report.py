"""Results of the benchmark of many adapters: tables and plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.adapters.cold import COLD_PLACES
from bench.adapters.throughput import BESIDE
from neuroada_serve.plots import GREY, RED, legend_beside, new_panels, png


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print a table or line per part."""
    table = Table("adapters", "listening s", "first token s", title="start")
    for row in result["start"]:
        table.add_row(
            f"{row['adapters']}", f"{row['listening_s']:.1f}", f"{row['first_token_s']:.1f}"
        )
    console.print(table)
    table = Table("adapters", "tokens/s", "of distinct", "of one", "read", title="throughput")
    for row in result["throughput"]["cases"]:
        table.add_row(
            row["case"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['ratio_to_distinct']:.3f}",
            f"{row['ratio_to_one']:.3f}",
            f"{row['adapters_read']}",
        )
    console.print(table)
    console.print("memory", result["memory"])
    for load, row in result["cold"].items():
        said = {place: f"{ms:.2f}" for place, ms in row["added_ms"].items()}
        console.print(f"cold, {load}: added ms {said}; a step {row['decode_step_ms']:.1f} ms")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw throughput, starts and first tokens into a PNG file."""
    figure, (left, middle, right) = new_panels(1, 3, 17, 3.6)
    cases = {row["case"]: row for row in result["throughput"]["cases"]}
    counts = [str(count) for count in result["settings"]["counts"]]
    spread = [cases[count]["rounds_tokens_per_s"] for count in counts]
    left.boxplot(
        spread,
        tick_labels=[f"{int(count):,}" for count in counts],
        medianprops={"color": RED},
    )
    beside = cases[BESIDE]["tokens_per_s"]
    left.axhline(beside, linestyle="--", color=GREY, label="16 on the device,\nall distinct")
    left.set(xlabel="adapters registered", ylabel="output tokens/s", ylim=(0, None))
    legend_beside(left)
    started = result["start"]
    middle.plot(counts, [row["first_token_s"] for row in started], "o-", label="first token")
    middle.plot(counts, [row["listening_s"] for row in started], "o-", label="listening")
    middle.set(xlabel="adapters registered", ylabel="seconds from the call", ylim=(0, None))
    legend_beside(middle)
    loads = list(result["cold"])
    width = 0.8 / len(COLD_PLACES)
    for i, place in enumerate(COLD_PLACES):
        values = [result["cold"][load]["ttft_ms"][place] for load in loads]
        right.bar([j + i * width for j in range(len(loads))], values, width, label=place)
    right.set(ylabel="time to first token, ms")
    right.set_xticks([j + 1.5 * width for j in range(len(loads))], loads)
    legend_beside(right, "adapter is on")
    path.write_bytes(png(figure))
