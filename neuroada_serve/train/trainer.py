"""Train an adapter in one run: rows in, an adapter folder out, the base untouched."""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from neuroada_serve.adapters.card import write_card
from neuroada_serve.adapters.durable import (
    check_writable,
    is_unfinished,
    remove_unfinished,
    write_durably,
)
from neuroada_serve.adapters.format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    save_adapter,
)
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.model.loader import BaseModel, adaptable_modules, with_model_len
from neuroada_serve.model.quiet import quiet_transformers
from neuroada_serve.tasks import task_of
from neuroada_serve.train.batches import packs
from neuroada_serve.train.bypass import bypass_training
from neuroada_serve.train.checkpoint import Checkpoints, checkpoint_folder
from neuroada_serve.train.data import DataReport, TrainingData, load_data
from neuroada_serve.train.ending import Course, plan_of
from neuroada_serve.train.inplace import inplace_training
from neuroada_serve.train.interrupt import between_steps
from neuroada_serve.train.loop import Layers, Loop, Notify, selections_of, values_of
from neuroada_serve.train.lr_finder import LearningRates, find_learning_rate
from neuroada_serve.train.objectives import Baseline
from neuroada_serve.train.plot import learning_rate_plot, loss_curve
from neuroada_serve.train.processes import current
from neuroada_serve.train.publish import Improvements, Publisher, publish_or_tell
from neuroada_serve.train.quantize import quantize_
from neuroada_serve.train.rows import Data
from neuroada_serve.train.run import Evaluation, Run, score_heldout
from neuroada_serve.train.samples import Sample
from neuroada_serve.train.score import Score
from neuroada_serve.train.selection import k_of_modules, select
from neuroada_serve.train.served import adapter_at, score_of_adapter

LOSS_FILE = "loss.png"
LOG_FILE = "loss.jsonl"
LR_FILE = "lr.png"

_EXTRA = ("accelerate", "matplotlib")
# What decides neither a step nor what is kept of it, so that it may change between two attempts.
_NOT_OF_THE_RUN = ("save_steps", "eval_data", "samples")


@dataclass(frozen=True)
class TrainReport:
    """The adapter that a run made, and how the run went.

    adapter: as written to `out`. steps: optimizer steps taken. seconds: that this process took
        for its steps.
    losses: mean over each step, see `tasks.Task.loss`.
    before, after: the base's and the adapter's score on the held-out rows; None without any.
    evaluations: in order, including the one kept. best_step: the step of the adapter's values.
    baseline, samples: see `train.samples`; None and empty without held-out rows.
    published: whether a server serves the adapter now; None if none was asked to.
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
    baseline: Baseline | None = None
    samples: tuple[Sample, ...] = ()
    published: bool | None = None


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
    publish_improved: bool = False,
) -> TrainReport:
    """Train an adapter of `base` on the rows in `data` and write it, with its curves, to `out`.

    The base's weights change meanwhile and have their original bits again afterwards, however the
    run ends; only `quantize` replaces its layers for good. `out` is touched when everything has
    succeeded, or with `publish_improved` whenever an adapter is published. On one device with one
    thread count, the same base, data and config give the same adapter, byte for byte, also when
    the run was interrupted: its checkpoints lie in `NAME.training` beside `out`, and the same call
    goes on from the newest that is whole.

    Args:
        base: as loaded; not in use by an engine.
        data: rows, see `train.data`.
        out: a new folder, an empty one, or that of an adapter, which is then replaced.
        notify: receives sentences on the progress. A progress bar shows on stderr if that is a
            terminal.
        fresh: discard checkpoints instead of going on from them.
        publish: address of a server that loads the finished adapter, see `train.publish`.
        publish_improved: also have it load every adapter on the way that scores better than what it
            serves; the finished one is then loaded only if it does.

    Raises:
        UsageError: before training, if `config`, `out` or this installation does not allow it, or
            checkpoints are of another run; while training, if the loss stops being a number or a
            file cannot be written.
        DataError: some rows are faulty.
    """
    # 1. Everything that can be refused is refused before anything is computed.
    processes = current()
    if not processes.is_first:
        notify = _say_nothing
    _check_extra()
    check_place(out)
    _check_fits(base, config)
    if config.max_model_len is not None:
        base = with_model_len(base, config.max_model_len)
    loaded = load_data(base, data, config)
    notify(f"{loaded.report}.")
    if publish_improved and publish is None:
        raise UsageError("--publish-improved needs --publish, the server's address")
    if publish_improved and not loaded.heldout:
        raise UsageError("--publish-improved needs held-out rows, to say what is better")
    publisher = Publisher(publish, out) if publish and processes.is_first else None
    checkpoints = Checkpoints(checkpoint_folder(out), _identity(base, loaded, config))
    if fresh and processes.is_first:
        checkpoints.remove()
    processes.wait()
    resumed = checkpoints.newest(notify)
    _check_contents(out, resumed is not None)
    processes.wait()  # nobody writes while another reads

    modules: Mapping[str, Any] = adaptable_modules(base.model)
    assert modules.keys() == base.spec.shapes.keys(), "the model is in use by an engine"
    improvements: Improvements | None = None
    if publisher is not None:
        improvements = _improvements(publisher, out, base, loaded, config, notify)
        improvements = improvements if publish_improved else None
    beside = config.bypass or config.quantize != "none"
    if config.quantize != "none":
        modules = quantize_(base.model, modules, config.quantize)
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        head = stack.enter_context(loaded.objective.head(base.model, config.seed))
        if resumed is None:
            selections = select(base.model, modules, loaded.train, loaded.objective, config, notify)
            modules = {name: modules[name] for name in selections}
            processes.share_(one.index for one in selections.values())
        else:
            modules = {name: modules[name] for name in k_of_modules(modules, config)}
            selections = selections_of(resumed, modules)
        attach = bypass_training if beside else inplace_training
        layers: Layers = stack.enter_context(
            attach(base.model, modules, selections, config.tune_bias)
        )
        if head is not None:  # attaching has frozen it with the rest
            head.requires_grad_(True)
        if config.packing and not packs(base.model):
            raise UsageError(
                "rows of a packed batch see each other in this base's attention; train without "
                "--packing"
            )

        # 2. Where it begins: anew, with a learning rate sought for, or where it was interrupted.
        searched: LearningRates | None = None
        before: Score | None = None
        if resumed is not None:
            if resumed.state["lr_search"] is not None:
                searched = LearningRates(**resumed.state["lr_search"])
            notify(f"Resuming from step {resumed.step}, from {checkpoints.folder}.")
        else:
            before = score_heldout(base, loaded, config, notify, "the base", 1)
            if config.lr == "auto":
                searched = find_learning_rate(base.model, layers, loaded, config, notify, head)
        if searched is not None:
            config = replace(config, lr=searched.best)

        # 3. The steps.
        plan = plan_of(config, len(loaded.train), len(loaded.heldout), processes.size)
        course = Course(config, plan.steps, plan.is_open)
        of_rows = (loaded.train, loaded.objective)
        loop = Loop(base.model, layers, *of_rows, config, plan.steps, head, course)
        of_steps = (loop, plan, checkpoints, searched, before, notify, improvements)
        run = Run(base, loaded, data.name, layers, head, config, *of_steps)
        if resumed is not None:
            loop.restore(resumed)
            run.restore(resumed)
        biases = [v for name, v in values_of(layers).items() if name.endswith(".bias")]
        count = sum(selections[name].nnz for name in layers) + sum(map(len, biases))
        notify(f"Training {count:,} values, lr {config.peak_lr:.2g}, {plan.words()}.")
        if processes.size > 1:
            each = "a batch" if (n := config.gradient_accumulation) == 1 else f"{n} batches"
            notify(f"Each of {processes.size} processes takes {each} a step.")
        started = time.perf_counter()
        if not run.is_over:  # it may have been interrupted just before the adapter was written
            # Of several processes one could stop a step before the others: they stop at once.
            alone = processes.size == 1
            interrupted = stack.enter_context(between_steps(notify)) if alone else lambda: False
            loop.run(lambda: run.after_step(interrupted), notify)
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
        run.baseline,
        run.samples,
    )
    if not processes.is_first:
        return report
    try:
        remove_unfinished(out)
        save_adapter(adapter, out)
        title = f"{out.name}: {base.spec.name}, k={config.k_words}, lr {config.peak_lr:.2g}"
        points = [(one.step, one.score) for one in run.evaluations]
        curve = loss_curve(loop.losses, run.before, points, run.best_step, title, loaded.task)
        write_durably(out / LOSS_FILE, curve)
        write_durably(out / LOG_FILE, run.log().encode())
        write_card(out, adapter.config)
        if searched is not None:
            write_durably(out / LR_FILE, learning_rate_plot(searched, loaded.task))
    except OSError as error:
        raise UsageError(
            f"the adapter cannot be written to {out}: {error.strerror}; make room, and the same "
            f"command goes on from {checkpoints.folder}"
        ) from error
    checkpoints.remove()
    if publisher is None:
        return report
    if improvements is not None and run.after is not None:
        published = improvements.publish(adapter, run.after.loss, run.best_step)
    else:
        published = publish_or_tell(publisher, adapter, run.best_step, notify)
    return replace(report, published=published)


def _improvements(
    publisher: Publisher,
    out: Path,
    base: BaseModel,
    data: TrainingData,
    config: TrainConfig,
    notify: Notify,
) -> Improvements | None:
    """Return a publisher of adapters that beat the one served; None if that one cannot be
    scored."""
    digest = publisher.served_digest()
    if digest is None:
        return Improvements(publisher, None, notify)
    served = adapter_at(out, base, digest)
    score = None if served is None else score_of_adapter(base, served, data, config.batch_size)
    if score is None:
        notify(
            f"The version of {publisher.name!r} that is served cannot be scored on these rows: it "
            f"is not the adapter in {out}, or of another task. The finished adapter replaces it."
        )
        return None
    notify(
        f"The version of {publisher.name!r} that is served has a held-out loss of {score.loss:.4f}."
    )
    return Improvements(publisher, score.loss, notify)


def _identity(base: BaseModel, data: TrainingData, config: TrainConfig) -> dict[str, Any]:
    """Return everything that decides what a run does, as JSON holds it."""
    rows = hashlib.sha256()
    for side in (data.train, data.heldout):
        rows.update(repr([(e.prompt_ids, e.answer_ids, e.target) for e in side]).encode())
    of_run = {n: v for n, v in vars(config).items() if n not in _NOT_OF_THE_RUN}
    of_run["index_file"] = None if config.index_file is None else str(config.index_file)
    return of_run | {
        "rows": rows.hexdigest()[:16],
        "labels": list(data.task.labels),
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


def check_place(out: Path) -> None:
    """Refuse a folder that cannot be written, before anything is loaded.

    Raises:
        UsageError
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give --out a folder for the adapter")
    check_writable(out, out)


def _check_contents(out: Path, resumed: bool) -> None:
    """Refuse a folder that holds anything but an adapter of ours or the remains of this run."""
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
    """Tell whether the folder is ours to replace; another method's adapter has the same file
    names."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "NEUROADA"


def _check_fits(base: BaseModel, config: TrainConfig) -> None:
    k_of = k_of_modules(base.spec.shapes, config)
    if task_of(config.task_type, config.labels).pools and base.spec.hidden_size is None:
        raise UsageError(f"base {base.spec.name!r} has no linear output head to replace")
    if config.tune_bias and not base.spec.biased & k_of.keys():
        raise UsageError(
            f"the layers to train of base {base.spec.name!r} have no biases; leave out --tune-bias"
        )
    module = min(k_of, key=lambda name: base.spec.shapes[name][1])
    d_in, k = base.spec.shapes[module][1], max(k_of.values())
    if k > d_in:
        raise UsageError(f"k={k} is above d_in={d_in} of {module}; the base allows {d_in}")
    if base.dtype == torch.float16:
        raise UsageError(
            "float16 gradients vanish without loss scaling; train with --dtype bfloat16 or "
            "float32, the adapter can be served in any dtype"
        )
