"""Score a run between its steps, keep the best values and checkpoints, and make the adapter."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.adapters.format import (
    HEAD,
    Adapter,
    AdapterConfig,
    ModuleBypass,
    make_adapter,
    target_modules,
)
from neuroada_serve.config import TrainConfig
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.train.checkpoint import Checkpoint, Checkpoints
from neuroada_serve.train.data import TrainingData
from neuroada_serve.train.ending import Plan, reason, rise, scores_without_fall
from neuroada_serve.train.head import TaskHead
from neuroada_serve.train.loop import Layers, Loop, Notify, diverged, values_of
from neuroada_serve.train.lr_finder import LearningRates
from neuroada_serve.train.processes import current
from neuroada_serve.train.publish import Improvements
from neuroada_serve.train.record import recipe_of, scores_of
from neuroada_serve.train.samples import Sample, baseline_of, samples_of
from neuroada_serve.train.score import Score, score

FILE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Evaluation:
    """The score of the held-out rows after `step` steps, of the values as a file would hold
    them."""

    step: int
    score: Score


class Run:
    """The scores, best values, checkpoints and adapter of a loop's steps.

    before: the base's score. evaluations: so far.
    best_step: the step with the lowest held-out loss; without held-out rows the last one.
    samples: answers to a few held-out rows, once the run is finished.

    Args:
        searched: the learning rates tried, where the run has searched for its own.
    """

    def __init__(
        self,
        base: BaseModel,
        data: TrainingData,
        data_name: str,
        layers: Layers,
        head: TaskHead | None,
        config: TrainConfig,
        loop: Loop,
        plan: Plan,
        checkpoints: Checkpoints,
        searched: LearningRates | None,
        before: Score | None,
        notify: Notify,
        improvements: Improvements | None = None,
    ) -> None:
        self._base, self._data, self._layers, self._head = base, data, layers, head
        self._values = values_of(layers)
        self._data_name = data_name
        self._config, self._loop, self._plan = config, loop, plan
        self._checkpoints, self._searched = checkpoints, searched
        self._improvements, self._notify = improvements, notify
        self._processes = current()
        self.before = before
        self.evaluations: list[Evaluation] = []
        self.best_step = 0
        self.baseline = baseline_of(base, data)
        self.samples: tuple[Sample, ...] = ()
        self._best: dict[str, Tensor] = {}  # by the names of `values_of`, as a file would hold them

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["before"] is not None:
            self.before = Score(**state["before"])
        self.evaluations = [
            Evaluation(one["step"], Score(**one["score"])) for one in state["evaluations"]
        ]
        self.best_step = state["best_step"]
        best = {name: checkpoint.tensors.get(f"{name}.best") for name in (*self._values, HEAD)}
        self._best = {name: values for name, values in best.items() if values is not None}

    # --- after every step ------------------------------------------------------------------------

    def after_step(self, interrupted: Callable[[], bool]) -> bool:
        """Score, keep and save as the step asks for; return whether to stop.

        Raises:
            KeyboardInterrupt: after the step is saved, if `interrupted` says so.
        """
        done, config = self._loop.done, self._config
        if done == self._loop.course.end or done % self._plan.eval_steps == 0:
            self._evaluate(done)
            if self._plan.is_open and self._loop.course.may_end_early and self._patience_is_over:
                self._decline()
        saves = config.save_steps and self._processes.is_first
        ends = interrupted() and not self.is_over
        if saves and (self.is_over or ends or done % config.save_steps == 0):
            self._save()
        if ends:
            raise KeyboardInterrupt
        return self.is_over

    @property
    def is_over(self) -> bool:
        """All steps are taken, or patience is over and nothing follows that."""
        if self._loop.done >= self._loop.course.end:
            return True
        return not self._plan.is_open and self._patience_is_over

    @property
    def _patience_is_over(self) -> bool:
        if self._plan.patience is None or self.before is None:
            return False
        losses = [one.score.loss for one in self.evaluations]
        return scores_without_fall(self.before.loss, losses) >= self._plan.patience

    def _decline(self) -> None:
        """Go back to the best values, and let the learning rate fall over some last steps."""
        course = self._loop.course
        course.decline(self._loop.done)
        if self.is_over:
            return
        self._loop.follow_course()
        self._take_best()
        self._notify(
            f"The held-out loss has hardly fallen for {self._plan.patience} scores: back to the "
            f"values of step {self.best_step}, for {course.end - self._loop.done} steps with a "
            "falling learning rate."
        )

    def _evaluate(self, step: int) -> None:
        with self._rounded():
            found = score_heldout(
                self._base, self._data, self._config, self._notify, "the adapter", step + 1
            )
            if found is None:
                return
            known = [one.score.loss for one in self.evaluations]
            self.evaluations.append(Evaluation(step, found))
            self._notify(f"Held-out loss after step {step}: {found.loss:.4f}.")
            if known and found.loss >= min(known):
                return
            self.best_step, self._best = step, self._file_values()
        if self._improvements is not None and step != self._loop.course.end:  # the last is, then
            self._improvements.publish(self.adapter(), found.loss, step)

    def _save(self) -> None:
        here = self._loop.checkpoint()
        best = {f"{name}.best": values for name, values in self._best.items()}
        state = {
            **here.state,
            "before": None if self.before is None else asdict(self.before),
            "evaluations": [asdict(one) for one in self.evaluations],
            "best_step": self.best_step,
            "lr_search": None if self._searched is None else asdict(self._searched),
        }
        self._checkpoints.save(Checkpoint(here.step, {**here.tensors, **best}, state))

    # --- scores and values -----------------------------------------------------------------------

    @property
    def after(self) -> Score | None:
        """Score of the kept values."""
        return next((e.score for e in self.evaluations if e.step == self.best_step), None)

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        """Round the values inside a block to what the file will hold: what is scored is what will
        be served."""
        exact = {name: value.detach().clone() for name, value in self._values.items()}
        with torch.no_grad():
            for value in self._values.values():
                value.copy_(value.to(FILE_DTYPE))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self._values.items():
                    value.copy_(exact[name])

    @torch.no_grad()
    def _take_best(self) -> None:
        """Set the values to the best ones so far."""
        for name, value in self._values.items():
            value.copy_(self._best[name])
        if self._head is not None:
            self._head.weight.copy_(self._best[HEAD])

    def _file_values(self) -> dict[str, Tensor]:
        values = {name: v.detach().to(FILE_DTYPE).cpu() for name, v in self._values.items()}
        if self._head is not None:
            values[HEAD] = self._head.weight.detach().cpu().clone()
        return values

    def finish(self) -> Adapter:
        """Return the adapter of the kept values, after reporting them and answering a few rows."""
        if not self.evaluations:
            self.best_step, self._best = self._loop.done, self._file_values()
        scored = [(one.step, one.score.loss) for one in self.evaluations]
        if scored and self.before is not None:
            scored = [(0, self.before.loss), *scored]
        if why := reason(self._plan, self._loop.done, scored):
            self._notify(why)
        elif self.best_step != self._loop.done:
            self._notify(f"Keeping the values of step {self.best_step}: they scored best.")
        before, after = self.before, self.after
        if before is not None and after is not None:
            losses = before.loss, after.loss
            if hint := rise(self._plan, self._loop.done, *losses, self._config.peak_lr):
                self._notify(hint)
        if self._processes.is_first and self._config.samples and self._data.heldout:
            self._take_best()
            self.samples = samples_of(self._base, self._data, self._config.samples)
        return self.adapter()

    def adapter(self) -> Adapter:
        """Make the adapter of the best values so far."""
        parts = {
            name: ModuleBypass(
                layer.index.cpu(), self._best[f"{name}.value"], self._best.get(f"{name}.bias")
            )
            for name, layer in self._layers.items()
        }
        config = AdapterConfig(
            base_model_name_or_path=self._base.spec.name,
            base_fingerprint=self._base.spec.fingerprint,
            k=next(iter(parts.values())).index.shape[1],
            target_modules=target_modules(parts, self._base.spec.shapes),
            selection=self._config.selection,
            task_type=self._config.task_type,
            labels=self._data.task.labels,
            metadata=self._metadata(),
        )
        return make_adapter(config, parts, self._best.get(HEAD))

    def log(self) -> str:
        """Return JSON lines: the loss of every step, and every score."""
        lines: list[dict[str, Any]] = [
            {"step": step, "loss": loss} for step, loss in enumerate(self._loop.losses, start=1)
        ]
        if self.before is not None:
            lines.append({"step": 0, "heldout": asdict(self.before)})
        lines += [{"step": e.step, "heldout": asdict(e.score)} for e in self.evaluations]
        if self.baseline is not None:
            lines.append({"baseline": asdict(self.baseline)})
        lines += [{"sample": asdict(sample)} for sample in self.samples]
        return "".join(json.dumps(line) + "\n" for line in lines)

    def _metadata(self) -> dict[str, Any]:
        recipe = recipe_of(
            self._base, self._data, self._config, self._plan, self._loop.done, self.best_step
        )
        recipe = {"data": self._data_name, **recipe}
        if self._searched is not None:
            recipe["lr_search"] = asdict(self._searched)
        scores = scores_of(self._data, self.before, self.after, self.baseline)
        metadata: dict[str, Any] = {"recipe": recipe, "scores": scores}
        if self.samples:
            metadata["samples"] = [asdict(sample) for sample in self.samples]
        return metadata


def score_heldout(
    base: BaseModel,
    data: TrainingData,
    config: TrainConfig,
    notify: Notify,
    what: str,
    next_step: int,
) -> Score | None:
    """Score the held-out rows with the values as they are; None if there are none.

    Raises:
        UsageError: the loss is not a number.
    """
    if not data.heldout:
        return None
    notify(f"Scoring {what} on {len(data.heldout)} held-out rows.")
    processes, found = current(), Score(math.nan, math.nan)
    if processes.is_first:
        found = score(base.model, data.heldout, config.batch_size, data.objective)
    found = Score(*processes.of_first(astuple(found), base.device))
    if not math.isfinite(found.loss):
        raise diverged(next_step, config.peak_lr)
    return found
