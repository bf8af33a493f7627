"""Record how an adapter was made, for its config and model card."""

from importlib.metadata import version
from typing import Any

from neuroada_serve.config import TrainConfig
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.train.data import TrainingData
from neuroada_serve.train.ending import Plan
from neuroada_serve.train.objectives import Baseline
from neuroada_serve.train.processes import current
from neuroada_serve.train.score import Score

# Recorded only where they are not the defaults.
_RARELY_CHANGED = (
    *("coverage", "tune_bias", "weight_decay", "max_grad_norm"),
    *("bf16", "packing", "bypass", "quantize"),
)


def recipe_of(
    base: BaseModel,
    data: TrainingData,
    config: TrainConfig,
    plan: Plan,
    steps: int,
    kept_step: int,
) -> dict[str, Any]:
    """Return the settings of a run that has taken `steps` steps and keeps the values of one."""
    report, processes, plain = data.report, current().size, TrainConfig()
    recipe = {
        "rows": report.rows,
        "train_rows": report.train_rows,
        "too_long_rows": report.too_long,
        "heldout": f"{config.eval_fraction:g} of the rows"
        if config.eval_data is None
        else config.eval_data.name,
        "k": config.k_words if config.k_pattern else config.k,
        "lr": config.peak_lr,
        "warmup_ratio": config.warmup_ratio,
        "schedule": config.schedule,
        "steps": steps,
        "kept_step": kept_step,
        "epochs": round(steps / plan.per_pass, 3),
        "batch_size": config.batch_size,
        "gradient_accumulation": config.gradient_accumulation,
        "max_length": config.max_length,
        "seed": config.seed,
        "dtype": str(base.dtype).removeprefix("torch."),
        "prompt_format": data.objective.prompt_format,
        "versions": {n: version(n) for n in ("neuroada-serve", "torch", "transformers")},
    }
    if plan.is_open:
        recipe["patience"] = plan.patience
    if processes > 1:
        recipe["processes"] = processes
    if config.selection == "gradient":
        recipe["selection_rows"] = config.selection_rows
    for name in _RARELY_CHANGED:
        if getattr(config, name) != getattr(plain, name):
            recipe[name] = getattr(config, name)
    if data.task.head_rows:
        recipe["head_lr"] = config.head_lr
    return recipe


def scores_of(
    data: TrainingData, before: Score | None, after: Score | None, baseline: Baseline | None
) -> dict[str, Any]:
    """Return the held-out scores of the base, the adapter and the best constant answer."""
    scores: dict[str, Any] = {"heldout_rows": data.report.heldout_rows}
    if before is None or after is None:
        return scores
    name, by = data.task.figure, data.objective.figure_by
    scores["before"], scores["after"] = (
        {"loss": score.loss, name: score.figure} for score in (before, after)
    )
    if by is not None:
        scores[f"{name}_by"] = by
    if baseline is not None:
        known = {"loss": baseline.loss, name: baseline.figure}
        scores["baseline"] = {
            "answer": baseline.answer,
            **{key: value for key, value in known.items() if value is not None},
        }
    return scores
