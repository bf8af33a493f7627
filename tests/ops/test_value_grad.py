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
@pytest.mark.parametrize("tokens", [1, 7, 133, 256])
@pytest.mark.parametrize(("d_in", "d_out"), [(33, 17), (32, 32), (75, 1061)])
def test_equals_reference(d_in, d_out, tokens, k, dtype):
    grad_output, x, index = _inputs(tokens, d_in, d_out, k, dtype)
    found = value_grad(grad_output, x, index)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    _close(found, value_grad_reference(grad_output, x, index), dtype)


@pytest.mark.parametrize("way", ["_by_embedding_bag", "_column_by_column", "value_grad_by_rows"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_way_equals_the_reference(dtype, way, monkeypatch):
    monkeypatch.setattr(module, "_DENSE_BYTES", 33 * 5 * 4)  # a few rows at a time
    grad_output, x, index = _inputs(133, 33, 17, 8, dtype)
    found = getattr(module, way)(grad_output, x, index)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    _close(found, value_grad_reference(grad_output, x, index), dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads):
    grad_output, x, index = _inputs(200, 40, 2000, 3, torch.bfloat16)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = value_grad(grad_output, x, index)
        torch.set_num_threads(1)
        assert torch.equal(found, value_grad(grad_output, x, index))
    finally:
        torch.set_num_threads(usual)


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
    grad_output, x, index = _inputs(300, 72, 50, 2, torch.float32)  # of the kernel's sizes
    assert value_grad(grad_output[:0], x[:0], index).eq(0).all()
    found = value_grad(grad_output[::2], x[::2, :40], index % 40)
    _close(found, value_grad_reference(grad_output[::2], x[::2, :40], index % 40), x.dtype)


def test_nothing_beyond_the_tensors_is_read():
    grad_output, x, index = _inputs(150, 40, 45, 2, torch.float32)
    around = [torch.full((152, t.shape[1] + 7), float("nan")) for t in (grad_output, x)]
    for outer, inner in zip(around, (grad_output, x), strict=True):
        outer[1:151, 3 : 3 + inner.shape[1]] = inner
    inside = [o[1:151, 3 : 3 + t.shape[1]] for o, t in zip(around, (grad_output, x), strict=True)]
    assert torch.equal(value_grad(*inside, index), value_grad(grad_output, x, index))


def test_shapes_that_disagree_are_named():
    grad_output, x, index = _inputs(14, 9, 5, 2, torch.float32)
    with pytest.raises(ShapeError, match=r"\(13, 5\).*\(14, 9\)"):
        value_grad(grad_output[1:], x, index)
    with pytest.raises(ShapeError, match=r"\(4, 2\).*\(14, 5\)"):
        value_grad(grad_output, x, index[1:])
