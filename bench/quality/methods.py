"""Methods of the quality benchmark: each trains a model, whose answers are then scored."""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.quality.rows import Batch, make_batch
from neuroada_serve.adapters.select import Selection, magnitude_index
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import BaseModel, adaptable_modules, is_transposed, matrix_shape
from neuroada_serve.request import SamplingParams
from neuroada_serve.train.inplace import InplaceLinear, inplace_training, magnitude_selections

GRADIENT_BATCHES = 4
WARMUP = 0.1
MAX_GRAD_NORM = 1.0
TOLERANCE = 1e-3
_MOST_AT_ONCE = 256  # word problems answered together
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


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """Logits [answer_tokens, vocabulary] float32, without ever waiting for the device."""

    def only_predicting(head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, 1)[batch.predicting],)

    hook = model.get_output_embeddings().register_forward_pre_hook(only_predicting)
    try:
        logits: Tensor = model(input_ids=batch.input_ids, use_cache=False).logits
    finally:
        hook.remove()
    return logits.float()


class Trainable:
    """float32 parameters that the optimizer changes, and their way to and from the model."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)

    def take_gradients_(self) -> None:
        """Fetch gradients from the model, after the backward."""

    def publish_(self) -> None:
        """Write the parameters into the model, after the optimizer's step."""


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
    """Make the model ready for a method. LoRA and full fine-tuning leave it changed."""
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
    """Draw k columns of each row, all equally likely; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    selections = {}
    for name, module in modules.items():
        scores = torch.rand(matrix_shape(module), generator=generator)
        selections[name] = Selection(magnitude_index(scores, k).to(module.weight.device))
    return selections


def gradient_selections(
    model: Any, modules: Mapping[str, Any], k: int, batches: Sequence[Batch]
) -> dict[str, Selection]:
    """Select the k columns of each row where the loss of these batches has its largest gradient."""
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
    """Mean loss per answer token of the reference, in nats; accuracy, where rows have options."""
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
    """Copy the base and write the trained changes into its weights, rounded to their dtype."""
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
    """Last number in a text; None where there is none."""
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None
