"""Adapters for benchmarks: random values on the base's own magnitude index.

Their answers are worthless, but they cost as much as trained ones.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from neuroada_serve.adapters.format import (
    Adapter,
    AdapterConfig,
    BaseSpec,
    ModuleBypass,
    make_adapter,
)
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.model.loader import BaseModel, adaptable_modules, is_transposed

_SCALE = 0.05  # size of the values: small beside the weights, but enough to change answers


def magnitude_indices(base: BaseModel, ks: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    """Return k -> module -> index [d_out, k] int32 on the CPU, of a base without bypasses."""
    widest = {
        name: magnitude_index(m.weight.t() if is_transposed(m) else m.weight, max(ks)).cpu()
        for name, m in adaptable_modules(base.model).items()
    }
    # The index of a smaller k is the beginning of that of a larger one.
    return {k: {name: i[:, :k].contiguous() for name, i in widest.items()} for k in ks}


def random_adapter(spec: BaseSpec, indices: Mapping[str, Tensor], seed: int) -> Adapter:
    """Make an adapter of these modules, with random values at their index [d_out, k]."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, index in indices.items():
        values = torch.randn(index.shape, generator=generator) * _SCALE
        modules[name] = ModuleBypass(index, values.bfloat16())
    k = next(iter(indices.values())).shape[1]
    targets = tuple(sorted({name.rpartition(".")[2] for name in modules}))
    return make_adapter(AdapterConfig(spec.name, spec.fingerprint, k, targets), modules)


def save_random_lora(spec: BaseSpec, rank: int, seed: int, folder: Path) -> None:
    """Save a LoRA adapter of the same modules in PEFT's format, with random factors, for peers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (d_out, d_in) in spec.shapes.items():
        for factor, shape in (("lora_A", (rank, d_in)), ("lora_B", (d_out, rank))):
            values = torch.randn(shape, generator=generator) * _SCALE
            tensors[f"base_model.model.{name}.{factor}.weight"] = values.bfloat16()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in spec.shapes}),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
