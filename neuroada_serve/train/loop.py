"""The optimizer's steps: transformers' Trainer over our batches, which can stop and resume
anywhere.

Every random draw comes from the seed or is part of a checkpoint, and batches come from one stream
that does not know where a pass of the Trainer's ends; so a run that was interrupted takes the very
steps that it would have taken.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from neuroada_serve.adapters.format import HEAD
from neuroada_serve.adapters.select import Selection
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.model.quiet import quiet_bitsandbytes
from neuroada_serve.train.batches import predict
from neuroada_serve.train.bypass import BypassedLinear
from neuroada_serve.train.checkpoint import Checkpoint
from neuroada_serve.train.ending import Course
from neuroada_serve.train.examples import Example
from neuroada_serve.train.head import TaskHead
from neuroada_serve.train.inplace import InplaceLinear
from neuroada_serve.train.objectives import Objective
from neuroada_serve.train.processes import Processes, current, unlaunched
from neuroada_serve.train.recompute import set_recompute

with quiet_bitsandbytes():
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

Layers = Mapping[str, InplaceLinear | BypassedLinear]
Notify = Callable[[str], None]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_CPU_RANDOM, _CUDA_RANDOM = "random.cpu", "random.cuda"


def values_of(layers: Layers) -> dict[str, nn.Parameter]:
    """Return the trained parameters of layers: M.value for every layer M, and M.bias where that is
    trained too."""
    values = {f"{name}.value": layer.value for name, layer in layers.items()}
    for name, layer in layers.items():
        if isinstance(layer.bias_value, nn.Parameter):
            values[f"{name}.bias"] = layer.bias_value
    return values


class LengthGroupedBatches(Sampler[list[int]]):
    """Sampler of batches of row numbers: rows of similar length together, yet in random order.

    Rows are shuffled, sorted by length within windows of a few batches, cut into batches, and the
    batches are shuffled. Each pass over the rows draws anew; the same seed gives the same batches.

    An iteration goes on where the last one ended, and is as long as `len` says: a pass, rounded up
    to a multiple of `multiple`. With several processes each gets every `size`th batch.
    """

    # In batches. A wide window saves padding, but rows of one length are often of one kind, and
    # steps of one kind train worse. Tokens computed per token of data, rows of very mixed length:
    # 1.86 at window 1, 1.29 at 4, 1.08 at 16; held-out loss after 40 steps of SQL, one seed: 0.150,
    # 0.150 and 0.202.
    _WINDOW = 4

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        multiple: int = 1,
        processes: Processes | None = None,
    ) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._random = Random(seed)
        self._processes = processes or Processes()
        self._multiple = multiple * self._processes.size
        self._stream = self._passes()

    @property
    def per_pass(self) -> int:
        """Number of batches in one pass over the rows."""
        return math.ceil(len(self._lengths) / self._batch_size)

    def __len__(self) -> int:
        whole = math.ceil(self.per_pass / self._multiple) * self._multiple
        return whole // self._processes.size

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            dealt = [next(self._stream) for _ in range(self._processes.size)]
            yield dealt[self._processes.rank]

    def skip(self, batches: int) -> None:
        """Skip `batches` batches, those of all processes counted."""
        for _ in range(batches):
            next(self._stream)

    def _passes(self) -> Iterator[list[int]]:
        while True:
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


class Loop:
    """The steps of one run.

    Args:
        model: with `layers` attached.
        layers: their values are trained, from their present state.
        examples: to train on.
        objective: what to learn from them.
        steps: optimizer steps of the whole run, at most.
        head: of the task, trained with the layers.
        course: of the learning rate, see `train.ending`; default: one for `steps` steps.
    """

    def __init__(
        self,
        model: Any,
        layers: Layers,
        examples: Sequence[Example],
        objective: Objective,
        config: TrainConfig,
        steps: int,
        head: TaskHead | None = None,
        course: Course | None = None,
    ) -> None:
        self._trained = values_of(layers)
        groups = [{"params": list(self._trained.values()), "lr": config.peak_lr}]
        if head is not None:
            self._trained[HEAD] = head.weight
            groups.append({"params": [head.weight], "lr": config.head_lr})
        self._model, self._layers, self._examples = model, layers, examples
        self._objective = objective
        self._config, self._steps = config, steps
        self._processes = current()
        self.losses: list[float] = []  # nats per answer token, one a step
        self.batches = LengthGroupedBatches(
            [len(e) for e in examples],
            config.batch_size,
            config.seed,
            config.gradient_accumulation,
            self._processes,
        )
        self._optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.course = course or Course(config, steps)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self.course)
        self._random: dict[str, Tensor] | None = None  # states to begin with

    @property
    def done(self) -> int:
        """Number of steps taken."""
        return len(self.losses)

    def follow_course(self) -> None:
        """Give the next step the learning rate of a course that has changed."""
        share = self.course(self.done)
        for group, peak in zip(self._optimizer.param_groups, self._scheduler.base_lrs, strict=True):
            group["lr"] = peak * share

    def run(self, after_step: Callable[[], bool], notify: Notify, title: str = "training") -> None:
        """Take the remaining steps.

        Args:
            after_step: called after each step; True stops.
            notify: receives a sentence now and then where no progress bar can be shown.

        Raises:
            UsageError: the loss stops being a number.
        """
        if self.done == self._steps:
            return
        config = self._config
        with unlaunched(), ExitStack() as stack:
            recompute = config.recompute, config.recompute_share
            stack.callback(set_recompute(self._model, *recompute))
            if config.compile:
                stack.callback(_compile_blocks(self._model))
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            progress = stack.enter_context(
                _Progress(self.course, self.losses, notify, title, self._processes.is_first)
            )
            arguments = TrainingArguments(
                output_dir=scratch,
                max_steps=self._steps - self.done,
                per_device_train_batch_size=config.batch_size,
                gradient_accumulation_steps=config.gradient_accumulation,
                learning_rate=config.peak_lr,
                max_grad_norm=config.max_grad_norm,
                bf16=config.bf16,
                seed=config.seed,
                use_cpu=next(self._model.parameters()).device.type == "cpu",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            # More GPUs would each get a replica by DataParallel, without the values in its weights.
            arguments._n_gpu = min(arguments.n_gpu, 1)
            trainer = _ValueTrainer(
                model=self._model,
                args=arguments,
                train_dataset=self._examples,
                callbacks=[_Callback(self._begin, progress.show, after_step)],
                optimizers=(self._optimizer, self._scheduler),
                batches=self.batches,
                losses=self.losses,
                objective=self._objective,
                packing=config.packing,
                values=list(self._trained.values()),
                processes=self._processes,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        if not all(bool(values.isfinite().all()) for values in self._trained.values()):
            raise diverged(self.done + 1, config.peak_lr)

    def _begin(self) -> None:
        """Restore the random states of a resumed run, after the Trainer has seeded everything."""
        if self._random is not None:
            torch.set_rng_state(self._random[_CPU_RANDOM])
            if _CUDA_RANDOM in self._random and torch.cuda.is_available():
                torch.cuda.set_rng_state(self._random[_CUDA_RANDOM])

    # --- where it stands -------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """Return everything that the coming steps depend on."""
        tensors: dict[str, Tensor] = {_CPU_RANDOM: torch.get_rng_state()}
        if next(self._model.parameters()).is_cuda:
            tensors[_CUDA_RANDOM] = torch.cuda.get_rng_state()
        moments_taken = 0
        for name, layer in self._layers.items():
            tensors[f"{name}.index"] = layer.index
            if layer.trained is not None:
                tensors[f"{name}.trained"] = layer.trained
        for name, values in self._trained.items():
            tensors[name] = values
            moments = self._optimizer.state[values]
            tensors |= {f"{name}.{moment}": moments[moment] for moment in _MOMENTS}
            moments_taken = int(moments["step"])
        state = {
            "losses": self.losses,
            "optimizer_step": moments_taken,
            "lr": [group["lr"] for group in self._optimizer.param_groups],
            "scheduler": self._scheduler.state_dict(),
        }
        return Checkpoint(self.done, tensors, state)

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint, before any step was taken."""
        tensors, state = checkpoint.tensors, checkpoint.state
        for name, values in self._trained.items():
            values.copy_(tensors[name])
            self._optimizer.state[values] = {
                "step": torch.tensor(float(state["optimizer_step"])),
                **{m: tensors[f"{name}.{m}"].to(values.device) for m in _MOMENTS},
            }
        for group, lr in zip(self._optimizer.param_groups, state["lr"], strict=True):
            group["lr"] = lr
        self._scheduler.load_state_dict(dict(state["scheduler"]))
        self.losses[:] = state["losses"]
        batches = self._config.gradient_accumulation * self._processes.size
        self.batches.skip(self.done * batches)
        self._random = {n: tensors[n] for n in (_CPU_RANDOM, _CUDA_RANDOM) if n in tensors}


def selections_of(checkpoint: Checkpoint, modules: Mapping[str, Any]) -> dict[str, Selection]:
    """Return the selections of a checkpoint's run, on the device of the modules."""
    selections = {}
    for name, module in modules.items():
        device = module.weight.device
        trained = checkpoint.tensors.get(f"{name}.trained")
        selections[name] = Selection(
            checkpoint.tensors[f"{name}.index"].to(device),
            None if trained is None else trained.to(device),
        )
    return selections


def diverged(step: int, lr: float) -> UsageError:
    """Return the error for a loss that is not a number at the start of step `step`, counted from
    1."""
    if step == 1:  # nothing has been trained yet
        return UsageError("the base's own loss is not a number; try --dtype float32")
    return UsageError(
        f"training diverged: the loss is not a number after step {step - 1}; "
        f"try a --lr below {lr:.2g}"
    )


class _ValueTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """transformers' Trainer with our batches and the objective's loss."""

    def __init__(
        self,
        *,
        batches: LengthGroupedBatches,
        losses: list[float],
        objective: Objective,
        packing: bool,
        values: Sequence[nn.Parameter],
        processes: Processes,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.model_accepts_loss_kwargs = True  # so it counts the answer tokens of a whole step
        self._batches = batches
        self._objective, self._packing = objective, packing
        self._losses = losses  # grows by one each step
        self._sum, self._batches_seen = 0.0, 0  # of the step under way
        self._values, self._processes = values, processes

    def get_train_dataloader(self) -> DataLoader[Example]:
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=partial(self._objective.collate, packed=self._packing),
            generator=torch.Generator(),  # it draws a number, which must not be of the run's
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return a step's batches, and the number of targets in all processes' batches of that
        step."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._processes.sum_([count])
        return batches, count

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward of a batch; after a step's last batch, sum the gradients of all
        processes."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self._batches_seen == 0:
            self._processes.sum_([v.grad for v in self._values if v.grad is not None])
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return the batch's share of the mean loss per target of the whole step."""
        found = predict(model, inputs)
        loss: Tensor = self._objective.loss(found) / num_items_in_batch
        value = loss.item()
        if not math.isfinite(value):
            raise diverged(len(self._losses) + 1, self.args.learning_rate)
        self._sum += value
        self._batches_seen += 1
        if self._batches_seen == self.args.gradient_accumulation_steps:
            total = torch.tensor(self._sum, dtype=torch.float64, device=loss.device)
            self._processes.sum_([total])
            self._losses.append(total.item())
            self._sum, self._batches_seen = 0.0, 0
        return loss


def _compile_blocks(model: Any) -> Callable[[], None]:
    """Compile every decoder layer. Returns a function that undoes it."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    blocks = max(lists, key=len, default=[])
    for block in blocks:
        block.compile()

    def undo() -> None:
        for block in blocks:
            block._compiled_call_impl = None  # torch has no public way back

    return undo


class _Callback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Reports the beginning and every optimizer step; stops the Trainer when `after_step` says
    so."""

    def __init__(
        self, begin: Callable[[], None], show: Callable[[], None], after_step: Callable[[], bool]
    ) -> None:
        self._begin, self._show, self._after_step = begin, show, after_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show()
        if self._after_step():
            control.should_training_stop = True


class _Progress:
    """Shows progress: a bar on stderr if that is a terminal, else a sentence now and then."""

    _SENTENCES = 10

    def __init__(
        self, course: Course, losses: list[float], notify: Notify, title: str, bar: bool
    ) -> None:
        console = Console(stderr=True)
        self._notify, self._course, self._losses = notify, course, losses
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not bar or not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=course.end, completed=len(losses), loss="-")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self) -> None:
        done = len(self._losses)
        recent = self._losses[-10:]
        loss = f"{sum(recent) / len(recent):.3f}"
        end = self._course.end
        self._bar.update(self._task, completed=done, total=end, loss=loss)
        every = math.ceil(end / self._SENTENCES)
        if self._bar.disable and (done % every == 0 or done == end):
            of = f"at most {end}" if self._course.may_end_early else str(end)
            self._notify(f"Step {done} of {of}, loss {loss}.")
