"""Plots of an evaluation."""

from collections.abc import Mapping
from textwrap import fill

from neuroada_serve.evaluation.run import Confusion, Score
from neuroada_serve.plots import COLOURS, legend_beside, new_figure, plain, png, short

_LINE_LETTERS = 18  # of a score's name


def score_bars(scores: Mapping[str, Mapping[str, Score]], title: str) -> bytes:
    """Draw a PNG of all shares, F1s and correlations, a group of bars for each, with their 95 %
    intervals.

    Args:
        scores: subject -> score name -> score; losses are left out.
    """
    names = [name for name in next(iter(scores.values())) if name not in ("loss", "mse")]
    figure, axes = new_figure(max(8, 3 + len(names) * max(1.1, len(scores) * 0.45)))
    width = 0.8 / len(scores)
    for number, (subject, its) in enumerate(scores.items()):
        at = [i + (number - (len(scores) - 1) / 2) * width for i in range(len(names))]
        values = [its[name].value for name in names]
        below = [max(0.0, its[name].value - its[name].low) for name in names]
        above = [max(0.0, its[name].high - its[name].value) for name in names]
        axes.bar(
            at,
            values,
            width * 0.92,
            yerr=(below, above),
            capsize=3,
            color=COLOURS[number % len(COLOURS)],
            ecolor="#444444",
            label=short(subject),
        )
        for x, value, reach in zip(at, values, above, strict=True):
            axes.text(x, min(value + reach, 1) + 0.01, f"{value:.2f}", ha="center", fontsize=8)
    words = [fill(name.replace("_", " "), _LINE_LETTERS) for name in names]
    axes.set_xticks(range(len(names)), words, fontsize=8)
    axes.set(ylabel="score, with its 95 % interval", title=plain(title))
    axes.set_ylim(min([0.0, *(its[name].low for its in scores.values() for name in names)]), 1.08)
    axes.grid(visible=False, axis="x")
    legend_beside(axes)
    return png(figure)


def confusion_plot(confusion: Confusion, title: str) -> bytes:
    """Draw a PNG of a confusion matrix: shares of each right answer as colour, counts as numbers.
    There is a column "none" if some row had no choice."""
    none = any(row[-1] for row in confusion.counts)
    counts = [row if none else row[:-1] for row in confusion.counts]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    columns = [*map(short, confusion.labels), *(["none"] if none else [])]
    side = 3 + 0.55 * len(columns)
    figure, axes = new_figure(max(5, side), max(4, side - 1))
    axes.grid(visible=False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            colour = "white" if shares[i][j] > 0.5 else "#222222"
            axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)
    turned = 45 if sum(map(len, columns)) > 40 else 0
    axes.set_xticks(range(len(columns)), columns, rotation=turned)
    axes.set_yticks(range(len(confusion.labels)), list(map(short, confusion.labels)))
    axes.set(xlabel="chosen", ylabel="right", title=plain(title))
    return png(figure)
