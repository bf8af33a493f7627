"""The gradient of an adapter's values."""

import pytest
import torch

from neuroada_serve.errors import ShapeError
from neuroada_serve.ops import value_grad as module
from neuroada_serve.ops.value_grad import value_grad, value_grad_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _inputs(tokens, d_in, d_out, k, dtype):
    torch.manual_seed(tokens)
    index = torch.stack([torch.randperm(d_in)[:k] for _ in range(d_out)]).int()
    return torch.randn(tokens, d_out, dtype=dtype), torch.randn(tokens, d_in, dtype=dtype), index


def _close(found, expected, dtype):
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 7, 133])
def test_equals_reference(tokens, k, dtype):
    grad_output, x, index = _inputs(tokens, 33, 17, k, dtype)
    found = value_grad(grad_output, x, index)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    _close(found, value_grad_reference(grad_output, x, index), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_reference_without_the_fused_op(dtype, monkeypatch):
    monkeypatch.setattr(module, "_FUSED", None)
    grad_output, x, index = _inputs(133, 33, 17, 8, dtype)
    _close(value_grad(grad_output, x, index), value_grad_reference(grad_output, x, index), dtype)


def test_reference_is_the_dense_gradient_at_the_index():
    grad_output, x, index = _inputs(13, 9, 5, 4, torch.float64)
    dense = grad_output.t() @ x
    _close(value_grad_reference(grad_output, x, index), dense.gather(1, index.long()), x.dtype)


def test_bfloat16_sums_are_kept_in_float32():
    grad_output = torch.ones(4096, 1, dtype=torch.bfloat16)  # a bfloat16 sum would stop at 256
    x = torch.ones(4096, 1, dtype=torch.bfloat16)
    index = torch.zeros(1, 1, dtype=torch.int32)
    assert value_grad(grad_output, x, index).item() == 4096


def test_accepts_no_tokens_and_strided_activations():
    grad_output, x, index = _inputs(14, 9, 5, 2, torch.float32)
    assert value_grad(grad_output[:0], x[:0], index).eq(0).all()
    found = value_grad(grad_output[::2], x[::2], index)
    _close(found, value_grad_reference(grad_output[::2], x[::2], index), x.dtype)


def test_shapes_that_disagree_are_named():
    grad_output, x, index = _inputs(14, 9, 5, 2, torch.float32)
    with pytest.raises(ShapeError, match=r"\(13, 5\).*\(14, 9\)"):
        value_grad(grad_output[1:], x, index)
    with pytest.raises(ShapeError, match=r"\(4, 2\).*\(14, 5\)"):
        value_grad(grad_output, x, index[1:])
