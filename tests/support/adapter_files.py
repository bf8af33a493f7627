"""Small adapters and a base that they fit."""

from pathlib import Path

import torch

from neuroada_serve.adapters.format import (
    AdapterConfig,
    BaseSpec,
    ModuleBypass,
    make_adapter,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT = "0123456789abcdef" * 4


def new_adapter(shapes, k=2, dtype=torch.bfloat16, seed=0, column_offset=0, **config):
    """A random adapter for modules name -> (d_out, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, (d_out, d_in) in shapes.items():
        index = torch.rand(d_out, d_in, generator=generator).topk(k).indices.int() + column_offset
        values = torch.randn(d_out, k, generator=generator)
        parts[name] = ModuleBypass(index, values.to(dtype))
    fields = {
        "base_model_name_or_path": "base",
        "base_fingerprint": FINGERPRINT,
        "k": k,
        "target_modules": tuple(shapes),
    }
    return make_adapter(AdapterConfig(**fields | config), parts)


def assert_equal(adapter, other):
    assert adapter.config == other.config
    assert adapter.digest == other.digest
    assert adapter.modules.keys() == other.modules.keys()
    for name, part in adapter.modules.items():
        assert torch.equal(part.index, other.modules[name].index)
        assert part.bypass.dtype == other.modules[name].bypass.dtype
        assert torch.equal(part.bypass, other.modules[name].bypass)


SHAPES = {"a.q_proj": (3, 5), "a.up_proj": (7, 4)}
SPEC = BaseSpec("base", FINGERPRINT, SHAPES)


def data_of(folder: Path) -> bytes:
    """Return the bytes behind the header of a weights file."""
    file = (folder / WEIGHTS).read_bytes()
    return file[8 + int.from_bytes(file[:8], "little") :]
