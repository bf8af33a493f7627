"""One training run: rows in, an adapter folder out, the base untouched."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from neuroada_serve.adapters.durable import write_durably
from neuroada_serve.adapters.format import (
    CONFIG_FILE,
    Adapter,
    AdapterConfig,
    ModuleBypass,
    make_adapter,
    save_adapter,
)
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.model.loader import BaseModel, adaptable_modules
from neuroada_serve.model.quiet import quiet_transformers
from neuroada_serve.train.data import DataReport, Example, load_data
from neuroada_serve.train.inplace import InplaceLinear, inplace_training, magnitude_selections
from neuroada_serve.train.plot import loss_curve
from neuroada_serve.train.score import Score, answer_logits, collate, score

LOSS_FILE = "loss.png"
FILE_DTYPE = torch.bfloat16

_EXTRA = ("accelerate", "matplotlib")
_MAX_GRAD_NORM = 1.0

Notify = Callable[[str], None]


@dataclass(frozen=True)
class TrainReport:
    """What a run made, and how it went.

    adapter: as written to `out`. steps: optimizer steps. seconds: of the steps alone.
    losses: mean over each step's batch, nats per answer token.
    before, after: the base's and the adapter's score on the held-out rows; None without any.
    """

    adapter: Adapter
    out: Path
    data: DataReport
    steps: int
    seconds: float
    losses: tuple[float, ...]
    before: Score | None
    after: Score | None


def train_adapter(
    base: BaseModel,
    data: Path,
    out: Path,
    config: TrainConfig,
    notify: Notify = lambda message: None,
) -> TrainReport:
    """Train an adapter of `base` on the rows in `data` and write it, with loss.png, to `out`.

    The base's weights change while it runs and have their original bits afterwards, however it
    ends; `out` is touched only when everything has succeeded. On one device with one thread count,
    the same base, data and config give the same adapter, byte for byte.

    Args:
        base: as loaded; not in use by an engine.
        data: JSON lines, see `train.data`.
        out: a new folder, an empty one, or that of an adapter, which is then replaced.
        notify: told in a sentence what goes on. A progress bar shows on stderr where that is a
            terminal.

    Raises:
        UsageError: before training, if `config`, `out` or this installation does not allow it;
            while training, if the loss stops being a number.
        DataError: rows at fault.
    """
    # 1. Everything that can be refused is refused before anything is computed.
    _check_extra()
    _check_out(out)
    _check_fits(base, config)
    loaded = load_data(base, data, config)
    notify(f"{loaded.report}.")
    batches = LengthGroupedBatches([len(e) for e in loaded.train], config.batch_size, config.seed)
    steps = config.max_steps or max(1, round((config.epochs or 1) * len(batches)))

    def score_heldout(what: str, next_step: int) -> Score | None:
        if not loaded.heldout:
            return None
        notify(f"Scoring {what} on {len(loaded.heldout)} held-out rows.")
        found = score(base.model, loaded.heldout, config.batch_size)
        if not math.isfinite(found.loss):
            raise _diverged(next_step, config.peak_lr)
        return found

    modules = adaptable_modules(base.model)
    assert modules.keys() == base.spec.shapes.keys(), "the model is in use by an engine"
    selections = magnitude_selections(modules, config.k)
    with quiet_transformers(), inplace_training(base.model, modules, selections) as layers:
        before = score_heldout("the base", next_step=1)

        # 2. The steps.
        count = sum(layer.value.numel() for layer in layers.values())
        notify(f"Training {count:,} values for {steps} steps, lr {config.peak_lr:.2g}.")
        started = time.perf_counter()
        losses = _run_steps(base, layers, loaded.train, batches, steps, config, notify)
        seconds = time.perf_counter() - started

        # 3. The values as the file will hold them: what is scored is what will be served.
        for layer in layers.values():
            with torch.no_grad():
                layer.value.copy_(layer.value.to(FILE_DTYPE))
        after = score_heldout("the adapter", next_step=steps + 1)
        parts = {
            name: ModuleBypass(layer.index.cpu(), layer.value.detach().to("cpu", FILE_DTYPE))
            for name, layer in layers.items()
        }

    if before is not None and after is not None and after.loss > before.loss:
        notify(
            f"The held-out loss rose from {before.loss:.3f} to {after.loss:.3f}: try a --lr below "
            f"{config.peak_lr:.2g}, or more rows."
        )
    adapter_config = AdapterConfig(
        base_model_name_or_path=base.spec.name,
        base_fingerprint=base.spec.fingerprint,
        k=config.k,
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in modules})),
        metadata={
            "recipe": _recipe(base, data, config, loaded.report, steps, len(batches)),
            "scores": _scores(loaded.report, before, after),
        },
    )
    adapter = make_adapter(adapter_config, parts)
    save_adapter(adapter, out)
    title = f"{out.name}: {base.spec.name}, k={config.k}, lr {config.peak_lr:.2g}"
    write_durably(out / LOSS_FILE, loss_curve(losses, before, after, title))
    return TrainReport(adapter, out, loaded.report, steps, seconds, losses, before, after)


# --- what is refused beforehand ----------------------------------------------------------------


def _check_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UsageError(
            f'training needs {" and ".join(missing)}: run pip install "neuroada-serve[train]"'
        )


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give --out a folder for the adapter")
    if out.is_dir() and any(out.iterdir()) and not _is_adapter_folder(out):
        raise UsageError(
            f"{out} is not empty and holds no NeuroAda adapter; give --out a new folder"
        )
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{out} cannot be written: {existing} is no folder you may write to")


def _is_adapter_folder(folder: Path) -> bool:
    """Whether the folder is ours to replace; another method's adapter has the same file names."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "NEUROADA"


def _check_fits(base: BaseModel, config: TrainConfig) -> None:
    module, (_, d_in) = min(base.spec.shapes.items(), key=lambda item: item[1][1])
    if config.k > d_in:
        raise UsageError(f"k={config.k} is above d_in={d_in} of {module}; the base allows {d_in}")
    if base.dtype == torch.float16:
        raise UsageError(
            "float16 gradients vanish without loss scaling; train with --dtype bfloat16 or "
            "float32, the adapter can be served in any dtype"
        )


# --- the steps ---------------------------------------------------------------------------------


class LengthGroupedBatches(Sampler[list[int]]):
    """Batches of row numbers: rows of like length together, yet in random order.

    Rows are shuffled, sorted by length within windows of a few batches, cut into batches, and the
    batches are shuffled. Each pass draws anew; the same seed gives the same passes.
    """

    # In batches. A wide window saves padding, but rows of one length are often of one kind, and
    # steps of one kind train worse. Tokens computed per token of data, rows of very mixed length:
    # 1.86 at window 1, 1.29 at 4, 1.08 at 16; held-out loss after 40 steps of SQL, one seed: 0.150,
    # 0.150 and 0.202.
    _WINDOW = 4

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._random = Random(seed)

    def __len__(self) -> int:
        return math.ceil(len(self._lengths) / self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(range(len(self._lengths)))
        self._random.shuffle(rows)
        window = self._WINDOW * self._batch_size
        grouped = [
            row
            for start in range(0, len(rows), window)
            for row in sorted(rows[start : start + window], key=self._lengths.__getitem__)
        ]
        size = self._batch_size
        batches = [grouped[start : start + size] for start in range(0, len(grouped), size)]
        self._random.shuffle(batches)
        yield from batches


def _run_steps(
    base: BaseModel,
    layers: dict[str, InplaceLinear],
    examples: Sequence[Example],
    batches: LengthGroupedBatches,
    steps: int,
    config: TrainConfig,
    notify: Notify,
) -> tuple[float, ...]:
    """Run the optimizer; the layers' values are trained in place. Returns each step's loss."""
    optimizer = torch.optim.AdamW(
        [layer.value for layer in layers.values()], lr=config.peak_lr, weight_decay=0.0
    )
    warmup = min(int(config.warmup_ratio * steps), steps - 1)

    def share_of_peak(step: int) -> float:  # up to 1 at step `warmup`, then down; never 0
        return min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    with tempfile.TemporaryDirectory() as scratch, _Progress(steps, notify) as progress:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.peak_lr,
            max_grad_norm=_MAX_GRAD_NORM,
            seed=config.seed,
            use_cpu=base.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        # More GPUs would each get a replica by DataParallel, without the values written into it.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = _ValueTrainer(
            model=base.model,
            args=arguments,
            train_dataset=examples,
            callbacks=[progress.callback],
            optimizers=(optimizer, scheduler),
            batches=batches,
            losses=progress.losses,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if not all(bool(layer.value.isfinite().all()) for layer in layers.values()):
        raise _diverged(steps + 1, config.peak_lr)
    return tuple(progress.losses)


class _ValueTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """transformers' Trainer with our batches and a loss over answer tokens alone."""

    def __init__(
        self, *, batches: LengthGroupedBatches, losses: list[float], **others: Any
    ) -> None:
        super().__init__(**others)
        self._batches = batches
        self._losses = losses  # grows by one each step

    def get_train_dataloader(self) -> DataLoader[Example]:
        return DataLoader(self.train_dataset, batch_sampler=self._batches, collate_fn=collate)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Mean loss per answer token of the batch."""
        logits, targets, _ = answer_logits(model, inputs)
        loss = F.cross_entropy(logits, targets)
        value = loss.item()
        if not math.isfinite(value):
            raise _diverged(len(self._losses) + 1, self.args.learning_rate)
        self._losses.append(value)
        return loss


def _diverged(step: int, lr: float) -> UsageError:
    """The loss that step `step`, from 1, starts from is not a number."""
    if step == 1:  # nothing has been trained yet
        return UsageError("the base's own loss is not a number; try --dtype float32")
    return UsageError(
        f"training diverged: the loss is not a number after step {step - 1}; "
        f"try a --lr below {lr:.2g}"
    )


class _Progress:
    """Shows the steps: a bar on stderr where that is a terminal, else a sentence now and then."""

    _SENTENCES = 10

    def __init__(self, steps: int, notify: Notify) -> None:
        console = Console(stderr=True)
        self.losses: list[float] = []
        self.callback = _StepCallback(self._show)
        self._notify = notify
        self._steps = steps
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, loss="-")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def _show(self) -> None:
        done = len(self.losses)
        recent = self.losses[-10:]
        loss = f"{sum(recent) / len(recent):.3f}"
        self._bar.update(self._task, completed=done, loss=loss)
        every = math.ceil(self._steps / self._SENTENCES)
        if self._bar.disable and (done % every == 0 or done == self._steps):
            self._notify(f"Step {done} of {self._steps}, loss {loss}.")


class _StepCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Calls back after every optimizer step."""

    def __init__(self, show: Callable[[], None]) -> None:
        self._show = show

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show()


# --- what the file says of the run -------------------------------------------------------------


def _recipe(
    base: BaseModel,
    data: Path,
    config: TrainConfig,
    report: DataReport,
    steps: int,
    steps_per_epoch: int,
) -> dict[str, Any]:
    return {
        "data": data.name,
        "rows": report.rows,
        "train_rows": report.train_rows,
        "too_long_rows": report.too_long,
        "heldout": f"{config.eval_fraction:g} of the rows"
        if config.eval_data is None
        else config.eval_data.name,
        "k": config.k,
        "lr": config.peak_lr,
        "warmup_ratio": config.warmup_ratio,
        "steps": steps,
        "epochs": round(steps / steps_per_epoch, 3),
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "seed": config.seed,
        "dtype": str(base.dtype).removeprefix("torch."),
        "prompt_format": config.prompt_format if base.has_chat_template else "plain",
        "versions": {name: version(name) for name in ("neuroada-serve", "torch", "transformers")},
    }


def _scores(report: DataReport, before: Score | None, after: Score | None) -> dict[str, Any]:
    scores: dict[str, Any] = {"heldout_rows": report.heldout_rows}
    if before is not None and after is not None:
        scores["before"] = asdict(before)
        scores["after"] = asdict(after)
        scores["exact_match_by"] = "teacher forcing"
    return scores
