"""Ways to train that are measured, and one training run of each."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.model.loader import adaptable_modules
from neuroada_serve.train.batches import predict
from neuroada_serve.train.inplace import inplace_training, magnitude_selections
from neuroada_serve.train.recompute import Recompute, set_recompute

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ANSWER_SHARE = 0.25
LR = 1e-3


@dataclass(frozen=True)
class Method:
    """One way to train.

    size: k, or the rank.
    share: of the layers that recompute.
    """

    way: str
    size: int = 0
    recompute: Recompute = "nothing"
    share: float = 1.0
    compiled: bool = False
    all_positions: bool = False

    @property
    def name(self) -> str:
        """Way, size and notes, as results name it."""
        size = {"lora": f" r={self.size}", "shira": f" r={self.size}", "full": ""}
        notes = [f"recompute {self.recompute}"] if self.recompute != "nothing" else []
        notes += [f"{self.share:g} of the layers"] if self.share < 1 else []
        notes += ["compiled"] if self.compiled else []
        notes += ["all positions"] if self.all_positions else []
        note = f" ({', '.join(notes)})" if notes else ""
        return self.way + size.get(self.way, f" k={self.size}") + note


CPU_METHODS = [
    Method("neuroada", 1),
    Method("neuroada", 8),
    Method("neuroada", 20),
    Method("neuroada", 8, all_positions=True),
    Method("neuroada", 8, recompute="cheap"),
    Method("official", 1),
    Method("official", 8),
    Method("official", 20),
    Method("mask", 8),
    Method("lora", 4),
    Method("lora", 1),
    Method("shira", 1),
    Method("full"),
]
GPU_METHODS = [
    Method("neuroada", 8),
    Method("official", 8),
    Method("neuroada", 8, recompute="cheap"),
    Method("neuroada", 8, compiled=True),
    Method("neuroada", 1, compiled=True),
    Method("neuroada", 1),
    Method("lora", 4),
    Method("mask", 8),
    Method("neuroada", 20),
    Method("neuroada", 20, compiled=True),
    Method("neuroada", 8, all_positions=True),
    Method("official", 1),
    Method("official", 20),
    Method("neuroada", 8, recompute="all"),
    Method("neuroada", 1, recompute="cheap", compiled=True),
    Method("neuroada", 8, recompute="cheap", compiled=True),
    Method("neuroada", 1, recompute="all", compiled=True),
    Method("neuroada", 8, recompute="all", compiled=True),
    Method("neuroada", 1, recompute="all", share=0.75, compiled=True),
    Method("neuroada", 8, recompute="all", share=0.75, compiled=True),
    Method("lora", 1),
]


@contextmanager
def prepared(model: Any, method: Method) -> Iterator[tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """Set a model up for a method: (parameters that are trained, those with a masked gradient)."""
    model.train()
    model.requires_grad_(False)
    with ExitStack() as stack:
        if method.way == "neuroada":
            modules = adaptable_modules(model)
            selections = magnitude_selections(modules, method.size)
            layers = stack.enter_context(inplace_training(model, modules, selections))
            trained = [layer.value for layer in layers.values()]
        elif method.way == "official":
            trained = _official(model, method.size)
        elif method.way == "mask":
            trained = _masked(model, method.size)
        elif method.way == "full":
            model.requires_grad_(True)
            trained = list(model.parameters())
        else:
            trained = _by_peft(model, method)
        stack.callback(set_recompute(model, method.recompute, method.share))
        if method.compiled:
            for block in model.model.layers:
                block.compile()
        yield trained, trained if method.way == "mask" else []


def _official(model: Any, k: int) -> list[nn.Parameter]:
    """Install the forward of the authors' code, utils/utils.py:75, its parameters and positions."""
    trained = []
    for module in adaptable_modules(model).values():
        d_out, d_in = module.weight.shape
        index = magnitude_index(module.weight, k).long()
        starts = torch.arange(d_out, device=index.device)[:, None] * d_in
        module.weight_new = nn.Parameter(torch.zeros(d_out * k).to(module.weight))
        module.at = (starts + index).flatten()
        module.forward = MethodType(_official_forward, module)
        trained.append(module.weight_new)
    return trained


def _official_forward(self: Any, x: Tensor) -> Tensor:
    weight = self.weight.flatten().scatter_add(0, self.at, self.weight_new)
    return F.linear(x, weight.view(self.weight.shape), self.bias)


def _masked(model: Any, k: int) -> list[nn.Parameter]:
    trained = []
    for module in adaptable_modules(model).values():
        mask = torch.zeros_like(module.weight, dtype=torch.bool)
        mask.scatter_(1, magnitude_index(module.weight, k).long(), True)
        module.weight.requires_grad_(True)
        module.weight.mask = mask
        trained.append(module.weight)
    return trained


def _by_peft(model: Any, method: Method) -> list[nn.Parameter]:
    from peft import LoraConfig, ShiraConfig, inject_adapter_in_model

    if method.way == "lora":
        config = LoraConfig(r=method.size, lora_alpha=2 * method.size, target_modules=TARGETS)
    else:
        config = ShiraConfig(r=method.size, mask_type="random", target_modules=TARGETS)
    inject_adapter_in_model(config, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(next(model.parameters()).device)
    return trained


class Job:
    """Training run of a method."""

    def __init__(self, model: Any, method: Method, batch: dict[str, Tensor], stack: ExitStack):
        self._model, self._method, self._batch = model, method, batch
        self._trained, self._masked = stack.enter_context(prepared(model, method))
        self.parameters = sum(p.numel() for p in self._trained)
        if method.way == "mask":
            self.parameters = sum(int(p.mask.sum()) for p in self._masked)
        self._optimizer = torch.optim.AdamW(self._trained, lr=LR, weight_decay=0.0)

    def step(self) -> None:
        """Forward, backward and optimizer on the one batch."""
        if self._method.way == "neuroada" and not self._method.all_positions:
            found = predict(self._model, self._batch)
            loss = F.cross_entropy(found.logits, found.targets)
        else:
            loss = self._model(**self._batch, use_cache=False).loss
        loss.backward()
        for parameter in self._masked:
            assert parameter.grad is not None
            parameter.grad.mul_(parameter.mask)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._batch["input_ids"].is_cuda:
            torch.cuda.synchronize()


def random_batch(rows: int, width: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """Random tokens [rows, width]; only the last quarter of each row has labels."""
    ids = torch.randint(vocabulary, (rows, width), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    answers = int(width * ANSWER_SHARE)
    labels[:, -answers:] = ids[:, -answers:]
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
