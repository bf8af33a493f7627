"""One training run: rows in, an adapter folder out, the base untouched."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.adapters.card import write_card
from neuroada_serve.adapters.durable import is_unfinished, remove_unfinished, write_durably
from neuroada_serve.adapters.format import (
    CONFIG_FILE,
    HEAD,
    SEQ_CLS,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    ModuleBypass,
    make_adapter,
    save_adapter,
    target_modules,
)
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.model.loader import BaseModel, adaptable_modules
from neuroada_serve.model.quiet import quiet_transformers
from neuroada_serve.train.bypass import bypass_training
from neuroada_serve.train.checkpoint import Checkpoint, Checkpoints
from neuroada_serve.train.classify import ClassHead, class_head
from neuroada_serve.train.data import DataReport, TrainingData, load_data
from neuroada_serve.train.inplace import inplace_training
from neuroada_serve.train.loop import Layers, Loop, Notify, diverged, selections_of
from neuroada_serve.train.lr_finder import LearningRates, find_learning_rate
from neuroada_serve.train.plot import learning_rate_plot, loss_curve
from neuroada_serve.train.processes import current
from neuroada_serve.train.publish import Publisher
from neuroada_serve.train.quantize import quantize_
from neuroada_serve.train.rows import Data
from neuroada_serve.train.score import Score, packs, score
from neuroada_serve.train.selection import k_of_modules, select

LOSS_FILE = "loss.png"
LOG_FILE = "loss.jsonl"
LR_FILE = "lr.png"
FILE_DTYPE = torch.bfloat16

_EXTRA = ("accelerate", "matplotlib")
# What decides neither a step nor what is kept of it, so that it may change between two attempts.
_NOT_OF_THE_RUN = ("save_steps", "eval_data")


@dataclass(frozen=True)
class Evaluation:
    """The held-out rows' score after `step` steps, of the values as a file would hold them."""

    step: int
    score: Score


@dataclass(frozen=True)
class TrainReport:
    """What a run made, and how it went.

    adapter: as written to `out`. steps: optimizer steps taken. seconds: of those of this process.
    losses: mean over each step, nats per answer token.
    before, after: the base's and the adapter's score on the held-out rows; None without any.
    evaluations: in order, the one kept among them. best_step: whose values the adapter has.
    """

    adapter: Adapter
    out: Path
    data: DataReport
    steps: int
    seconds: float
    losses: tuple[float, ...]
    before: Score | None
    after: Score | None
    evaluations: tuple[Evaluation, ...]
    best_step: int


def _say_nothing(message: str) -> None:
    pass


def train_adapter(
    base: BaseModel,
    data: Data,
    out: Path,
    config: TrainConfig,
    notify: Notify = _say_nothing,
    *,
    fresh: bool = False,
    publish: str | None = None,
) -> TrainReport:
    """Train an adapter of `base` on the rows in `data` and write it, with its curves, to `out`.

    The base's weights change while it runs and have their original bits afterwards, however it
    ends; only `quantize` replaces its layers for good. `out` is touched when everything has
    succeeded, or with `publish` whenever the held-out loss has improved. On one device with one
    thread count, the same base, data and config give the same adapter, byte for byte, also when
    the run was interrupted: its checkpoints lie in `NAME.training` beside `out`, and the same call
    goes on from the newest that is whole.

    Args:
        base: as loaded; not in use by an engine.
        data: rows, see `train.data`.
        out: a new folder, an empty one, or that of an adapter, which is then replaced.
        notify: told in a sentence what goes on. A progress bar shows on stderr where that is a
            terminal.
        fresh: discard checkpoints instead of going on from them.
        publish: address of a server that loads every improved adapter, see `train.publish`.

    Raises:
        UsageError: before training, if `config`, `out` or this installation does not allow it, or
            checkpoints are of another run; while training, if the loss stops being a number or a
            file cannot be written.
        DataError: rows at fault.
    """
    # 1. Everything that can be refused is refused before anything is computed.
    processes = current()
    if not processes.is_first:
        notify = _say_nothing
    _check_extra()
    _check_place(out)
    _check_fits(base, config)
    loaded = load_data(base, data, config)
    notify(f"{loaded.report}.")
    publisher = Publisher(publish, out) if publish and processes.is_first else None
    checkpoints = Checkpoints(
        out.absolute().parent / f"{out.absolute().name}.training", _identity(base, loaded, config)
    )
    if fresh and processes.is_first:
        checkpoints.remove()
    processes.wait()
    resumed = checkpoints.newest(notify)
    _check_contents(out, resumed is not None)
    processes.wait()  # nobody writes while another reads

    modules: Mapping[str, Any] = adaptable_modules(base.model)
    assert modules.keys() == base.spec.shapes.keys(), "the model is in use by an engine"
    beside = config.bypass or config.quantize != "none"
    if config.quantize != "none":
        modules = quantize_(base.model, modules, config.quantize)
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        head = stack.enter_context(class_head(base.model, len(loaded.labels), config.seed))
        if resumed is None:
            selections = select(base.model, modules, loaded.train, config, notify)
            modules = {name: modules[name] for name in selections}
            processes.share_(one.index for one in selections.values())
        else:
            modules = {name: modules[name] for name in k_of_modules(modules, config)}
            selections = selections_of(resumed, modules)
        attach = bypass_training if beside else inplace_training
        layers: Layers = stack.enter_context(attach(base.model, modules, selections))
        if head is not None:  # attaching has frozen it with the rest
            head.requires_grad_(True)
        run = _Run(base, loaded, data.name, layers, head, config, out, publisher, notify)
        if config.packing and not packs(base.model):
            raise UsageError(
                "rows of a packed batch see each other in this base's attention; train without "
                "--packing"
            )

        # 2. Where it begins: anew, with a learning rate sought for, or where it was interrupted.
        searched: LearningRates | None = None
        if resumed is not None:
            if resumed.state["lr_search"] is not None:
                searched = LearningRates(**resumed.state["lr_search"])
            run.restore(resumed)
            notify(f"Going on from step {resumed.step}, from {checkpoints.folder}.")
        else:
            run.before = run.score("the base", 1)
            if config.lr == "auto":
                searched = find_learning_rate(base.model, layers, loaded, config, notify, head)
        if searched is not None:
            config = replace(config, lr=searched.best)

        # 3. The steps.
        steps = _steps(config, loaded)
        loop = Loop(base.model, layers, loaded.train, config, steps, head)
        if resumed is not None:
            loop.restore(resumed)
        run.begin(loop, checkpoints, searched)
        count = sum(selections[name].nnz for name in layers)
        notify(f"Training {count:,} values for {run.steps} steps, lr {config.peak_lr:.2g}.")
        if processes.size > 1:
            each = "a batch" if (n := config.gradient_accumulation) == 1 else f"{n} batches"
            notify(f"{processes.size} processes take {each} a step each.")
        started = time.perf_counter()
        if not run.is_over:  # it may have been interrupted just before the adapter was written
            loop.run(run.after_step, notify)
        seconds = time.perf_counter() - started
        adapter = run.finish()

    # 4. The folder.
    report = TrainReport(
        adapter,
        out,
        loaded.report,
        loop.done,
        seconds,
        tuple(loop.losses),
        run.before,
        run.after,
        tuple(run.evaluations),
        run.best_step,
    )
    if not processes.is_first:
        return report
    try:
        remove_unfinished(out)
        save_adapter(adapter, out)
        title = f"{out.name}: {base.spec.name}, k={config.k_words}, lr {config.peak_lr:.2g}"
        points = [(one.step, one.score) for one in run.evaluations]
        curve = loss_curve(loop.losses, run.before, points, run.best_step, title)
        write_durably(out / LOSS_FILE, curve)
        write_durably(out / LOG_FILE, run.log().encode())
        write_card(out, adapter.config)
        if searched is not None:
            write_durably(out / LR_FILE, learning_rate_plot(searched))
    except OSError as error:
        raise UsageError(
            f"the adapter cannot be written to {out}: {error.strerror}; make room, and the same "
            f"command goes on from {checkpoints.folder}"
        ) from error
    if publisher is not None:
        run.publish(adapter)
    checkpoints.remove()
    return report


class _Run:
    """What happens around the steps: scores, the best values, checkpoints, the adapter.

    before: the base's score. evaluations: so far.
    best_step: the step with the lowest held-out loss; without held-out rows the last.
    """

    def __init__(
        self,
        base: BaseModel,
        data: TrainingData,
        data_name: str,
        layers: Layers,
        head: ClassHead | None,
        config: TrainConfig,
        out: Path,
        publisher: Publisher | None,
        notify: Notify,
    ) -> None:
        self._base, self._data, self._layers, self._head = base, data, layers, head
        self._data_name = data_name
        self._config, self._out = config, out
        self._publisher, self._notify = publisher, notify
        self._processes = current()
        self.before: Score | None = None
        self.evaluations: list[Evaluation] = []
        self.best_step = 0
        self._best: dict[str, Tensor] = {}  # values, as a file would hold them

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["before"] is not None:
            self.before = Score(**state["before"])
        self.evaluations = [
            Evaluation(one["step"], Score(**one["score"])) for one in state["evaluations"]
        ]
        self.best_step = state["best_step"]
        best = {name: checkpoint.tensors.get(f"{name}.best") for name in (*self._layers, HEAD)}
        self._best = {name: values for name, values in best.items() if values is not None}

    def begin(self, loop: Loop, checkpoints: Checkpoints, searched: LearningRates | None) -> None:
        """Take part in the steps of a loop."""
        self._loop, self._checkpoints, self._searched = loop, checkpoints, searched
        if searched is not None:
            self._config = replace(self._config, lr=searched.best)
        self.steps = _steps(self._config, self._data)
        self._per_pass = loop.batches.per_pass

    # --- after every step ------------------------------------------------------------------------

    def after_step(self) -> bool:
        """Score, keep, save, as the step asks for; whether to stop."""
        done, config = self._loop.done, self._config
        batches = config.gradient_accumulation * self._processes.size
        per_pass = max(1, self._per_pass // batches)
        if done == self.steps or done % (config.eval_steps or per_pass) == 0:
            self._evaluate(done)
        saves = config.save_steps and self._processes.is_first
        if saves and (self.is_over or done % config.save_steps == 0):
            self._save()
        return self.is_over

    @property
    def is_over(self) -> bool:
        """Whether all steps are taken, or patience is."""
        if self._loop.done == self.steps:
            return True
        since = sum(one.step > self.best_step for one in self.evaluations)
        return self._config.patience is not None and since >= self._config.patience

    def _evaluate(self, step: int) -> None:
        with self._rounded():
            found = self.score("the adapter", step + 1)
            if found is None:
                return
            known = [one.score.loss for one in self.evaluations]
            self.evaluations.append(Evaluation(step, found))
            self._notify(f"Held-out loss after step {step}: {found.loss:.4f}.")
            if known and found.loss >= min(known):
                return
            self.best_step, self._best = step, self._file_values()
        if self._publisher is not None and step != self.steps:  # the last is, at the end
            self.publish(self.adapter())

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

    def publish(self, adapter: Adapter) -> None:
        """Hand an adapter to the server. Training goes on where that fails."""
        assert self._publisher is not None
        try:
            self._publisher(adapter)
            self._notify(f"Published {self._out.name}, step {self.best_step}.")
        except UsageError as error:
            self._notify(f"Not published: {error}.")

    # --- scores and values -----------------------------------------------------------------------

    def score(self, what: str, next_step: int) -> Score | None:
        """Of the held-out rows, by the values as they are; None without any.

        Raises:
            UsageError: the loss is not a number.
        """
        if not self._data.heldout:
            return None
        self._notify(f"Scoring {what} on {len(self._data.heldout)} held-out rows.")
        found = Score(math.nan, math.nan)
        if self._processes.is_first:
            found = score(self._base.model, self._data.heldout, self._config.batch_size)
        found = Score(*self._processes.of_first(astuple(found), self._base.device))
        if not math.isfinite(found.loss):
            raise diverged(next_step, self._config.peak_lr)
        return found

    @property
    def after(self) -> Score | None:
        """Of the values kept."""
        return next((e.score for e in self.evaluations if e.step == self.best_step), None)

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        """The values as the file will hold them: what is scored is what will be served."""
        exact = {name: layer.value.detach().clone() for name, layer in self._layers.items()}
        with torch.no_grad():
            for layer in self._layers.values():
                layer.value.copy_(layer.value.to(FILE_DTYPE))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, layer in self._layers.items():
                    layer.value.copy_(exact[name])

    def _file_values(self) -> dict[str, Tensor]:
        values = {
            name: layer.value.detach().to(FILE_DTYPE).cpu() for name, layer in self._layers.items()
        }
        if self._head is not None:
            values[HEAD] = self._head.weight.detach().cpu().clone()
        return values

    def finish(self) -> Adapter:
        """The adapter of the values kept, told of."""
        if not self.evaluations:
            self.best_step, self._best = self._loop.done, self._file_values()
        elif self.best_step != self._loop.done:
            self._notify(f"Keeping the values of step {self.best_step}: they scored best.")
        before, after = self.before, self.after
        if before is not None and after is not None and after.loss > before.loss:
            self._notify(
                f"The held-out loss rose from {before.loss:.3f} to {after.loss:.3f}: try a --lr "
                f"below {self._config.peak_lr:.2g}, or more rows."
            )
        return self.adapter()

    def adapter(self) -> Adapter:
        """Of the best values so far."""
        parts = {
            name: ModuleBypass(layer.index.cpu(), self._best[name])
            for name, layer in self._layers.items()
        }
        config = AdapterConfig(
            base_model_name_or_path=self._base.spec.name,
            base_fingerprint=self._base.spec.fingerprint,
            k=next(iter(parts.values())).index.shape[1],
            target_modules=target_modules(parts, self._base.spec.shapes),
            selection=self._config.selection,
            task_type=self._config.task_type,
            labels=self._data.labels,
            metadata={"recipe": self._recipe(), "scores": self._scores()},
        )
        return make_adapter(config, parts, self._best.get(HEAD))

    def log(self) -> str:
        """JSON lines: the loss of every step, and every score."""
        lines: list[dict[str, Any]] = [
            {"step": step, "loss": loss} for step, loss in enumerate(self._loop.losses, start=1)
        ]
        if self.before is not None:
            lines.append({"step": 0, "heldout": asdict(self.before)})
        lines += [{"step": e.step, "heldout": asdict(e.score)} for e in self.evaluations]
        return "".join(json.dumps(line) + "\n" for line in lines)

    def _recipe(self) -> dict[str, Any]:
        config, report = self._config, self._data.report
        chats = config.prompt_format == "chat" and self._base.has_chat_template
        recipe = {
            "data": self._data_name,
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
            "steps": self._loop.done,
            "kept_step": self.best_step,
            "epochs": round(self._loop.done * config.gradient_accumulation / self._per_pass, 3),
            "batch_size": config.batch_size,
            "gradient_accumulation": config.gradient_accumulation,
            "max_length": config.max_length,
            "seed": config.seed,
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "prompt_format": "chat" if chats else "plain",
            "versions": {n: version(n) for n in ("neuroada-serve", "torch", "transformers")},
        }
        plain = TrainConfig()
        if self._processes.size > 1:
            recipe["processes"] = self._processes.size
        if config.selection == "gradient":
            recipe["selection_rows"] = config.selection_rows
        for name in (
            "coverage",
            "weight_decay",
            "max_grad_norm",
            "bf16",
            "packing",
            "bypass",
            "quantize",
        ):
            if getattr(config, name) != getattr(plain, name):
                recipe[name] = getattr(config, name)
        if self._head is not None:
            recipe |= {"head_lr": config.head_lr, "prompt_format": "plain"}
        if self._searched is not None:
            recipe["lr_search"] = asdict(self._searched)
        return recipe

    def _scores(self) -> dict[str, Any]:
        scores: dict[str, Any] = {"heldout_rows": self._data.report.heldout_rows}
        if self.before is not None and self.after is not None:
            scores["before"] = asdict(self.before)
            scores["after"] = asdict(self.after)
            if self._head is None:
                scores["exact_match_by"] = "teacher forcing"
            else:
                for score in (scores["before"], scores["after"]):
                    score["accuracy"] = score.pop("exact_match")
        return scores


def _steps(config: TrainConfig, data: TrainingData) -> int:
    """Optimizer steps of a run."""
    batches = config.gradient_accumulation * current().size
    per_pass = math.ceil(len(data.train) / config.batch_size) / batches
    return config.max_steps or max(1, round((config.epochs or 1) * per_pass))


def _identity(base: BaseModel, data: TrainingData, config: TrainConfig) -> dict[str, Any]:
    """All that decides what a run does, as JSON holds it."""
    rows = hashlib.sha256()
    for side in (data.train, data.heldout):
        rows.update(repr([(e.prompt_ids, e.answer_ids) for e in side]).encode())
    of_run = {n: v for n, v in vars(config).items() if n not in _NOT_OF_THE_RUN}
    of_run["index_file"] = None if config.index_file is None else str(config.index_file)
    return of_run | {
        "rows": rows.hexdigest()[:16],
        "labels": list(data.labels),
        "base": base.spec.fingerprint,
        "weights": str(base.dtype),
        "device": base.device.type,
        "processes": current().size,
    }


# --- what is refused beforehand ----------------------------------------------------------------


def _check_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UsageError(
            f'training needs {" and ".join(missing)}: run pip install "neuroada-serve[train]"'
        )


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give --out a folder for the adapter")
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{out} cannot be written: {existing} is no folder you may write to")


def _check_contents(out: Path, resumed: bool) -> None:
    """Only what is an adapter of ours may be replaced, and what this run was killed at writing."""
    if not out.is_dir() or _is_adapter_folder(out):
        return
    ours = (WEIGHTS_FILE, CONFIG_FILE, LOSS_FILE, LOG_FILE, LR_FILE)
    others = [path.name for path in out.iterdir() if not is_unfinished(path)]
    if resumed:
        others = [name for name in others if name not in ours]
    if others:
        raise UsageError(
            f"{out} is not empty and holds no NeuroAda adapter; give --out a new folder"
        )


def _is_adapter_folder(folder: Path) -> bool:
    """Whether the folder is ours to replace; another method's adapter has the same file names."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "NEUROADA"


def _check_fits(base: BaseModel, config: TrainConfig) -> None:
    k_of = k_of_modules(base.spec.shapes, config)
    if config.task_type == SEQ_CLS and base.spec.hidden_size is None:
        raise UsageError(f"base {base.spec.name!r} has no linear output head to replace")
    module = min(k_of, key=lambda name: base.spec.shapes[name][1])
    d_in, k = base.spec.shapes[module][1], max(k_of.values())
    if k > d_in:
        raise UsageError(f"k={k} is above d_in={d_in} of {module}; the base allows {d_in}")
    if base.dtype == torch.float16:
        raise UsageError(
            "float16 gradients vanish without loss scaling; train with --dtype bfloat16 or "
            "float32, the adapter can be served in any dtype"
        )
