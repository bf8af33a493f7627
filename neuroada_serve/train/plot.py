"""The pictures of a training run."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neuroada_serve.train.score import Score

if TYPE_CHECKING:
    from neuroada_serve.train.lr_finder import LearningRates


def loss_curve(
    losses: Sequence[float],
    before: Score | None,
    evaluations: Sequence[tuple[int, Score]],
    kept: int,
    title: str,
    figure_name: str = "exact_match",
) -> bytes:
    """A PNG of the training loss per step, smoothed, and of the held-out loss.

    Args:
        losses: nats per answer token, one a step.
        before: the base's held-out score, drawn at step 0.
        evaluations: (step, held-out score).
        kept: the step whose values are the adapter's.
        figure_name: what `Score.figure` is; "pearson" says that the loss is a squared error.
    """
    figure, axes = _new_figure()
    words = figure_name.replace("_", " ")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(losses), color="#1f4e8c", linewidth=2, label="training, smoothed")
    points = ([] if before is None else [(0, before)]) + list(evaluations)
    if points:
        axes.plot(*zip(*[(step, s.loss) for step, s in points], strict=True), color="#e3a98d")
    for step, score in points:
        when = "before" if step == 0 else "kept" if step == kept else None
        axes.plot(
            step,
            score.loss,
            "o",
            markersize=8 if when else 5,
            color="#c8501e",
            markerfacecolor="#c8501e" if when == "kept" else "white",
            clip_on=False,
            zorder=3,
            label=when and f"held out, {when}: {score.loss:.3f} ({words} {score.figure:.2f})",
        )
    what = "mean squared error" if figure_name == "pearson" else "loss (nats per answer token)"
    axes.set(xlabel="step", ylabel=what, title=title)
    axes.set_xlim(0, len(losses))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _png(figure)


def learning_rate_plot(searched: "LearningRates") -> bytes:
    """A PNG of the loss by learning rate."""
    figure, axes = _new_figure()
    known = [
        (lr, loss)
        for lr, loss in zip(searched.tried, searched.losses, strict=True)
        if loss is not None
    ]
    axes.plot(*zip(*known, strict=True), "o-", color="#1f4e8c")
    for lr, loss in zip(searched.tried, searched.losses, strict=True):
        if loss is None:
            axes.axvline(lr, color="#c8501e", linestyle=":", label=f"{lr:.2g} diverges")
    best = dict(known)[searched.best]
    label = f"taken: {searched.best:.2g}"
    axes.plot(searched.best, best, "o", markersize=10, color="#c8501e", label=label)
    axes.set(
        xscale="log",
        xlabel="peak learning rate",
        ylabel=f"{searched.scored} loss after {searched.steps} steps (nats per answer token)",
    )
    axes.legend(frameon=False)
    return _png(figure)


def _new_figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # of the train extra; no pyplot, so no global state

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over a window around each step, a twentieth of the run wide on either side."""
    reach = max(1, len(losses) // 20)
    windows = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]
