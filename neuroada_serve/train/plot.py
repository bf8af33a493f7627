"""Plots of a training run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from neuroada_serve.plots import BLUE, LIGHT_BLUE, LIGHT_RED, RED, new_figure, plain, png
from neuroada_serve.tasks import GENERATE, Task
from neuroada_serve.train.score import Score

if TYPE_CHECKING:
    from neuroada_serve.train.lr_finder import LearningRates


def loss_curve(
    losses: Sequence[float],
    before: Score | None,
    evaluations: Sequence[tuple[int, Score]],
    kept: int,
    title: str,
    task: Task = GENERATE,
) -> bytes:
    """Draw a PNG of the training loss per step, smoothed, and of the held-out loss.

    Args:
        losses: of the training rows, one a step.
        before: the base's held-out score, drawn at step 0.
        evaluations: (step, held-out score).
        kept: the step whose values are the adapter's.
        task: says what the losses and `Score.figure` are.
    """
    figure, axes = new_figure()
    words = task.figure.replace("_", " ")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=LIGHT_BLUE, linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(losses), color=BLUE, linewidth=2, label="training, smoothed")
    points = ([] if before is None else [(0, before)]) + list(evaluations)
    if points:
        axes.plot(*zip(*[(step, s.loss) for step, s in points], strict=True), color=LIGHT_RED)
    for step, score in points:
        when = "before" if step == 0 else "kept" if step == kept else None
        axes.plot(
            step,
            score.loss,
            "o",
            markersize=8 if when else 5,
            color=RED,
            markerfacecolor=RED if when == "kept" else "white",
            clip_on=False,
            zorder=3,
            label=when and f"held out, {when}: {score.loss:.3f} ({words} {score.figure:.2f})",
        )
    axes.set(xlabel="step", ylabel=task.loss_axis, title=plain(title))
    axes.set_xlim(0, len(losses))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return png(figure)


def learning_rate_plot(searched: "LearningRates", task: Task = GENERATE) -> bytes:
    """Draw a PNG of the loss by learning rate."""
    figure, axes = new_figure()
    known = [
        (lr, loss)
        for lr, loss in zip(searched.tried, searched.losses, strict=True)
        if loss is not None
    ]
    axes.plot(*zip(*known, strict=True), "o-", color=BLUE)
    for lr, loss in zip(searched.tried, searched.losses, strict=True):
        if loss is None:
            axes.axvline(lr, color=RED, linestyle=":", label=f"{lr:.2g} diverges")
    best = dict(known)[searched.best]
    label = f"taken: {searched.best:.2g}"
    axes.plot(searched.best, best, "o", markersize=10, color=RED, label=label)
    axes.set(
        xscale="log",
        xlabel="peak learning rate",
        ylabel=f"{searched.scored} {task.loss_axis} after {searched.steps} steps",
    )
    axes.set_xticks(searched.tried, [f"{lr:.2g}" for lr in searched.tried])
    axes.minorticks_off()  # their labels lie on top of each other within a factor of ten
    axes.legend(frameon=False)
    return png(figure)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the mean over a window around each step, a twentieth of the run wide on either
    side."""
    reach = max(1, len(losses) // 20)
    windows = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]
