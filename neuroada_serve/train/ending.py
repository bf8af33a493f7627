"""Decide how long a run goes on, and say why it ended.

With --epochs or --max-steps a run is as long as that. Without, it goes on while the held-out loss
falls: the learning rate stays at its peak until the loss has hardly fallen for `patience` scores;
then the best values so far are taken up again, the rate falls to 0 over some last steps, and the
run is over. Both kinds have a bound that is known from the start.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neuroada_serve.config import TrainConfig

MOST_PASSES = 20
MOST_STEPS = 400  # or one pass, where that is longer
UNJUDGED_PASSES = 6  # without held-out rows
PATIENCE = 3
LEAST_FALL = 0.001  # of the base's loss: less is not worth another pass, however long it goes on
_SCORED_EVERY = 250  # a longer pass is scored within, but no more often than
_SCORES_A_PASS = 4
_WARMUP_OF = 200  # steps, at most, of which the warm-up is a share where the end is open
_FEW_STEPS = 20  # the loss may rise at first, and has not come back by then
_DECLINE = 0.2  # of the steps before it


@dataclass(frozen=True)
class Plan:
    """The length of a run, as far as it is known before the first step.

    steps: at most; a run that is not open takes all of them. eval_steps: steps between scores.
    patience: number of scores without a fall, see `scores_without_fall`, after which an open run
        declines and any other ends.
    is_open: the run goes on while the held-out loss falls.
    per_pass: steps in a pass, maybe a fraction. heldout: number of held-out rows.
    """

    steps: int
    eval_steps: int
    patience: int | None
    is_open: bool
    per_pass: float
    heldout: int

    def passes(self, steps: int) -> str:
        """Convert steps to passes in words: "1 pass", "2.5 passes"."""
        passes = steps / self.per_pass
        return f"{passes:.3g} pass{'' if f'{passes:.3g}' == '1' else 'es'}"

    def words(self) -> str:
        """Say at the start how long the run will take."""
        bound = f"{self.passes(self.steps)} ({_steps(self.steps)})"
        if not self.is_open:
            return f"for {_steps(self.steps)}"
        return (
            f"while the loss of {self.heldout} held-out rows falls, scored every "
            f"{_steps(self.eval_steps)}, at most {bound}"
        )


def plan_of(config: TrainConfig, train_rows: int, heldout_rows: int, processes: int = 1) -> Plan:
    """Plan a run over so many rows."""
    per_pass = math.ceil(train_rows / config.batch_size) / config.gradient_accumulation / processes
    whole = max(1, math.floor(per_pass))
    scores = min(_SCORES_A_PASS, math.ceil(whole / _SCORED_EVERY))
    eval_steps = config.eval_steps or math.ceil(whole / scores)
    is_fixed = config.epochs is not None or config.max_steps is not None
    if is_fixed or not heldout_rows:
        passes = config.epochs or UNJUDGED_PASSES
        steps = config.max_steps or max(1, round(passes * per_pass))
        if not is_fixed:
            steps = min(steps, _most_steps(per_pass))
        return Plan(steps, eval_steps, config.patience, False, per_pass, heldout_rows)
    patience = config.patience or PATIENCE
    return Plan(_most_steps(per_pass), eval_steps, patience, True, per_pass, heldout_rows)


def _most_steps(per_pass: float) -> int:
    return max(1, min(round(MOST_PASSES * per_pass), max(MOST_STEPS, round(per_pass))))


def scores_without_fall(base_loss: float, losses: Sequence[float]) -> int:
    """Count the scores at the end that have not lowered the held-out loss any more.

    A loss that has converged still falls, by less and less, as long as training goes on. A fall
    counts only if the loss is `LEAST_FALL` of the base's loss below the last one that counted.
    """
    lowest, since = math.inf, 0
    for loss in losses:
        since += 1
        if loss < lowest - LEAST_FALL * abs(base_loss) or lowest == math.inf:
            lowest, since = loss, 0
    return since


class Course:
    """The share of the peak learning rate by step, from 0: up to 1 during the warm-up, then by the
    schedule; never 0 before the end.

    In an open plan the share stays at 1 until `decline_from`, early enough for the decline to reach
    0 at the bound; with the constant schedule nothing declines.

    end: the step after which the run is over. declined_at: the step of `decline`, if any.
    """

    def __init__(self, config: TrainConfig, steps: int, is_open: bool = False) -> None:
        self._schedule, self._is_open = config.schedule, is_open
        of = min(steps, _WARMUP_OF) if is_open else steps
        self._warmup = min(int(config.warmup_ratio * of), steps - 1)
        self.end = steps
        self.declined_at: int | None = None
        self.decline_from = self._warmup
        if is_open:
            self.decline_from = max(self._warmup, math.ceil(steps / (1 + _DECLINE)))

    @property
    def may_end_early(self) -> bool:
        """A decline may still bring the end nearer."""
        return self._is_open and self.declined_at is None

    def decline(self, step: int) -> None:
        """Begin the decline after so many steps, unless it has begun."""
        if step < self.decline_from:
            length = 0 if self._schedule == "constant" else math.ceil(step * _DECLINE)
            self.decline_from, self.end = step, min(self.end, step + length)
            self.declined_at = step

    def __call__(self, step: int) -> float:
        up = (step + 1) / (self._warmup + 1)
        if self._schedule == "constant":
            return min(up, 1.0)
        left = (self.end - step) / max(1, self.end - self.decline_from)
        if self._schedule == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
        return min(up, left, 1.0)


def reason(plan: Plan, done: int, scored: Sequence[tuple[int, float]]) -> str | None:
    """Say in a sentence why a run is over; None where there is nothing to say.

    Args:
        done: steps taken.
        scored: (step, held-out loss) in order, from the base's at 0 to the one after `done`.
    """
    if not scored:
        if plan.heldout == 0:
            return f"No rows are held out to say whether more than {plan.passes(done)} would help."
        return None
    lowest = min(scored, key=lambda one: one[1])[0]
    best = min((one for one in scored if one[0] > 0), key=lambda one: one[1])[0]
    still = lowest == done
    at = f"keeping the values of step {best} ({plan.passes(best)}), which scored best"
    if done < plan.steps:  # patience was over
        return f"Ended after {plan.passes(done)}: the held-out loss hardly falls any more; {at}."
    if plan.is_open:
        if not still:
            return f"Ended at the bound of {plan.passes(done)}; {at}."
        return (
            f"Ended at the bound of {plan.passes(done)}, and the held-out loss was still falling: "
            f"{_more(plan, done)} would go on."
        )
    if still and len(scored) > 1:
        return (
            f"The held-out loss was still falling after {plan.passes(done)}: {_more(plan, done)} "
            "would go on."
        )
    return f"The held-out loss falls no more; {at}." if best != done else None


def rise(plan: Plan, done: int, before: float, after: float, lr: float) -> str | None:
    """Suggest what to do about a held-out loss that has risen over a run; None where it has not."""
    if after <= before:
        return None
    rose = f"The held-out loss rose from {before:.3f} to {after:.3f}"
    if done < _FEW_STEPS:
        ask = f"--max-steps {_FEW_STEPS}" if plan.is_open else "neither --epochs nor --max-steps"
        return f"{rose} in {_steps(done)}, too few to tell: give {ask}, or more rows."
    return f"{rose}: try a --lr below {lr:.2g}, or more rows."


def _more(plan: Plan, done: int) -> str:
    """Return a flag that makes the run twice as long."""
    passes = 2 * done / plan.per_pass
    return f"--epochs {round(passes)}" if passes >= 1 else f"--max-steps {2 * done}"


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"
