"""Results of the sharing benchmark: lines and plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.sharing.prefix import SYSTEM_TOKENS, USER_TOKENS
from bench.sharing.tenants import DEMANDS, TENANT_CASES
from neuroada_serve.plots import legend_beside, new_panels, png


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print a line per case."""
    for name in ("room for all", "room for three"):
        row = result["turns"][name]
        console.print(
            f"{name}: ttft p50 {row['ttft_ms_p50']:.0f} p99 {row['ttft_ms_p99']:.0f} ms, "
            f"{row['p99_to_p50']:.1f} times; itl p50 {row['itl_ms_p50']:.0f} p99 "
            f"{row['itl_ms_p99']:.0f}"
        )
    for case in TENANT_CASES:
        row = result["tenants"][case]
        rates = {name: round(rate) for name, rate in row["tokens_per_s"].items()}
        console.print(f"{case}: tokens/s {rates}, Jain's index {row['jain_index']:.3f}")
    row = result["prefix"]
    console.print(f"prefix: ttft ms {row['ttft_ms']}, hit/miss {row['hit_to_miss']:.3f}")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw first tokens, tenants' tokens and prefixes into a PNG file."""
    figure, (left, middle, right) = new_panels(1, 3, 15, 3.6)
    for name in ("room for all", "room for three"):
        every = sorted(t for times in result["turns"][name]["all_ttft_ms"] for t in times)
        left.plot(every, [(i + 1) / len(every) for i in range(len(every))], label=name)
    left.set(xlabel="time to first token, ms", ylabel="share of requests", xlim=(0, None))
    legend_beside(left, "six adapters wanted")
    names, width = list(DEMANDS), 0.27
    cases = [case for case in TENANT_CASES if case in result["tenants"]]
    for i, case in enumerate(cases):
        rates = [result["tenants"][case]["tokens_per_s"][name] for name in names]
        middle.bar([j + i * width for j in range(len(names))], rates, width, label=case)
    middle.set_xticks(
        [j + width for j in range(len(names))],
        [f"{name},\nasks {share}" for name, share in DEMANDS.items()],
    )
    middle.set(ylabel="output tokens/s, at twice the load")
    legend_beside(middle)
    ttft = result["prefix"]["ttft_ms"]
    right.bar(list(ttft), list(ttft.values()))
    right.set(ylabel=f"time to first token, ms\n({SYSTEM_TOKENS} + {USER_TOKENS} tokens)")
    path.write_bytes(png(figure))
