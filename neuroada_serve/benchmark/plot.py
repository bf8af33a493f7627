"""The plot of a benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

from neuroada_serve.plots import BLUE, GREY, RED, new_panels, png

_COLORS = {"neuroada": BLUE, "vllm": RED, "peft": GREY}


def case_label(case: Mapping[str, Any]) -> str:
    """Describe a case of the result."""
    return case["popularity"] if case["k"] is None else f"{case['popularity']}, k={case['k']}"


def plot(result: Mapping[str, Any]) -> bytes | None:
    """Draw a PNG with bars for the medians and dots for the rounds; None if nothing was measured.

    Raises:
        ImportError: matplotlib, of the bench extra, is not installed.
    """
    panels = _panels(result)
    if not panels:
        return None
    heights = [1 + 0.3 * len(bars) for _, _, bars in panels]
    figure, areas = new_panels(len(panels), 1, 9, sum(heights), height_ratios=heights)
    for ax, (title, unit, bars) in zip(areas, panels, strict=True):
        for place, (_, median, samples, color) in enumerate(bars):
            ax.barh(place, median, color=color, height=0.7)
            ax.plot(samples, [place] * len(samples), ".", color="black", markersize=3, alpha=0.6)
            end = max(median, *samples)
            ax.text(end, place, f"  {median:.4g}", va="center", fontsize=7, color="#222222")
        ax.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.12)  # room for the numbers
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_xlabel(unit, fontsize=8)
        ax.grid(visible=False, axis="y")
    return png(figure)


_SERVING_PANELS = ("output_throughput", "ttft_ms_p50", "tpot_ms_p50")

Bar = tuple[str, float, Sequence[float], str]  # label, median, samples, color


def _panels(result: Mapping[str, Any]) -> list[tuple[str, str, list[Bar]]]:
    """Return (title, unit, bars) for every phase and concurrency, or every serving figure."""
    panels: list[tuple[str, str, list[Bar]]] = []
    cases = result["cases"]
    if result["benchmark"] == "serving":
        for figure in _SERVING_PANELS if cases else ():
            bars: list[Bar] = [
                (c["popularity"], c["median"][figure], [r[figure] for r in c["rounds"]], BLUE)
                for c in cases
            ]
            panels.append((figure.replace("_", " "), "", bars))
        return panels
    for phase, concurrency in dict.fromkeys((c["phase"], c["concurrency"]) for c in cases):
        group = [c for c in cases if (c["phase"], c["concurrency"]) == (phase, concurrency)]
        figure = list(group[0]["median"])[-1]
        bars = [
            (
                f"{c['engine']}: {case_label(c)}",
                c["median"][figure],
                c["samples"][figure],
                _COLORS[c["engine"]],
            )
            for c in group
        ]
        panels.append((f"{phase}, {concurrency} at once", figure.replace("_", " "), bars))
    return panels
