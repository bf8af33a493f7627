"""Values in a frozen weight: what a product sees, one write to take another's place, and the weight
afterwards."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from neuroada_serve.errors import EngineError
from neuroada_serve.ops import held_values
from neuroada_serve.ops.bypass import BypassTable
from neuroada_serve.ops.held_values import Add, HeldValues
from neuroada_serve.ops.matrix import FrozenMatrix
from tests.ops.test_matrix import matrices, random_weight

D_OUT, D_IN = 48, 32


def table(rows: slice, k: int, seed: int, is_bias: bool = False) -> BypassTable:
    """Values of three adapters on one random index."""
    random = torch.Generator().manual_seed(seed)
    num_rows = rows.stop - rows.start
    index = torch.rand(num_rows, D_IN, generator=random).argsort(1)[:, :k].int()
    values = torch.randn(3, num_rows, k, generator=random).bfloat16()
    return BypassTable(None if is_bias else index, values, rows.start)


UPPER, LOWER = table(slice(0, 20), 2, 1), table(slice(20, 48), 2, 2)
OTHER = table(slice(10, 40), 4, 3)  # of another index, on entries of both
BIAS = table(slice(0, 48), 1, 4, is_bias=True)


def expected(weight: torch.Tensor, adds: Sequence[Add]) -> torch.Tensor:
    """The weight with these values, each sum rounded."""
    weight = weight.clone()
    for added, slot, sign in adds:
        if added.index is not None:
            rows, columns = weight[added.rows], added.index.long()
            total = rows.gather(1, columns).float() + sign * added.bypass[slot].float()
            rows.scatter_(1, columns, total.to(weight.dtype))
    return weight


def fresh_matrices(dtype: torch.dtype) -> list[FrozenMatrix]:
    for tables in (UPPER, LOWER, OTHER):
        tables.positions = None  # of another matrix's storage
    return list(matrices(random_weight(D_OUT, D_IN, dtype)))


@pytest.fixture
def writes(monkeypatch):
    """Counts the writes by their kind."""
    counted: Counter[str] = Counter()

    def counting(name: str):
        function = getattr(held_values, name)

        def run(*args):
            counted[name] += 1
            return function(*args)

        monkeypatch.setattr(held_values, name, run)

    counting("add_entries_")
    counting("write_entries_")
    return counted


STEPS: list[list[Add]] = [
    [(UPPER, 0, 1), (LOWER, 0, 1)],
    [(UPPER, 1, 1), (LOWER, 1, 1), (BIAS, 1, 1)],  # swapped
    [(UPPER, 1, 1), (LOWER, 1, 1)],  # as before
    [(UPPER, 1, 1), (LOWER, 2, 1)],  # one of two
    [(OTHER, 1, 1)],
    [(OTHER, 1, -1), (UPPER, 2, 1), (LOWER, 2, 1)],  # the first is in the weights
    [(OTHER, 1, -1), (UPPER, 0, 1), (LOWER, 0, 1)],  # it stays out
    [(OTHER, 2, -1), (UPPER, 0, 1), (LOWER, 0, 1)],  # all shared entries change
    [],
    [(BIAS, 0, 1)],
    [(UPPER, 2, -1)],
    [(UPPER, 2, 1)],
    [(UPPER, 2, 1), (UPPER, 0, 1)],
    [(UPPER, 0, 1), (UPPER, 2, 1)],  # nobody can take another's place on the same entries
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_holds_what_was_asked_for_and_nothing_else(dtype):
    weight = random_weight(D_OUT, D_IN, dtype)
    for number in range(len(fresh_matrices(dtype))):
        matrix = fresh_matrices(dtype)[number]
        with HeldValues(matrix).for_a_while() as held:
            for adds in [*STEPS, *reversed(STEPS), *STEPS[::2], *STEPS[1::2]]:
                held.hold(adds)
                assert torch.equal(matrix.dense(), expected(weight, adds))
            held.release()
            assert torch.equal(matrix.dense(), weight)
            held.hold(STEPS[6])
        assert torch.equal(matrix.dense(), weight)


def test_adapter_of_the_same_index_takes_anothers_place_in_one_write(writes):
    matrix = fresh_matrices(torch.float32)[0]
    with HeldValues(matrix).for_a_while() as held:
        for slot in (0, 1, 2, 1):
            held.hold([(UPPER, slot, 1), (LOWER, slot, 1)])
        assert writes == {"add_entries_": 2, "write_entries_": 2 * 3}
        held.hold([(UPPER, 1, 1), (LOWER, 1, 1)])  # the same
        assert writes == {"add_entries_": 2, "write_entries_": 2 * 3}
    assert writes == {"add_entries_": 2, "write_entries_": 2 * 4}


def test_weight_is_restored_when_a_product_fails(monkeypatch):
    weight = random_weight(D_OUT, D_IN, torch.float32)
    matrix = fresh_matrices(torch.float32)[0]

    def multiply() -> None:
        with HeldValues(matrix).for_a_while() as held:
            held.hold(STEPS[0])
            raise EngineError("a product")

    with pytest.raises(EngineError, match="a product"):
        multiply()
    assert torch.equal(matrix.dense(), weight)

    # A write that fails leaves the first table swapped, the second not.
    write, calls = held_values.write_entries_, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        write(*args)

    def swap() -> None:
        with HeldValues(matrix).for_a_while() as held:
            held.hold(STEPS[0])
            monkeypatch.setattr(held_values, "write_entries_", failing)
            held.hold(STEPS[1])

    with pytest.raises(MemoryError):
        swap()
    assert len(calls) == 4
    assert torch.equal(matrix.dense(), weight)
