"""The look of every plot: size, colours, grid, and a legend beside the data."""

import io
from typing import Any

BLUE, LIGHT_BLUE, RED, LIGHT_RED = "#1f4e8c", "#9db8d9", "#c8501e", "#e3a98d"
GREEN, LIGHT_GREEN, YELLOW = "#4d7f5c", "#a9cbb2", "#b9a037"
PURPLE, LIGHT_PURPLE, GREY = "#7a5a8f", "#c3aed0", "#7a7a7a"
COLOURS = (
    *(BLUE, LIGHT_BLUE, RED, LIGHT_RED, GREEN, LIGHT_GREEN),
    *(YELLOW, PURPLE, LIGHT_PURPLE, GREY),
)
_DPI = 120
_MOST_INCHES = 30.0
_MOST_LETTERS = 24  # of a name


def new_figure(width: float = 8, height: float = 4.5) -> tuple[Any, Any]:
    """Make a figure with one drawing area, (figure, axes).

    Args:
        width, height: in inches; at most 30 each.

    Raises:
        ImportError: matplotlib, of the extras train and bench, is not installed.
    """
    figure, [axes] = new_panels(1, 1, width, height)
    return figure, axes


def new_panels(
    rows: int, columns: int, width: float, height: float, **grid: Any
) -> tuple[Any, list[Any]]:
    """Make a figure with several drawing areas, in reading order.

    Args:
        grid: for matplotlib's `subplots`, such as height_ratios or sharey.

    Raises:
        ImportError: see `new_figure`.
    """
    from matplotlib.figure import Figure  # no pyplot, so no global state

    size = min(width, _MOST_INCHES), min(height, _MOST_INCHES)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **grid).flat)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_prop_cycle(color=COLOURS)
    return figure, panels


def legend_beside(axes: Any, title: str | None = None) -> None:
    """Put the legend on the right of the drawing area."""
    axes.legend(
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        title=title,
        alignment="left",
        fontsize=8,
        title_fontsize=8,
    )


def png(figure: Any) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def short(name: str) -> str:
    """Cut a name to the room there is for it."""
    return plain(name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 1] + "…")


def plain(text: str) -> str:
    """Escape a text so that it is drawn as one line, not as a formula."""
    return " ".join(text.split()).replace("$", r"\$")
