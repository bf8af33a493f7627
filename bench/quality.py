"""What methods learn from the same data: NeuroAda, LoRA and full fine-tuning of one small base.

Two sets to train on: commonsense_15k, then scored on its validation rows, BoolQ and ARC-Easy, and
math_10k, scored on held-out rows of its own, MultiArith and AddSub. For one set and seed every
method gets the same batches in the same order, the same AdamW (no weight decay, 10 % warm-up,
linear decay, gradients clipped to 1) and the loss on answers alone. Learning rates are tuned alike:
as many values for each method, on a log grid about its usual one, by the loss on rows kept out of
training, with one seed and fewer steps; then the best one with every seed. A best value at the edge
of its grid is flagged: a better one may lie outside.

    NeuroAda    float32 values, weights in the base's dtype; all linear layers of the blocks.
                Magnitude, random (of the seed) or gradient (the base's, of the first batches) index
    LoRA        peft, float32, alpha = 2 r, no dropout, the same layers; ranks whose parameters are
                those of k=8, eight times as many, and rank 1: the least there is, often above k=1's
    full        every parameter, embeddings and norms too, with a float32 master copy

A multiple-choice row is right if, after the answer's beginning that all its options share, the
right option's next token is the likeliest of the options'. Word problems are answered greedily by
the engine, from weights of the base's dtype, into which LoRA is merged; one is right if the last
number of the greedy answer is within 0.001 of the true one. `loss` is that of the reference answer.

Runs are spread over --workers processes, each line of OUT.runs.jsonl is one that is done; started
again with the same settings, it goes on from there, if need be on another machine: `parts` in the
report says which made which runs. --minutes: no run is started after that.

    python bench/quality.py --prepare rows.json.gz                  needs the data, not a GPU
    python bench/quality.py --prepared rows.json.gz --base FOLDER --minutes 4 --workers 8
    python bench/quality.py --prepared rows.json.gz --part 1/2      every second set and method
    python bench/quality.py --merge a.runs.jsonl b.runs.jsonl       reports on parts together

Not measured: bases of another size, long training (the longest here is some hundred steps), free
generation of multiple-choice answers, other layers or layouts for LoRA, tuning of anything but the
learning rate, whole test sets (rows are drawn once, the same for all). Memory on the CPU is not
taken. Seconds and memory are those of runs that share a machine, so they compare roughly.
"""

import argparse
import copy
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from neuroada_serve.adapters.select import Selection, magnitude_index
from neuroada_serve.benchmark.report import environment, plain
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.errors import DataError, UsageError
from neuroada_serve.model.loader import (
    BaseModel,
    adaptable_modules,
    find_device,
    is_transposed,
    load_base,
    matrix_shape,
)
from neuroada_serve.model.quiet import quiet_transformers
from neuroada_serve.model.source import resolve_model
from neuroada_serve.request import SamplingParams
from neuroada_serve.train.data import Row, encode_row
from neuroada_serve.train.inplace import InplaceLinear, inplace_training, magnitude_selections

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "neuroada-bench/1"
TUNING_SEED = 0
GRADIENT_BATCHES = 4
WARMUP = 0.1
MAX_GRAD_NORM = 1.0
TOLERANCE = 1e-3
_MOST_AT_ONCE = 256  # word problems answered together
_WINDOW = 4  # batches whose rows are sorted by length together
_FORMAT = re.compile(r"Answer format: (\S+)\s*$")
_NUMBER = re.compile(r"-?\d+\.?\d*")


@dataclass(frozen=True)
class Method:
    """One way to train.

    kind: "neuroada", "lora" or "full".
    k: entries per neuron; of LoRA, those whose parameters it is to have, None for rank 1.
    usual_lr: the middle of the grid.
    """

    kind: str
    usual_lr: float
    k: int | None = None
    selection: str = "magnitude"

    def rank(self, modules: Mapping[str, Any]) -> int:
        """LoRA's rank whose parameters come closest to k per neuron, at least 1."""
        if self.k is None:
            return 1
        shapes = [matrix_shape(module) for module in modules.values()]
        neurons, per_rank = sum(d_out for d_out, _ in shapes), sum(map(sum, shapes))
        return max(1, round(self.k * neurons / per_rank))


# LoRA's and full fine-tuning's usual rates are for a few hundred steps of a model this small.
METHODS = {
    "neuroada-k1": Method("neuroada", 0.02, 1),
    "neuroada-k8": Method("neuroada", 0.02 / 8**0.5, 8),
    "neuroada-k20": Method("neuroada", 0.02 / 20**0.5, 20),
    "lora-r1": Method("lora", 2e-3),
    "lora-as-k8": Method("lora", 2e-3, 8),
    "lora-8x-k8": Method("lora", 1e-3, 64),
    "full": Method("full", 1e-4),
    "neuroada-k8-random": Method("neuroada", 0.02 / 8**0.5, 8, "random"),
    "neuroada-k8-gradient": Method("neuroada", 0.02 / 8**0.5, 8, "gradient"),
}


@dataclass(frozen=True)
class Task:
    """A file to train on and those to score on: name -> (file, kind of score)."""

    train: str
    evals: dict[str, tuple[str, str]]


TASKS = {
    "math": Task(
        "math_10k.train",
        {
            "math_10k": ("math_10k.train", "loss"),
            "MultiArith": ("MultiArith.test", "number"),
            "AddSub": ("AddSub.test", "number"),
        },
    ),
    "commonsense": Task(
        "commonsense_15k.train",
        {
            "commonsense": ("commonsense_15k.validation", "choice"),
            "BoolQ": ("boolq.test", "choice"),
            "ARC-Easy": ("ARC-Easy.test", "choice"),
        },
    ),
}


@dataclass(frozen=True)
class Job:
    """One run. phase: "base" (nothing is trained), "tune" or "final"."""

    task: str
    method: str
    phase: str
    seed: int
    lr: float
    steps: int

    @property
    def key(self) -> str:
        lr = f"/{self.lr:.3g}" if self.phase == "tune" else ""
        return f"{self.task}/{self.method}/{self.phase}/{self.seed}{lr}"


@dataclass(frozen=True)
class Settings:
    """What results depend on, beside the rows; runs of equal settings belong together."""

    steps: int
    tune_steps: int
    batch: int
    eval_batch: int
    seeds: int
    lr_values: int
    lr_factor: float
    max_new_tokens: int
    dtype: str
    usual_lr: dict[str, float] = field(default_factory=dict)

    def grid(self, method: str) -> list[float]:
        """Rising learning rates, `lr_factor` apart, about the method's usual one."""
        usual = self.usual_lr.get(method, METHODS[method].usual_lr)
        middle = (self.lr_values - 1) / 2
        return [usual * self.lr_factor ** (i - middle) for i in range(self.lr_values)]


# --- rows ------------------------------------------------------------------------------------


def prepare(base: BaseModel, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Token ids of all rows that are trained or scored on, drawn once.

    Returns:
        A JSON document: "base", "fingerprint", "sizes", and per task "train" and "tune" (rows of
        "p", "a": ids of prompt and answer) and "evals": name -> "kind", "majority", "chance",
        "rows". Rows to choose in have "at", "o", "y": where in the answer the options part, each
        option's token there, and which is right; word problems have "n", the number.
    """
    tasks: dict[str, Any] = {}
    for name, task in TASKS.items():
        drawn = _draw(read_jsonl(data / f"{task.train}.jsonl.gz"), task.train)
        count = args.train_rows + args.tune_rows
        own = args.eval_rows if any(f == task.train for f, _ in task.evals.values()) else 0
        encoded = _encode_rows(base, drawn, "loss", args.max_length, count + own)
        train, spare = encoded[:count], encoded[count:]
        trained = {row["instruction"] for row in drawn}
        evals = {}
        for eval_name, (file, kind) in task.evals.items():
            rows = spare
            if file != task.train:
                raw = _draw(read_jsonl(data / f"{file}.jsonl.gz"), file)
                raw = [row for row in raw if row["instruction"] not in trained]
                rows = _encode_rows(base, raw, kind, args.max_length, args.eval_rows)
            if not rows:
                raise DataError(f"no rows are left to score {eval_name}; lower --train-rows")
            evals[eval_name] = {"kind": kind, **_guesses(rows, kind), "rows": rows}
        tune, rest = train[: args.tune_rows], train[args.tune_rows :]
        if not tune or not rest:
            raise DataError(f"{task.train} has too few rows of {args.max_length} tokens to train")
        tasks[name] = {"train": rest, "tune": tune, "evals": evals}
    sizes = {name: getattr(args, name) for name in ("train_rows", "tune_rows", "eval_rows")}
    sizes["max_length"] = args.max_length
    return {
        "base": base.spec.name,
        "fingerprint": base.spec.fingerprint,
        "sizes": sizes,
        "tasks": tasks,
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt") as file:
            return [json.loads(line) for line in file]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); name its folder by --data") from error


def _draw(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows in an order that depends on the file's name alone, each prompt once."""
    once = list({row["instruction"]: row for row in rows}.values())
    random.Random(name).shuffle(once)
    return once


def _encode_rows(
    base: BaseModel, rows: Sequence[dict[str, Any]], kind: str, most: int, count: int
) -> list[dict[str, Any]]:
    """The first `count` rows of at most `most` tokens."""
    found: list[dict[str, Any]] = []
    with quiet_transformers():
        for row in rows:
            if len(found) == count:
                break
            encoded = encode(base, row, kind)
            if len(encoded["p"]) + len(encoded["a"]) <= most:
                found.append(encoded)
    return found


def encode(base: BaseModel, row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A row as `prepare` describes it."""

    def ids(answer: str) -> tuple[list[int], list[int]]:
        messages = ({"role": "user", "content": row["instruction"]},)
        example = encode_row(base, Row(0, messages, row["instruction"] + "\n", answer), "chat")
        return list(example.prompt_ids), list(example.answer_ids)

    prompt, answer = ids(row["output"])
    encoded: dict[str, Any] = {"p": prompt, "a": answer}
    if kind == "number":
        encoded["n"] = float(row["answer"])
    if kind == "choice":
        options = options_of(row["instruction"])
        right, output = str(row["answer"]), str(row["output"])
        if right not in options or not output.endswith(right):
            raise DataError(f"answer {right!r} is none of {options} at the end of {output!r}")
        stem = output.removesuffix(right)
        answers = [ids(stem + option)[1] for option in options]
        at = len(os.path.commonprefix(answers))
        encoded |= {"at": at, "o": [a[at] for a in answers], "y": options.index(right)}
        if len(set(encoded["o"])) < len(options):
            raise DataError(f"options {options} do not part at one token in this tokenizer")
    return encoded


def options_of(instruction: str) -> list[str]:
    """What an instruction lets one answer with, as its last line says: true/false, say."""
    if (found := _FORMAT.search(instruction)) is None:
        raise DataError(f"no 'Answer format: a/b' at the end of {instruction[-80:]!r}")
    return found[1].split("/")


def _guesses(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, float | None]:
    """majority: the accuracy of always giving the commonest answer among rows of the same options.
    chance: that of guessing."""
    if kind == "number":
        [(_, most)] = Counter(row["n"] for row in rows).most_common(1)
        return {"majority": most / len(rows), "chance": None}
    if kind == "loss":
        return {"majority": None, "chance": None}
    groups: dict[tuple[int, ...], Counter[int]] = {}
    for row in rows:
        groups.setdefault(tuple(row["o"]), Counter())[row["y"]] += 1
    return {
        "majority": sum(max(group.values()) for group in groups.values()) / len(rows),
        "chance": statistics.fmean(1 / len(row["o"]) for row in rows),
    }


# --- batches ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; no mask is needed, no token sees the padding behind it.

    input_ids: [rows, width] int64.
    predicting: [answer_tokens] int64, flat positions whose logits predict the targets.
    targets: [answer_tokens] int64, row after row.
    starts: of each row, where its answer begins in `targets`.
    """

    input_ids: Tensor
    predicting: Tensor
    targets: Tensor
    starts: list[int]


def make_batch(rows: Sequence[Mapping[str, Any]], device: torch.device) -> Batch:
    width = max(len(row["p"]) + len(row["a"]) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    predicting, targets, starts = [], [], []
    for i, row in enumerate(rows):
        start, stop = len(row["p"]), len(row["p"]) + len(row["a"])
        input_ids[i, :stop] = torch.tensor(row["p"] + row["a"])
        starts.append(len(targets))
        predicting += range(i * width + start - 1, i * width + stop - 1)
        targets += row["a"]
    flat = torch.tensor(predicting), torch.tensor(targets)
    return Batch(input_ids.to(device), flat[0].to(device), flat[1].to(device), starts)


def batches_of(
    rows: Sequence[Mapping[str, Any]], size: int, steps: int, seed: int
) -> list[list[Mapping[str, Any]]]:
    """`steps` batches: passes over the rows in random order, like lengths together."""
    draw = random.Random(seed)
    batches: list[list[Mapping[str, Any]]] = []
    while len(batches) < steps:
        shuffled = draw.sample(rows, len(rows))
        one_pass = []
        for start in range(0, len(shuffled), _WINDOW * size):
            window = shuffled[start : start + _WINDOW * size]
            window.sort(key=lambda row: len(row["p"]) + len(row["a"]))
            one_pass += [window[i : i + size] for i in range(0, len(window), size)]
        draw.shuffle(one_pass)
        batches += one_pass
    return batches[:steps]


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """[answer_tokens, vocabulary] float32. Unlike the trainer's, it never waits for the device."""

    def only_predicting(head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, 1)[batch.predicting],)

    hook = model.get_output_embeddings().register_forward_pre_hook(only_predicting)
    try:
        logits: Tensor = model(input_ids=batch.input_ids, use_cache=False).logits
    finally:
        hook.remove()
    return logits.float()


# --- methods ---------------------------------------------------------------------------------


class Trainable:
    """What the optimizer sees of a model: float32 parameters, and how they reach it."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)

    def take_gradients_(self) -> None:
        """Called after the backward."""

    def publish_(self) -> None:
        """Called after the optimizer's step."""


class MasterCopy(Trainable):
    """float32 copies of weights of another dtype."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__([weight.detach().float().clone() for weight in weights])
        self._weights = list(weights)

    def take_gradients_(self) -> None:
        for master, weight in zip(self.parameters, self._weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def publish_(self) -> None:
        torch._foreach_copy_(self._weights, self.parameters)


@contextmanager
def trainable(
    method: Method, model: Any, batches: Sequence[Batch], seed: int
) -> Iterator[Trainable]:
    """The model made ready for a method. LoRA and full fine-tuning leave it changed."""
    modules = adaptable_modules(model)
    if method.kind == "full":
        model.requires_grad_(True)
        yield MasterCopy(list(model.parameters()))
    elif method.kind == "lora":
        yield Trainable(_add_lora(model, modules, method.rank(modules), seed))
    else:
        assert method.k is not None
        if method.selection == "random":
            selections = random_selections(modules, method.k, seed)
        elif method.selection == "gradient":
            first = batches[:GRADIENT_BATCHES]
            selections = gradient_selections(model, modules, method.k, first)
        else:
            selections = magnitude_selections(modules, method.k)
        with inplace_training(model, modules, selections) as layers:
            yield Trainable([layer.value for layer in layers.values()])


def _add_lora(model: Any, modules: Mapping[str, Any], rank: int, seed: int) -> list[Tensor]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    conv = any(map(is_transposed, modules.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(modules),
        fan_in_fan_out=conv,
    )
    with warnings.catch_warnings():  # peft asks for a name that transformers gives up
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(model, config)  # changes the model in place, with float32 parameters
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in found)
    return found


def random_selections(modules: Mapping[str, Any], k: int, seed: int) -> dict[str, Selection]:
    """k columns of each row, all alike likely; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    selections = {}
    for name, module in modules.items():
        scores = torch.rand(matrix_shape(module), generator=generator)
        selections[name] = Selection(magnitude_index(scores, k).to(module.weight.device))
    return selections


def gradient_selections(
    model: Any, modules: Mapping[str, Any], k: int, batches: Sequence[Batch]
) -> dict[str, Selection]:
    """The k columns of each row where the loss of these batches has its largest gradient."""
    model.requires_grad_(False)
    for module in modules.values():
        module.weight.requires_grad_(True)
    for batch in batches:
        F.cross_entropy(answer_logits(model, batch), batch.targets).backward()
    selections = {}
    for name, module in modules.items():
        gradient = module.weight.grad.t() if is_transposed(module) else module.weight.grad
        selections[name] = Selection(magnitude_index(gradient, k))
        module.weight.grad = None
    model.requires_grad_(False)
    return selections


def train(
    model: Any, method: Method, rows: Sequence[Sequence[Any]], seed: int, lr: float
) -> Iterator[tuple[int, list[float]]]:
    """Train, then yield (parameters, the loss of each step) once, with the method in place."""
    device = next(model.parameters()).device
    batches = [make_batch(batch, device) for batch in rows]
    model.train()
    with trainable(method, model, batches, seed) as trained:
        steps = len(batches)
        warmup = min(int(WARMUP * steps), steps - 1)
        optimizer = torch.optim.AdamW(
            trained.parameters, lr=lr, weight_decay=0.0, fused=device.type == "cuda"
        )
        losses = []
        for step, batch in enumerate(batches):
            share = min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            loss = F.cross_entropy(answer_logits(model, batch), batch.targets)
            loss.backward()
            trained.take_gradients_()
            nn.utils.clip_grad_norm_(trained.parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            trained.publish_()
            losses.append(loss.detach())
        model.eval()
        count = sum(parameter.numel() for parameter in trained.parameters)
        yield count, torch.stack(losses).tolist()


# --- scores ----------------------------------------------------------------------------------


@torch.no_grad()
def score(model: Any, rows: Sequence[Mapping[str, Any]], size: int) -> dict[str, float]:
    """loss: mean per answer token of the reference, in nats; accuracy, where rows have options."""
    device = next(model.parameters()).device
    by_length = sorted(rows, key=lambda row: len(row["p"]) + len(row["a"]))
    loss, tokens, right = torch.zeros((), device=device), 0, torch.zeros((), device=device)
    for first in range(0, len(by_length), size):
        part = by_length[first : first + size]
        batch = make_batch(part, device)
        logits = answer_logits(model, batch)
        loss += F.cross_entropy(logits, batch.targets, reduction="sum")
        tokens += len(batch.targets)
        if "o" in part[0]:
            most = max(len(row["o"]) for row in part)
            options = torch.tensor([row["o"] + [-1] * (most - len(row["o"])) for row in part])
            places = [start + row["at"] for start, row in zip(batch.starts, part, strict=True)]
            options = options.to(device)
            at = logits[torch.tensor(places, device=device)]  # (rows, vocabulary)
            of_options = at.gather(1, options.clamp(min=0)).masked_fill(options < 0, -torch.inf)
            wanted = torch.tensor([row["y"] for row in part], device=device)
            right += (of_options.argmax(dim=1) == wanted).sum()
    found = {"loss": loss.item() / tokens}
    if "o" in rows[0]:
        found["accuracy"] = right.item() / len(rows)
    return found


@torch.no_grad()
def number_accuracy(
    base: BaseModel, model: Any, rows: Sequence[Mapping[str, Any]], max_new_tokens: int
) -> float:
    """Share of rows whose greedy answer, by the engine, ends in the right number."""
    served = replace(base, model=as_weights(base.model, model))
    on_cuda = base.device.type == "cuda"
    config = EngineConfig(
        max_num_seqs=min(len(rows), _MOST_AT_ONCE), prefix_cache_memory=0, enforce_eager=on_cuda
    )
    engine = Engine(served, config)
    texts = [""] * len(rows)
    for i, row in enumerate(rows):
        room = engine.max_model_len - len(row["p"])
        sampling = SamplingParams(max_tokens=min(max_new_tokens, room), temperature=0)
        engine.add_request(str(i), row["p"], sampling)
    while engine.has_unfinished:
        for output in engine.step():
            texts[int(output.request_id)] += output.text
    right = 0
    for text, row in zip(texts, rows, strict=True):
        number = last_number(text)
        right += number is not None and abs(number - row["n"]) <= TOLERANCE
    return right / len(rows)


def as_weights(plain: Any, trained: Any) -> Any:
    """A copy of the base that holds what was trained in its weights, rounded to their dtype."""
    model = copy.deepcopy(plain)
    learned = dict(trained.named_modules())
    for module in learned.values():
        if isinstance(module, InplaceLinear):
            module.write_values_()
    for name, module in model.named_modules():
        source = learned[name]
        if hasattr(source, "lora_A"):
            weight = module.weight.float() + source.get_delta_weight("default").float()
            module.weight.copy_(weight)
            continue
        for key, parameter in module.named_parameters(recurse=False):
            parameter.copy_(getattr(source, key))
    return model.eval()


def last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


# --- one run ---------------------------------------------------------------------------------


def run_job(
    job: Job, base: BaseModel, prepared: Mapping[str, Any], settings: Settings
) -> dict[str, Any]:
    """A run's record: the job's fields, "key", parameters, losses, scores, seconds and memory."""
    task = prepared["tasks"][job.task]
    cuda = base.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    record: dict[str, Any] = {**asdict(job), "key": job.key, "parameters": 0, "train_loss": []}

    def scores(model: Any) -> None:
        if cuda:
            torch.cuda.synchronize()
        record["train_s"] = time.perf_counter() - started
        if cuda:
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if job.phase != "final":
            record["tune_loss"] = score(model, task["tune"], settings.eval_batch)["loss"]
        if job.phase != "tune":
            record["evals"] = {}
            for name, found in task["evals"].items():
                record["evals"][name] = score(model, found["rows"], settings.eval_batch)
                if found["kind"] == "number":
                    record["evals"][name]["accuracy"] = number_accuracy(
                        base, model, found["rows"], settings.max_new_tokens
                    )
        record["eval_s"] = time.perf_counter() - started - record["train_s"]

    if job.phase == "base":
        scores(base.model)
        return record
    model = copy.deepcopy(base.model)
    if not cuda:  # where rows are short, the fused attention's backward is the slower one
        model.set_attn_implementation("eager")
    rows = batches_of(task["train"], settings.batch, job.steps, job.seed)
    for count, losses in train(model, METHODS[job.method], rows, job.seed, job.lr):
        record["parameters"], record["train_loss"] = count, [round(loss, 5) for loss in losses]
        scores(model)
    return record


def work(connection: Connection, config: Mapping[str, Any]) -> None:
    """A worker: takes jobs until it is sent None, answers each with its record."""
    torch.set_num_threads(config["threads"])
    torch.set_float32_matmul_precision("high")
    prepared = load_prepared(config["prepared"])
    settings = Settings(**config["settings"])
    base = load_base(resolve_model(config["base"]), settings.dtype, config["device"])
    if base.spec.fingerprint != prepared["fingerprint"]:
        raise DataError("the rows were prepared for another base; run --prepare with this one")
    connection.send(None)
    while (job := connection.recv()) is not None:
        try:
            record = run_job(job, base, prepared, settings)
        except Exception:  # one run's failure is no other's
            record = {**asdict(job), "key": job.key, "error": traceback.format_exc(limit=-4)}
        connection.send(plain(record))


def load_prepared(path: Path) -> Any:
    try:
        with gzip.open(path, "rt") as file:
            return json.load(file)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); make it by --prepare") from error


# --- all runs --------------------------------------------------------------------------------


class Plan:
    """Which runs there are, which may start, and what they rest on."""

    def __init__(self, pairs: Sequence[tuple[str, str]], settings: Settings) -> None:
        self._pairs, self._settings = pairs, settings
        self.records: dict[str, dict[str, Any]] = {}
        self._taken: set[str] = set()

    def take(self, parts: Sequence["Part"]) -> None:
        """Records of finished parts; one that failed gives way to one that did not."""
        for record in (record for part in parts for record in part.records):
            if "error" not in record or record["key"] not in self.records:
                self.records[record["key"]] = record

    def best_lr(self, task: str, method: str) -> float | None:
        """The rate of the lowest tuning loss; None before all are known, or if none is a number."""
        losses = {}
        for job in self._tuning(task, method):
            if (record := self.records.get(job.key)) is None:
                return None
            loss = record.get("tune_loss")
            if isinstance(loss, float) and math.isfinite(loss):
                losses[job.lr] = loss
        return min(losses, key=losses.__getitem__) if losses else None

    def _tuning(self, task: str, method: str) -> list[Job]:
        steps = self._settings.tune_steps
        grid = self._settings.grid(method)
        return [Job(task, method, "tune", TUNING_SEED, lr, steps) for lr in grid]

    def jobs(self) -> Iterator[Job]:
        """All of them, in order of importance; final ones with lr nan until it is chosen."""
        for task in dict.fromkeys(task for task, _ in self._pairs):
            yield Job(task, "base", "base", TUNING_SEED, 0.0, 0)
        for i in range(self._settings.lr_values):
            for pair in self._pairs:
                yield self._tuning(*pair)[i]
        for seed in range(1, self._settings.seeds + 1):
            for pair in self._pairs:
                lr = self.best_lr(*pair)
                steps = self._settings.steps
                yield Job(*pair, "final", seed, math.nan if lr is None else lr, steps)

    def next_job(self) -> Job | None:
        """One that can start now, taken; None if all are taken or wait for others."""
        for job in self.jobs():
            if job.key not in self._taken and job.key not in self.records and job.lr >= 0:
                self._taken.add(job.key)
                return job
        return None

    def left_out(self) -> list[str]:
        return [job.key for job in self.jobs() if job.key not in self.records]


def run_all(
    plan: Plan,
    config: Mapping[str, Any],
    workers: int,
    deadline: float,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Run what the plan has over worker processes; `done` is told each record as it comes."""
    if not plan.left_out() or time.monotonic() >= deadline:
        return
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, config), daemon=True)
        process.start()
        theirs.close()
        processes[ours] = process
    busy: dict[Connection, Job | None] = dict.fromkeys(processes)  # None: it is loading
    idle: list[Connection] = []
    while busy or idle:
        while idle and time.monotonic() < deadline and (job := plan.next_job()) is not None:
            connection = idle.pop()
            connection.send(job)
            busy[connection] = job
        if not busy:
            break
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            job = busy.pop(connection)
            try:
                record = connection.recv()
            except EOFError:
                processes[connection].join()
                code = processes[connection].exitcode
                if job is not None:
                    record = {**asdict(job), "key": job.key, "error": f"exit code {code}"}
                    done(record)
                continue
            idle.append(connection)
            if record is not None:
                done(record)
    for connection in idle:
        connection.send(None)
    for process in processes.values():
        process.join()


class RunsFile:
    """OUT.runs.jsonl: a header for every machine and state of the code, each before its records.

    Every line is flushed to disk.

    Raises:
        UsageError: it is there, of other settings or rows.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.parts: list[Part] = []
        if path.exists() and path.stat().st_size:
            self.parts = read_runs(path)
            if self.parts[0].header["identity"] != header["identity"]:
                raise UsageError(f"{path} is of other settings or rows; move it or change --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if self.parts and not path.read_bytes().endswith(b"\n"):  # cut short by a kill
            with path.open("a") as file:
                file.write("\n")
        if not self.parts or self.parts[-1].made_by != Part(plain(header)).made_by:
            self.parts.append(Part(plain(header)))
            self.append(header)

    def append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass
class Part:
    """What one machine and state of the code has done. header: settings and environment()."""

    header: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def made_by(self) -> dict[str, Any]:
        names = ("commit", "modified", "versions", "hardware", "device", "workers")
        return {name: self.header.get(name) for name in names}


def read_runs(path: Path) -> list[Part]:
    """The file's parts, at least one. A line cut short by a kill is passed over."""
    parts: list[Part] = []
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "identity" in found:
            parts.append(Part(found))
        elif parts:
            parts[-1].records.append(found)
        else:
            break
    if not parts:
        raise UsageError(f"{path} is no runs file: its first line has no settings")
    return parts


# --- output ----------------------------------------------------------------------------------


def summary(header: Mapping[str, Any], plan: Plan) -> list[dict[str, Any]]:
    """A row per set and method with what its seeds gave: mean, std, min and max of each figure."""
    settings = Settings(**header["settings"])
    rows = []
    for task, method in [*((t, "base") for t in header["tasks"]), *map(tuple, header["pairs"])]:
        phase = "base" if method == "base" else "final"
        records = [
            record
            for record in plan.records.values()
            if (record["task"], record["method"], record["phase"]) == (task, method, phase)
            and "error" not in record
        ]
        row: dict[str, Any] = {"task": task, "method": method, "seeds": len(records)}
        if method != "base":
            grid, lr = settings.grid(method), plan.best_lr(task, method)
            row["lr"], row["grid"] = lr, grid
            row["tune_loss"] = [
                plan.records.get(job.key, {}).get("tune_loss") for job in plan._tuning(task, method)
            ]
            row["edge"] = lr is not None and len(grid) > 1 and lr in (grid[0], grid[-1])
        if records:
            row["parameters"] = records[0]["parameters"]
            row["train_s"] = statistics.median(record["train_s"] for record in records)
            row["eval_s"] = statistics.median(record["eval_s"] for record in records)
            row["peak_memory_gib"] = records[0].get("peak_memory_gib")
            row["evals"] = {
                name: {
                    figure: spread([record["evals"][name][figure] for record in records])
                    for figure in found
                }
                for name, found in records[0]["evals"].items()
            }
        rows.append(row)
    return rows


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    numbers = [v for v in values if isinstance(v, float | int) and math.isfinite(v)]
    if not numbers:
        return {"values": list(values), "mean": None, "std": None, "min": None, "max": None}
    return {
        "values": list(values),
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "min": min(numbers),
        "max": max(numbers),
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    for task, evals in result["evals"].items():
        title = f"{task}: accuracy in %, mean ± std (min..max) of the seeds; loss of the reference"
        table = Table("method", "parameters", "lr", title=title)
        for name, found in evals.items():
            table.add_column(name if found["kind"] != "loss" else f"{name} loss", justify="right")
            if found["kind"] != "loss":
                table.add_column("loss", justify="right")
        table.add_column("train s", justify="right")
        table.add_column("GiB", justify="right")
        majority = [
            cell
            for found in evals.values()
            for cell in (
                ["-"] if found["kind"] == "loss" else [f"{100 * found['majority']:.1f}", "-"]
            )
        ]
        table.add_row("commonest answer", "-", "-", *majority, "-", "-")
        for row in result["summary"]:
            if row["task"] != task:
                continue
            lr = "-" if row.get("lr") is None else f"{row['lr']:.2g}" + " edge" * row["edge"]
            if "evals" not in row:
                cells = ["left out"] + [""] * (len(majority) - 1)
                table.add_row(row["method"], "", lr, *cells, "", "")
                continue
            cells = []
            for name, found in evals.items():
                if found["kind"] != "loss":
                    cells.append(_cell(row["evals"][name]["accuracy"], 100, 1))
                cells.append(_cell(row["evals"][name]["loss"], 1, 3, with_range=False))
            memory = row["peak_memory_gib"]
            last = f"{row['train_s']:.1f}", "-" if memory is None else f"{memory:.1f}"
            table.add_row(row["method"], f"{row['parameters']:,}", lr, *cells, *last)
        console.print(table)
    if result["left_out"]:
        console.print(f"left out: {len(result['left_out'])} runs:", ", ".join(result["left_out"]))
    for key, error in result["errors"].items():
        console.print(f"failed: {key}: {error.strip().splitlines()[-1]}")


def _cell(found: Mapping[str, Any], scale: float, digits: int, with_range: bool = True) -> str:
    if found["mean"] is None:
        return "not a number"
    text = f"{scale * found['mean']:.{digits}f}"
    if found["std"] is not None:
        text += f" ±{scale * found['std']:.{digits}f}"
        if with_range:
            text += f" ({scale * found['min']:.{digits}f}..{scale * found['max']:.{digits}f})"
    return text


def plot(result: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(task, name) for task, evals in result["evals"].items() for name in evals]
    columns = 3
    lines = math.ceil(len(panels) / columns)
    size = (5 * columns, 3.9 * lines)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, layout="constrained")
    flat = grid.flatten()
    for axes, (task, name) in zip(flat, panels, strict=False):
        kind, majority = (result["evals"][task][name][key] for key in ("kind", "majority"))
        figure_name, scale = ("loss", 1) if kind == "loss" else ("accuracy", 100)
        rows = [row for row in result["summary"] if row["task"] == task and "evals" in row]
        labels = [row["method"] for row in rows if row["method"] != "base"]
        for row in rows:
            found = row["evals"][name][figure_name]
            if found["mean"] is None:
                continue
            if row["method"] == "base":
                axes.axhline(scale * found["mean"], color="C7", linestyle="--", label="base")
                continue
            x = labels.index(row["method"])
            values = [scale * value for value in found["values"] if value is not None]
            axes.plot([x] * len(values), values, "o", color="C0", alpha=0.6)
            axes.plot([x], [scale * found["mean"]], "_", color="C1", markersize=16, mew=2)
        if majority is not None:
            axes.axhline(100 * majority, color="C3", linestyle=":", label="commonest answer")
        axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
        axes.set(title=f"{task}: {name}", ylabel="loss" if kind == "loss" else "accuracy, %")
        axes.legend(fontsize=7)
    for axes in flat[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)


def finish(
    header: Mapping[str, Any], parts: Sequence[Part], plan: Plan, out: Path, console: Console
) -> None:
    """Write the document and the plot, and print the table and, last, the document."""
    errors = {key: found["error"] for key, found in plan.records.items() if "error" in found}
    result = {
        **header,
        "parts": [
            part.made_by
            | {"date": part.header["date"], "runs": [record["key"] for record in part.records]}
            for part in parts
        ],
        "worker_s": sum(r.get("train_s", 0) + r.get("eval_s", 0) for r in plan.records.values()),
        "summary": summary(header, plan),
        "left_out": plan.left_out(),
        "errors": errors,
        "runs": list(plan.records.values()),
        "not_measured": [
            "bases of another size",
            "long training",
            "free generation of multiple-choice answers",
            "tuning of anything but the learning rate",
            "whole test sets",
            "memory on the CPU",
        ],
    }
    document = json.dumps(plain(result), allow_nan=False)
    out.write_text(document + "\n")
    show(result, console)
    if any("evals" in row for row in result["summary"]):
        plot(result, out.with_suffix(".png"))
    print(document)


# --- the command -----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args = _parser().parse_args(argv)
    console = Console(stderr=True, width=200)
    try:
        _run(args, started, console)
    except UsageError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", default="demo")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of *.jsonl.gz")
    add("--prepare", type=Path, metavar="FILE", help="write the rows as token ids, and end")
    add("--prepared", type=Path, metavar="FILE", help="rows that --prepare wrote")
    add("--merge", type=Path, nargs="+", metavar="RUNS", help="report on these, and end")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    add("--tasks", default=",".join(TASKS))
    add("--methods", default=",".join(METHODS))
    add("--part", default="1/1", metavar="I/N")
    add("--minutes", type=float, default=1e6)
    add("--workers", type=int, help="processes; default 8 on a GPU, 1 without")
    add("--device", default="auto")
    add("--dtype", default="auto", help="of the weights; the base's own by default")
    add("--steps", type=int, default=200)
    add("--tune-steps", type=int, default=80)
    add("--batch", type=int, default=16)
    add("--eval-batch", type=int, default=64)
    add("--seeds", type=int, default=3)
    add("--lr-values", type=int, default=4)
    add("--lr-factor", type=float, default=2.5)
    add("--usual-lr", nargs="*", default=[], metavar="METHOD=LR", help="other middles of grids")
    add("--max-new-tokens", type=int, default=128)
    add("--train-rows", type=int, default=4000)
    add("--tune-rows", type=int, default=300)
    add("--eval-rows", type=int, default=1000)
    add("--max-length", type=int, default=256, help="longer rows are left out, in tokens")
    return parser


def _run(args: argparse.Namespace, started: float, console: Console) -> None:
    if args.merge:
        _merge(args, console)
        return
    device = find_device(args.device)
    rows = args.prepared
    if args.prepare or rows is None:
        rows = args.prepare or args.out.with_suffix(".rows.json.gz")
        base = load_base(resolve_model(args.base), device="cpu")
        rows.parent.mkdir(parents=True, exist_ok=True)
        document = json.dumps(prepare(base, args.data, args), separators=(",", ":"))
        rows.write_bytes(gzip.compress(document.encode(), mtime=0))
        del base
    prepared = load_prepared(rows)
    if args.prepare:
        for name, task in prepared["tasks"].items():
            evals = {found: len(value["rows"]) for found, value in task["evals"].items()}
            console.print(name, {part: len(task[part]) for part in ("train", "tune")}, evals)
        console.print(f"{rows}: {rows.stat().st_size / 1e6:.1f} MB")
        return

    tasks, methods = _names(args.tasks, TASKS), _names(args.methods, METHODS)
    number, count = _part(args.part)
    pairs = [(task, method) for method in methods for task in tasks][number - 1 :: count]
    usual = {method: METHODS[method].usual_lr for method in methods}
    for given in args.usual_lr:
        name, _, value = given.partition("=")
        _names(name, METHODS)
        usual[name] = float(value)
    names = (
        *("steps", "tune_steps", "batch", "eval_batch", "seeds", "lr_values", "lr_factor"),
        *("max_new_tokens", "dtype"),
    )
    settings = Settings(**{name: getattr(args, name) for name in names}, usual_lr=usual)
    identity = {
        "settings": asdict(settings),
        "rows_sha256": hashlib.sha256(gzip.decompress(rows.read_bytes())).hexdigest(),
    }
    facts = environment()
    facts["versions"]["peft"] = metadata.version("peft")
    evals = {
        task: {
            name: {key: value for key, value in found.items() if key != "rows"}
            | {"rows": len(found["rows"])}
            for name, found in prepared["tasks"][task]["evals"].items()
        }
        for task in tasks
    }
    workers = args.workers or (8 if device.type == "cuda" else 1)
    header = {
        "schema": SCHEMA,
        "benchmark": "quality",
        **facts,
        "identity": identity,
        "settings": asdict(settings),
        "sizes": prepared["sizes"],
        "base": prepared["base"],
        "device": str(device),
        "workers": workers,
        "tasks": tasks,
        "pairs": pairs,
        "evals": evals,
    }
    plan = Plan(pairs, settings)
    runs = RunsFile(args.out.with_suffix(".runs.jsonl"), header)
    plan.take(runs.parts)
    for key in [key for key, record in plan.records.items() if "error" in record]:
        del plan.records[key]  # tried again

    def done(record: dict[str, Any]) -> None:
        runs.parts[-1].records.append(record)
        plan.records[record["key"]] = record
        runs.append(record)
        what = record.get("evals") or record.get("tune_loss") or record.get("error")
        spent = f"{time.monotonic() - started:6.1f} s"
        console.print(spent, record["key"], f"{record.get('train_s', 0):.1f} s", what, markup=False)

    config = {
        "prepared": rows,
        "settings": asdict(settings),
        "base": args.base,
        "device": args.device,
        "threads": max(1, len(os.sched_getaffinity(0)) // workers),
    }
    try:
        run_all(plan, config, workers, started + 60 * args.minutes, done)
    finally:
        finish(header, runs.parts, plan, args.out, console)


def _names(given: str, known: Mapping[str, Any]) -> list[str]:
    names = given.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def _part(given: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", given)
    if found is None or int(found[1]) > int(found[2]):
        raise UsageError(f"--part {given}: give I/N with I from 1 to N, such as 1/2")
    return int(found[1]), int(found[2])


def _merge(args: argparse.Namespace, console: Console) -> None:
    """One report on the runs of several files of equal settings and rows."""
    files = [read_runs(path) for path in args.merge]
    headers = [found[0].header for found in files]
    header = dict(headers[0])
    for path, other in zip(args.merge, headers, strict=True):
        if other["identity"] != header["identity"]:
            raise UsageError(f"{path} is of other settings or rows than {args.merge[0]}")
    pairs = {tuple(pair) for other in headers for pair in other["pairs"]}
    header["pairs"] = [(t, m) for m in METHODS for t in TASKS if (t, m) in pairs]
    header["tasks"] = [task for task in TASKS if any(task in other["tasks"] for other in headers)]
    header["evals"] = {task: found for other in headers for task, found in other["evals"].items()}
    plan = Plan(header["pairs"], Settings(**header["settings"]))
    parts = [part for found in files for part in found]
    plan.take(parts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    finish(header, parts, plan, args.out, console)


if __name__ == "__main__":
    sys.exit(main())
