"""The picture of a training run."""

import io
from collections.abc import Sequence

from neuroada_serve.train.score import Score


def loss_curve(
    losses: Sequence[float], before: Score | None, after: Score | None, title: str
) -> bytes:
    """A PNG of the training loss per step, smoothed, and the held-out loss before and after.

    Args:
        losses: nats per answer token, one a step.
        before, after: held-out scores, drawn at the first and at the last step.
    """
    from matplotlib.figure import Figure  # of the train extra; no pyplot, so no global state

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(losses), color="#1f4e8c", linewidth=2, label="training, smoothed")
    for step, score, fill in ((0, before, "white"), (len(losses), after, "#c8501e")):
        if score is not None:
            when = "after" if step else "before"
            axes.plot(
                step,
                score.loss,
                "o",
                markersize=8,
                color="#c8501e",
                markerfacecolor=fill,
                clip_on=False,
                zorder=3,
                label=f"held out, {when}: {score.loss:.3f} ({score.exact_match:.0%} exact)",
            )
    axes.set(xlabel="step", ylabel="loss (nats per answer token)", title=title)
    axes.set_xlim(0, len(losses))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over a window around each step, a twentieth of the run wide on either side."""
    reach = max(1, len(losses) // 20)
    windows = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]
