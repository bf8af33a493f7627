"""The decode attention kernels against plain torch; run by test_triton_attention.py in a process of
its own (see interpreted_bypass.py)."""

from itertools import product

import pytest
import torch
from torch import Tensor

from neuroada_serve.engine import triton_attention
from neuroada_serve.engine.triton_attention import decode_attention, num_splits, write_kv_
from tests.support.kv_blocks import Blocks, attention_of, new_blocks
from tests.support.triton_interpreter import DEVICE

# The interpreter's dot takes bfloat16 for integers.
DTYPES = [torch.float32, torch.float16 if DEVICE.type == "cpu" else torch.bfloat16]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
HEADS = [(4, 2, 8), (9, 3, 64), (3, 3, 80)]  # heads, of keys and values, size
EXTRAS: list[dict] = [{}, {"window": 7}, {"softcap": 5.0, "window": 70, "scaling": 0.3}]
KINDS = list(product(HEADS, EXTRAS, DTYPES))
if DEVICE.type == "cpu":  # slow: both types with all heads and with all extras, but not all pairs
    KINDS = [(*kind, DTYPES[i % 2]) for i, kind in enumerate(product(HEADS, EXTRAS))]


def on_device(*parts: list[int]) -> list[Tensor]:
    return [torch.tensor(part, device=DEVICE, dtype=torch.int32) for part in parts]


def expected_rows(
    query: Tensor, blocks: Blocks, slots: list[int], positions: list[int], **extra
) -> Tensor:
    rows = [
        attention_of(row, blocks, slot, position, **extra)
        if slot >= 0
        else torch.zeros_like(row, dtype=torch.float32)
        for row, slot, position in zip(query, slots, positions, strict=True)
    ]
    return torch.stack(rows)


# A tile of columns spans several blocks, or is a part of one.
@pytest.mark.parametrize("block_tokens", [16, 128])
@pytest.mark.parametrize(("shape", "extra", "dtype"), KINDS)
def test_decode_equals_attention_written_out(shape, extra, dtype, block_tokens, monkeypatch):
    heads, kv_heads, dim = shape
    monkeypatch.setattr(triton_attention, "_MAX_SPLITS", 4)  # each program is slow interpreted
    lengths = [131, 65, 17]
    blocks = new_blocks(lengths, kv_heads, dim, dtype, block_tokens, shared=1, device=DEVICE)
    slots, positions = [2, -1, 0, 1], [16, 500, 130, 64]
    query = torch.randn(heads, 4, dim, device=DEVICE).to(dtype).transpose(0, 1)
    pools = blocks.keys, blocks.values, blocks.tables
    out = decode_attention(query, *pools, *on_device(slots, positions), **extra)
    assert out.dtype == dtype
    expected = expected_rows(query, blocks, slots, positions, **extra)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


def test_many_sequences_need_no_splits(monkeypatch):
    monkeypatch.setattr(triton_attention, "_PROGRAMS", 1)
    blocks = new_blocks(range(1, 21), 2, 16, torch.float32, device=DEVICE)
    slots = [t % 21 - 1 for t in range(40)]
    positions = [max(0, slot) for slot in slots]
    assert num_splits(40, 2) == 1
    query, out = torch.randn(40, 4, 16, device=DEVICE), torch.empty(40, 4, 16, device=DEVICE)
    pools = blocks.keys, blocks.values, blocks.tables
    given = decode_attention(query, *pools, *on_device(slots, positions), out=out)
    assert given is out
    expected = expected_rows(query, blocks, slots, positions)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("n", "kv_heads", "splits"), [(1, 8, 32), (16, 8, 8), (64, 8, 2), (256, 8, 1)]
)
def test_splits_fill_the_device(n, kv_heads, splits):
    assert num_splits(n, kv_heads) == splits


def test_keys_and_values_land_in_their_cells():
    blocks = new_blocks([40, 1, 20], 3, 10, torch.bfloat16, device=DEVICE)
    pool = blocks.keys._base
    assert pool is not None
    expected = pool.clone()
    k = torch.randn(3, 5, 10, device=DEVICE).bfloat16().transpose(0, 1)
    v = torch.randn(5, 3, 20, device=DEVICE).bfloat16()[:, :, :10]
    slots, positions = [2, 2, -1, 0, 1], [0, 17, 300, 39, 7]
    for t, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if slot >= 0:
            block, place = blocks.cell(slot, position)
            expected[block, 1, 0, :, place], expected[block, 1, 1, :, place] = k[t], v[t]
    write_kv_(
        *(blocks.keys, blocks.values, k, v, blocks.tables),
        *(torch.tensor(part, device=DEVICE) for part in (slots, positions)),
    )
    assert torch.equal(pool.view(torch.int16), expected.view(torch.int16)), "NaN's bits, too"


def test_blocks_lie_beyond_two_billion_elements():
    """Only the pages that are written take memory."""
    stride, shape = 1 << 30, (3, 1, 16, 16)
    pool = torch.empty(2 * stride + 512, dtype=torch.float16, device=DEVICE)
    keys, values = (
        pool[start:].as_strided(shape, (stride, 256, 16, 1), start) for start in (0, 256)
    )
    keys[0] = values[0] = float("nan")
    tables, slots, positions = on_device([2], [0] * 3, [0, 1, 2])
    tables, k = tables[None], torch.randn(3, 1, 16, device=DEVICE).half()
    v, query = torch.randn(3, 1, 16, device=DEVICE).half(), torch.randn(1, 2, 16, device=DEVICE)
    write_kv_(keys, values, k, v, tables, slots, positions)
    assert torch.equal(keys[2, 0, :3], k[:, 0])
    out = decode_attention(query.half(), keys, values, tables, slots[:1], positions[2:])
    expected = attention_of(query[0].half(), Blocks(keys, values, tables), 0, 2)
    torch.testing.assert_close(out[0].float(), expected, atol=4e-3, rtol=4e-3)
