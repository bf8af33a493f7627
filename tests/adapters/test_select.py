"""Magnitude selection, against the definition spelled out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.adapters import select
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.errors import ShapeError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive_index(weight: torch.Tensor, k: int) -> list[list[int]]:
    """Columns by falling |w|, ties by rising column."""
    return [sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))[:k] for row in weight.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 8, 33])
def test_index_equals_the_definition(dtype, k):
    torch.manual_seed(k)
    weight = torch.randn(65, 33).to(dtype)
    index = magnitude_index(weight, k)
    assert index.dtype == torch.int32
    assert index.tolist() == naive_index(weight, k)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_ties_go_to_the_lower_column(data):
    d_in = data.draw(st.integers(1, 12))
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -3e38])
    rows = data.draw(st.lists(st.lists(values, min_size=d_in, max_size=d_in), min_size=1))
    weight = torch.tensor(rows).to(data.draw(st.sampled_from(DTYPES[:2])))
    k = data.draw(st.integers(1, d_in))
    assert magnitude_index(weight, k).tolist() == naive_index(weight, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_smaller_k_is_the_beginning_of_larger_k(dtype):
    weight = (torch.randn(50, 40) * 4).round().to(dtype)  # many ties
    largest = magnitude_index(weight, 40)
    for k in (1, 3, 17, 40):
        assert torch.equal(magnitude_index(weight, k), largest[:, :k])


def test_rows_handled_apart_give_the_same_index(monkeypatch):
    weight = torch.randn(23, 7)
    expected = magnitude_index(weight, 3)
    for entries in (1, 7, 30, 22 * 7):
        monkeypatch.setattr(select, "_CHUNK_ENTRIES", entries)
        assert torch.equal(magnitude_index(weight, 3), expected)


def test_transposed_weight_is_read_by_its_rows():
    weight = torch.randn(9, 31)
    assert torch.equal(magnitude_index(weight.t().contiguous().t(), 4), magnitude_index(weight, 4))


def test_parameter_is_left_alone():
    weight = torch.nn.Parameter(torch.randn(4, 5))
    before = weight.detach().clone()
    assert not magnitude_index(weight, 2).requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_outside_the_row_names_both(k):
    with pytest.raises(ShapeError, match=f"k={k} must be within 1..d_in.*d_in=5"):
        magnitude_index(torch.zeros(3, 5), k)
