"""Norms by one kernel: transformers' own figures, and its own code wherever the kernel is not."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from neuroada_serve.engine.fused import use_cpu_kernels
from neuroada_serve.ops import cpu_team


def random_norm(width: int, dtype: torch.dtype, kind=LlamaRMSNorm) -> nn.Module:
    norm = kind(width, 1e-5).requires_grad_(False)
    norm.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(width)))
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 576, 577])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 130])
def test_kernel_equals_transformers_norm(dtype, width, num_tokens):
    """Sums in another order turn a rounding now and then, by one unit in the last place."""
    norm, changed = random_norm(width, dtype), random_norm(width, dtype)
    assert use_cpu_kernels(changed) == [changed]
    x = torch.randn(2, num_tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, actual = norm(x), changed(x)
    assert actual.shape == expected.shape
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=2 * unit, atol=1e-6)
    if x.numel():
        assert (actual != expected).float().mean() < 0.01


def test_extreme_rows_stay_what_they_are():
    norm, changed = random_norm(48, torch.bfloat16), random_norm(48, torch.bfloat16)
    use_cpu_kernels(changed)
    x = torch.ones(4, 48, dtype=torch.bfloat16)
    x[0], x[1], x[2] = 0, 1e-30, 1e18
    torch.testing.assert_close(changed(x), norm(x), rtol=2**-6, atol=0)
    x[3, 5] = float("nan")
    assert bool(changed(x)[3].isnan().all())
    assert bool(changed(x)[:3].isfinite().all())


def test_input_of_another_kind_takes_transformers_code():
    norm, changed = random_norm(48, torch.bfloat16), random_norm(48, torch.bfloat16)
    use_cpu_kernels(changed)
    for x in (torch.randn(3, 48), torch.randn(48, 3).bfloat16().t()):
        assert torch.equal(changed(x), norm(x))


def test_only_norms_of_the_known_form_change(monkeypatch):
    """Gemma adds one to its weight; float32 stays exactly transformers'."""
    assert use_cpu_kernels(random_norm(16, torch.bfloat16, Qwen2RMSNorm))
    assert not use_cpu_kernels(random_norm(16, torch.bfloat16, GemmaRMSNorm))
    assert not use_cpu_kernels(random_norm(16, torch.float32))
    monkeypatch.setattr(cpu_team, "kernels", lambda: None)
    assert not use_cpu_kernels(random_norm(16, torch.bfloat16))
