"""Attention of the modules' tokens over blocks, by kernel, against plain torch."""

import pytest
import torch

from neuroada_serve.ops import cpu_attention, cpu_team
from neuroada_serve.ops.cpu_attention import decode_attention, fits, write_kv_
from tests.support.kv_blocks import attention_of, new_blocks

pytestmark = pytest.mark.skipif(cpu_team.forward_kernels() is None, reason="needs numba")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LENGTHS = [41, 16, 134, 1, 17, 300]
SLOTS = [5, 3, 0, 2, 4, 1]
SHAPES = [(4, 2, 32), (9, 3, 64), (3, 1, 48), (2, 2, 16), (16, 2, 128), (5, 5, 80)]


def random_query(n: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, heads, dim] as transformers hands it over: heads lie further apart than tokens."""
    generator = torch.Generator().manual_seed(n + heads + dim)
    return torch.randn(heads, n, dim, generator=generator).to(dtype).transpose(0, 1)


def assert_as_plain_torch(query, blocks, slots, positions, **kw) -> None:
    where = torch.tensor(slots), torch.tensor(positions)
    out = decode_attention(query, blocks.keys, blocks.values, blocks.tables, *where, **kw)
    assert out.dtype == query.dtype
    bound = TOLERANCE[query.dtype]
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        expected = attention_of(query[row], blocks, slot, position, **kw)
        torch.testing.assert_close(out[row].float(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 16, 37])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_kernel_equals_plain_torch(dtype, window, softcap, heads, kv_heads, dim):
    blocks = new_blocks(LENGTHS, kv_heads, dim, dtype)
    query = random_query(len(SLOTS), heads, dim, dtype)
    positions = [LENGTHS[slot] - 1 for slot in SLOTS]
    kw = {"window": window, "softcap": softcap}
    assert_as_plain_torch(query, blocks, SLOTS, positions, **kw)
    assert_as_plain_torch(query[:1], blocks, [5], [299], **kw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_tokens", [32, 128])
def test_blocks_of_any_size_shared_or_not(dtype, block_tokens):
    blocks = new_blocks([300, 290, 257, 300], 2, 32, dtype, block_tokens, shared=2)
    assert torch.equal(blocks.tables[0, :2], blocks.tables[3, :2])
    query = random_query(4, 4, 32, dtype)
    assert_as_plain_torch(query, blocks, [1, 0, 3, 2], [289, 299, 299, 256], scaling=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_some_of_them_neighbours(dtype):
    """More than 32 rows: neighbours in a sequence are computed together."""
    blocks = new_blocks([90, 20], 2, 32, dtype)
    positions = [*range(20, 63), 70, 72, 71, *range(73, 90), 19]
    slots = [0] * (len(positions) - 1) + [1]
    query = random_query(len(positions), 4, 32, dtype)
    for window in (None, 9):
        assert_as_plain_torch(query, blocks, slots, positions, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("dim", [16, 48])
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_call(dtype, window, dim):
    blocks = new_blocks(LENGTHS, 2, dim, dtype)
    slots, positions = [5] * 40 + SLOTS, [*range(250, 290), *(LENGTHS[s] - 1 for s in SLOTS)]
    query = random_query(len(slots), 4, dim, dtype)
    cache = blocks.keys, blocks.values, blocks.tables
    slots, positions = torch.tensor(slots), torch.tensor(positions)
    together = decode_attention(query, *cache, slots, positions, window=window)
    for row in range(len(slots)):
        one = slice(row, row + 1)
        alone = decode_attention(query[one], *cache, slots[one], positions[one], window=window)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_thread_gives_the_same(dtype, monkeypatch):
    blocks, query = new_blocks(LENGTHS, 2, 32, dtype), random_query(6, 4, 32, dtype)
    positions = torch.tensor([LENGTHS[slot] - 1 for slot in SLOTS])
    call = (query, blocks.keys, blocks.values, blocks.tables, torch.tensor(SLOTS), positions)
    monkeypatch.setattr(cpu_attention, "_THREADED", 0)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(decode_attention(*call))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cells_outside_a_window_may_hold_anything(dtype):
    blocks, query = new_blocks([40], 2, 32, dtype), random_query(1, 4, 32, dtype)
    call = (query, blocks.keys, blocks.values, blocks.tables)
    where = torch.tensor([0]), torch.tensor([39])
    expected = decode_attention(*call, *where, window=20)
    for position in range(20):
        block, place = blocks.cell(0, position)
        blocks.keys[block, :, place] = blocks.values[block, :, place] = float("inf")
    assert torch.equal(decode_attention(*call, *where, window=20), expected)


def test_rows_without_a_slot_give_zeros_and_are_not_stored():
    blocks, query = new_blocks([40], 2, 32, torch.float32), random_query(2, 4, 32, torch.float32)
    where = torch.tensor([-1, 0], dtype=torch.int32), torch.tensor([0, 39], dtype=torch.int32)
    out = decode_attention(query, blocks.keys, blocks.values, blocks.tables, *where)
    assert torch.equal(out[0], torch.zeros(4, 32))
    assert out[1].abs().sum() > 0
    before, new = blocks.keys.clone(), torch.ones(1, 2, 32)
    write_kv_(blocks.keys, blocks.values, new, new, blocks.tables, where[0][:1], where[1][:1])
    torch.testing.assert_close(blocks.keys, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_new_tokens_are_stored_in_their_cells_and_nowhere_else(dtype, kv_heads):
    blocks = new_blocks(LENGTHS, kv_heads, 48, dtype)
    positions = [LENGTHS[slot] for slot in SLOTS]  # one needs a new block, and gets the last left
    k, v = (random_query(len(SLOTS), kv_heads, 48, dtype) * sign for sign in (1, -2))
    expected = blocks.keys.clone(), blocks.values.clone()
    for pool, new in zip(expected, (k, v), strict=True):
        for row, (slot, position) in enumerate(zip(SLOTS, positions, strict=True)):
            block, place = blocks.cell(slot, position)
            pool[block, :, place] = new[row]
    where = torch.tensor(SLOTS), torch.tensor(positions)
    write_kv_(blocks.keys, blocks.values, k, v, blocks.tables, *where)
    for pool, kept in zip((blocks.keys, blocks.values), expected, strict=True):
        torch.testing.assert_close(pool, kept, rtol=0, atol=0, equal_nan=True)


def test_no_tokens_are_no_work():
    blocks, none = new_blocks([3], 2, 32, torch.float32), torch.zeros(0, dtype=torch.int64)
    nothing = torch.zeros(0, 4, 32)
    assert decode_attention(nothing, *vars(blocks).values(), none, none).shape == (0, 4, 32)
    write_kv_(blocks.keys, blocks.values, nothing[:, :2], nothing[:, :2], blocks.tables, none, none)


def test_only_what_the_kernel_computes_fits():
    assert all(fits(torch.zeros(1, 4, dim, dtype=dtype)) for dtype in DTYPES for dim in (16, 80))
    assert not fits(torch.zeros(1, 4, 24))
    assert not fits(torch.zeros(1, 4, 32, dtype=torch.float64))
    assert not fits(torch.zeros(1, 4, 32, device="meta"))
