"""Frozen matrices: however the entries are stored, products and single entries are the same."""

import pytest
import torch

from neuroada_serve.ops import cpu_product, cpu_team, matrix
from neuroada_serve.ops.matrix import (
    BlockMatrix,
    DenseMatrix,
    OneDnnMatrix,
    frozen_matrix,
    packed_matrix,
    packs_faster,
)
from neuroada_serve.ops.weights import add_entries_, read_entries, write_entries_

SIZES = [(1, 1), (3, 1), (1, 5), (16, 64), (33, 77), (133, 17), (320, 96)]  # d_out, d_in

packing = pytest.mark.skipif(
    not matrix._onednn_packs(), reason="oneDNN has no bf16 on this processor"
)
kernels = pytest.mark.skipif(cpu_team.forward_kernels() is None, reason="needs numba")


def random_weight(d_out: int, d_in: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(d_out + d_in)).to(dtype)


def matrices(weight: torch.Tensor):
    yield DenseMatrix(weight.clone())
    yield DenseMatrix(weight.t().contiguous(), transposed=True)
    if weight.dtype == torch.bfloat16:
        if matrix._onednn_packs():
            yield OneDnnMatrix(weight)
        if cpu_team.forward_kernels() is not None:
            yield BlockMatrix(weight)


@pytest.mark.parametrize(("d_out", "d_in"), SIZES)
def test_product_is_that_of_the_dense_weight(d_out, d_in):
    weight, bias = random_weight(d_out, d_in), torch.randn(d_out).bfloat16()
    for num_tokens in (1, 4, 17, 130):
        x = torch.randn(num_tokens, d_in).bfloat16()
        expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float()).bfloat16()
        for stored in matrices(weight):
            product = stored.multiply(x, bias)
            torch.testing.assert_close(product, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_written_where_it_is_wanted(dtype, has_bias):
    weight = random_weight(33, 77, dtype)
    bias = torch.randn(33).to(dtype) if has_bias else None
    x = torch.randn(20, 77).to(dtype)
    for stored in matrices(weight):
        out = torch.zeros(24, 33, dtype=dtype)
        product = stored.multiply(x, bias, out[2:22])
        assert product.data_ptr() == out[2:].data_ptr()
        assert torch.equal(out[2:22], stored.multiply(x, bias))
        assert not out[:2].any()
        assert not out[22:].any()


@pytest.mark.parametrize(("d_out", "d_in"), SIZES)
def test_dense_gives_the_weight_back_bit_for_bit(d_out, d_in):
    weight = random_weight(d_out, d_in)
    for stored in matrices(weight):
        assert torch.equal(stored.dense(), weight)


@pytest.mark.parametrize(("d_out", "d_in"), SIZES)
def test_every_entry_is_found(d_out, d_in):
    weight = random_weight(d_out, d_in)
    every = torch.arange(d_in).int().expand(d_out, d_in)
    for stored in matrices(weight):
        assert torch.equal(read_entries(stored.entries, stored.positions(every)), weight.flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("first_row", "rows"), [(0, 33), (7, 20), (32, 1)])
def test_written_entries_count_in_the_product(dtype, first_row, rows):
    weight, k = random_weight(33, 77, dtype), 3
    index = torch.rand(rows, 77).topk(k).indices.int()
    values = torch.randn(rows * k).to(dtype)
    changed = weight.clone()
    changed[first_row : first_row + rows].scatter_(1, index.long(), values.view(rows, k))
    x = torch.randn(5, 77).to(dtype)
    for stored in matrices(weight):
        positions = stored.positions(index, first_row)
        write_entries_(stored.entries, positions, values)
        assert torch.equal(stored.dense(), changed)
        expected = (x.float() @ changed.float().t()).to(dtype)
        torch.testing.assert_close(stored.multiply(x, None), expected, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("nnz", [1, 15, 16, 5000, 20001])
def test_added_entries_are_rounded_once_and_taken_back_bit_for_bit(dtype, nnz):
    storage = torch.randn(30000).to(dtype)
    before, positions = storage.clone(), torch.randperm(30000)[:nnz]
    values = torch.randn(nnz).to(dtype)
    saved = add_entries_(storage, positions, values)
    expected = before.clone()
    expected[positions] = (before[positions].float() + values.float()).to(dtype)
    assert torch.equal(storage, expected)
    assert torch.equal(saved, before[positions])
    write_entries_(storage, positions, saved)
    assert torch.equal(storage, before)


@packing
def test_packing_is_for_bf16_on_the_cpu():
    assert isinstance(frozen_matrix(random_weight(16, 64)), OneDnnMatrix)
    assert isinstance(frozen_matrix(random_weight(16, 64), transposed=True), DenseMatrix)
    assert isinstance(frozen_matrix(random_weight(16, 64, torch.float32)), DenseMatrix)


@packing
def test_layout_that_is_not_understood_is_not_used(monkeypatch):
    """Another torch may pack otherwise; then the weight stays as it is."""
    monkeypatch.setattr(matrix, "_codes_after_packing", lambda codes: torch.randperm(16 * 64))
    assert matrix._layout.__wrapped__(16, 64) is None
    monkeypatch.setattr(matrix, "_layout", lambda d_out, d_in: None)
    assert isinstance(frozen_matrix(random_weight(16, 64)), DenseMatrix)


@packing
def test_matrix_too_large_for_codes_stays_dense():
    assert isinstance(frozen_matrix(random_weight(1, 32_001)), DenseMatrix)


@kernels
def test_processor_without_onednns_bf16_gets_our_own_blocks(monkeypatch):
    monkeypatch.setattr(matrix, "_onednn_packs", lambda: False)
    weight = random_weight(16, 64)
    assert packs_faster(weight)
    for stored in (frozen_matrix(weight), frozen_matrix(weight.t().contiguous(), transposed=True)):
        assert isinstance(stored, BlockMatrix)
        assert torch.equal(stored.dense(), weight)
    assert isinstance(packed_matrix(weight), BlockMatrix)
    assert isinstance(frozen_matrix(weight.float()), DenseMatrix)


@packing
@kernels
def test_our_blocks_are_onednns():
    weight = random_weight(130, 96)
    if not OneDnnMatrix(random_weight(64, 64)).in_blocks_of_64:
        pytest.skip("oneDNN packs in another way for this processor, as it does for AMX")
    assert torch.equal(BlockMatrix(weight).entries, OneDnnMatrix(weight).entries)


@kernels
def test_product_of_many_tokens_is_that_of_each(monkeypatch):
    monkeypatch.setattr(cpu_product, "_MOST_TOKENS", 24)
    stored, x = BlockMatrix(random_weight(70, 33)), torch.randn(2, 37, 33).bfloat16()
    together = stored.multiply(x, None)
    assert together.shape == (2, 37, 70)
    alone = torch.stack([stored.multiply(row, None) for row in x.view(-1, 1, 33)])
    assert torch.equal(together.view(74, 70), alone.view(74, 70))


@pytest.mark.parametrize("has_bf16", [True, False])
def test_linear_is_right_with_and_without_products_of_bf16(monkeypatch, has_bf16):
    monkeypatch.setattr(matrix, "_onednn_has_bf16", lambda: has_bf16)
    weight, bias = random_weight(40, 24), torch.randn(40).bfloat16()
    x = torch.randn(3, 7, 24).bfloat16()
    for b in (bias, None):
        wide = None if b is None else b.float()
        expected = torch.nn.functional.linear(x.float(), weight.float(), wide).bfloat16()
        product = matrix.linear(x, weight, b)
        torch.testing.assert_close(product, expected, rtol=2**-7, atol=2**-7)
