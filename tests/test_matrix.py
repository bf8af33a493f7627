"""Frozen matrices: however the entries are stored, products and single entries are the same."""

import pytest
import torch

from neuroada_serve.ops import matrix
from neuroada_serve.ops.matrix import DenseMatrix, PackedMatrix, frozen_matrix, packs_faster
from neuroada_serve.ops.weights import add_entries_, read_entries, write_entries_

SIZES = [(1, 1), (3, 1), (1, 5), (16, 64), (33, 77), (133, 17), (320, 96)]  # d_out, d_in

packing = pytest.mark.skipif(
    not packs_faster(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="no packed bf16 weights here"
)


def random_weight(d_out: int, d_in: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(d_out + d_in)).to(dtype)


def matrices(weight: torch.Tensor):
    yield DenseMatrix(weight.clone())
    yield DenseMatrix(weight.t().contiguous(), transposed=True)
    if packs_faster(weight):
        yield PackedMatrix(weight)


@pytest.mark.parametrize(("d_out", "d_in"), SIZES)
def test_product_is_that_of_the_dense_weight(d_out, d_in):
    weight, bias = random_weight(d_out, d_in), torch.randn(d_out).bfloat16()
    for num_tokens in (1, 4, 17, 130):
        x = torch.randn(num_tokens, d_in).bfloat16()
        expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float()).bfloat16()
        for stored in matrices(weight):
            product = stored.multiply(x, bias)
            torch.testing.assert_close(product, expected, rtol=2**-6, atol=2**-6)


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
    assert isinstance(frozen_matrix(random_weight(16, 64)), PackedMatrix)
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
