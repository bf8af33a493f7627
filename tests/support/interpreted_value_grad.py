"""The value gradient's kernel against the reference; run by test_triton_bypass.py in a process of
its own.
"""

from itertools import product

import pytest
import torch

from neuroada_serve.ops.triton_value_grad import GradTile, value_grad_triton
from neuroada_serve.ops.value_grad import value_grad_reference
from tests.support.triton_interpreter import DEVICE

TILES = [GradTile(16, 16, 16, 1), GradTile(32, 16, 64), GradTile()]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}  # of float32 sums

SHAPES = [(1, 1, 1, 1), (7, 5, 3, 3), (133, 33, 17, 8), (64, 64, 64, 2)]


def case(num_tokens, d_out, d_in, k, dtype):
    torch.manual_seed(num_tokens)
    index = torch.rand(d_out, d_in).topk(k).indices.int()
    grads, x = torch.randn(num_tokens, d_out), torch.randn(num_tokens, d_in)
    return grads.to(DEVICE, dtype), x.to(DEVICE, dtype), index.to(DEVICE)


def assert_close(found, expected, dtype):
    assert found.dtype == torch.float32
    assert float((found - expected).norm()) <= BOUND[dtype] * float(expected.norm())


KINDS = list(product(SHAPES, TILES, BOUND))
if DEVICE.type == "cpu":  # slow: every tile meets every type and every shape, but not all pairs
    KINDS = [
        (shape, tile, list(BOUND)[(i + j) % 3])
        for i, shape in enumerate(SHAPES)
        for j, tile in enumerate(TILES)
    ]


@pytest.mark.parametrize(("shape", "tile", "dtype"), KINDS)
def test_kernel_equals_the_reference(shape, tile, dtype):
    grads, x, index = case(*shape, dtype)
    expected = value_grad_reference(grads, x, index)
    assert_close(value_grad_triton(grads, x, index, tile), expected, dtype)


def test_transposed_gradients_and_strided_inputs():
    grads, x, index = case(40, 24, 9, 2, torch.float32)
    expected = value_grad_reference(grads, x, index)
    by_column = grads.t().contiguous().t()
    assert_close(value_grad_triton(by_column, x, index, TILES[0]), expected, x.dtype)
    wide = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    assert_close(value_grad_triton(grads, wide, index.long(), TILES[1]), expected, x.dtype)


def test_no_tokens_give_zeros():
    grads, x, index = case(3, 24, 9, 2, torch.float32)
    assert value_grad_triton(grads[:0], x[:0], index).eq(0).all()


def test_a_column_outside_reads_nothing():
    grads, x, index = case(20, 24, 9, 2, torch.float32)
    spoilt = index.clone()
    spoilt[3, 1], spoilt[5, 0] = 9, -1
    found, expected = value_grad_triton(grads, x, spoilt), value_grad_reference(grads, x, index)
    expected[3, 1] = expected[5, 0] = 0
    assert_close(found, expected, x.dtype)
