"""Results of the merge benchmark: lines, table and plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.merge.modes import LOADS, MODES
from bench.merge.swap import LARGE_K
from neuroada_serve.plots import BLUE, GREY, legend_beside, new_panels, png


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print swaps, costs and rates."""
    ours, theirs = result["swap"]["ours_ms"], result["swap"]["peft_lora_r8_ms"]
    for name, ms in ours.items():
        times = result["swap"]["times_faster"][name]
        console.print(f"swap {name}: {ms:.2f} ms; PEFT LoRA r=8 {theirs:.0f} ms: {times:.0f} times")
    console.print("rotations bit-exact:", result["rotations"]["bit_exact"])
    for k, found in result["costs"].items():
        console.print(k, {name: value for name, value in found.items() if name != "steps"})
    table = Table("load", *MODES, "auto/never", "auto/named", "switches", title="tokens per second")
    for k, loads in result["modes"].items():
        for load, row in loads.items():
            rates = [f"{row['tokens_per_s'][mode]:.0f}" for mode in MODES]
            ratios = [f"{row['auto_to_never']:.3f}", f"{row['auto_to_named']:.3f}"]
            table.add_row(f"{load}, {k}", *rates, *ratios, str(row["auto_switches"]))
    console.print(table)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw swaps, and rates by mode and load, into a PNG file."""
    figure, axes = new_panels(1, 1 + len(result["modes"]), 17, 3.8)
    left = axes[0]
    swap = result["swap"]
    names = ["ours, k=1", f"ours, k={LARGE_K}", "PEFT LoRA r=8"]
    values = [*swap["ours_ms"].values(), swap["peft_lora_r8_ms"]]
    left.barh(names, values, color=[BLUE, BLUE, GREY])
    left.set(xscale="log", xlabel="ms to put another adapter into the weights")
    left.set_xlim(right=8 * max(values))  # room for the label
    left.grid(visible=False, axis="y")
    left.bar_label(left.containers[0], fmt="%.2f", padding=3)
    width = 0.27
    for right, (k, loads) in zip(axes[1:], result["modes"].items(), strict=True):
        for i, mode in enumerate(MODES):
            rates = [loads[load]["tokens_per_s"][mode] for load in LOADS]
            places = [place + i * width for place in range(len(LOADS))]
            right.bar(places, rates, width, label=mode)
        right.set_xticks([place + width for place in range(len(LOADS))], LOADS)
        right.set(ylabel="output tokens/s", title=k)
    legend_beside(axes[-1], "merge mode")
    path.write_bytes(png(figure))
