"""Files of other formats, written as their own code writes them."""

import json
import random
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from neuroada_serve.model.loader import adaptable_modules
from neuroada_serve.model.source import ModelSource


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    """[tokens, vocab]"""
    return model(torch.tensor([ids])).logits[0]


class OfficialModel:
    """A model with values as the method's official code attaches, runs and saves them: a mask of
    the selected weights, their positions by nonzero(), and the values flat behind them."""

    def __init__(
        self,
        source: ModelSource,
        peft_type: str,
        k: int,
        modules: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float32,
        tune_bias: bool = False,
    ) -> None:
        torch.manual_seed(5)
        self.peft_type, self.k, self.tune_bias = peft_type, k, tune_bias
        self.model = AutoModelForCausalLM.from_pretrained(source.path)
        self.model.requires_grad_(False)
        self.positions: dict[str, torch.Tensor] = {}
        self.indices: list[list[int]] = []
        for name in modules or adaptable_modules(self.model):
            self._attach(name, dtype)
            bias = self.model.get_submodule(name).bias
            if tune_bias and bias is not None:
                bias.add_(torch.randn_like(bias) * 0.5).requires_grad_(True)

    def _attach(self, name: str, dtype: torch.dtype) -> None:
        layer, peft_type = self.model.get_submodule(name), self.peft_type
        weight = layer.weight
        mask = torch.zeros_like(weight)
        mask.scatter_(1, weight.abs().topk(self.k, 1, "reverse" not in peft_type).indices, 1)
        if "randomGlobal" in peft_type:
            mask = mask.flatten()[torch.randperm(mask.numel())].view_as(mask)
        if "certainCell" in peft_type:
            mask *= (torch.rand(len(mask), 1) < 0.5).float()
        positions = torch.nonzero(mask)
        self.positions[f"{name}.weight"] = positions
        value = torch.randn(len(positions), dtype=dtype) * 0.5
        if peft_type.endswith("_appr"):
            layer.weight_new = nn.Parameter(value.reshape(-1, self.k))
            counts = Counter(positions[:, 1].tolist())
            self.indices.append([column for column, _ in counts.most_common(self.k)])
            layer.forward = partial(_shared_columns, layer, self.indices[-1])
        else:
            layer.weight_new = nn.Parameter(value)
            flat = positions[:, 0] * weight.size(1) + positions[:, 1]
            layer.forward = partial(_scattered, layer, flat)

    def save(self, folder: Path) -> None:
        (folder / "tunable_para").mkdir(parents=True)
        np.save(folder / "positions.npy", self.positions)
        if self.indices:
            np.save(folder / "indices.npy", self.indices)
        tunable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        torch.save(tunable, folder / "tunable_para" / "state_dict_tunable.pt")
        args = {
            "peft_type": self.peft_type,
            "times_num": self.k,
            "lr": 8e-3,
            "tuneBias": self.tune_bias,
            "target_modules": ["q_proj"],
        }
        (folder / "args.json").write_text(json.dumps(args, indent=4))


def on_gpu(file: Path) -> None:
    """Make the tensors of a torch file say that they were saved on a GPU."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            said = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            archive.writestr(name, said if name.endswith("data.pkl") else data)


def _scattered(layer, flat, x):
    weight = layer.weight.flatten().scatter_add(0, flat, layer.weight_new)
    return F.linear(x, weight.view_as(layer.weight), layer.bias)


def _shared_columns(layer, columns, x):
    own = F.linear(x[..., columns].contiguous(), layer.weight_new, layer.bias)
    return F.linear(x, layer.weight, layer.bias) + own


def save_shira(source: ModelSource, folder: Path, r: int, targets: list[str]):
    """PEFT's own SHiRA with random values, saved; the model."""
    torch.manual_seed(6)
    plain = AutoModelForCausalLM.from_pretrained(source.path)
    config = peft.ShiraConfig(r=r, target_modules=targets, random_seed=1, init_weights=False)
    model = peft.get_peft_model(plain, config).eval()
    model.save_pretrained(folder)
    return model


def save_supertuning(source: ModelSource, folder: Path, targets=("q_proj", "up_proj"), **config):
    """PEFT's own Super-Tuning with random values, saved; the model."""
    torch.manual_seed(7)
    plain = AutoModelForCausalLM.from_pretrained(source.path)
    made = peft.SupertuningConfig(target_modules=list(targets), init_weights=False, **config)
    model = peft.get_peft_model(plain, made).eval()
    model.save_pretrained(folder)
    return model


def save_tuned(
    source: ModelSource,
    folder: Path,
    scale: float,
    *,
    others: bool = False,
    only: str = "",
    layers: int | None = None,
    intermediate: int | None = None,
):
    """A checkpoint whose linear layers, and with `others` all parameters, differ at random from the
    base's; `layers` and `intermediate` make it another architecture. Its source and the model."""
    torch.manual_seed(8)
    config = AutoConfig.from_pretrained(source.path)
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.intermediate_size = intermediate or config.intermediate_size
    if layers or intermediate:
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(source.path)
    adaptable = {f"{name}.weight" for name in adaptable_modules(model)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name and (others or name in adaptable):
                parameter += torch.randn_like(parameter) * scale
    model.save_pretrained(folder)
    return ModelSource("tuned", folder), model.eval()


def random_targets(shapes, seed: int) -> dict[str, None]:
    """Some of the modules."""
    generator = random.Random(seed)
    return dict.fromkeys(generator.sample(sorted(shapes), generator.randrange(1, len(shapes))))
