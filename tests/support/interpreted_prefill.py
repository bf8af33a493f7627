"""The prefill attention kernel against plain torch; run by test_triton_prefill.py in a process of
its own (see interpreted_bypass.py)."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from neuroada_serve.engine import triton_prefill
from neuroada_serve.engine.triton_prefill import cut, prefill_attention, tile_tokens, warm_up
from tests.support.interpreted_attention import DTYPES, EXTRAS, HEADS, TOLERANCES
from tests.support.kv_blocks import Blocks, new_blocks
from tests.support.triton_interpreter import DEVICE


@dataclass(frozen=True)
class Span:
    start: int
    stop: int
    slot: int
    num_past: int


LENGTHS = [150, 133, 1, 20]
# With much of a past, with none, of one token, and behind a shared block.
SPANS = [Span(7, 38, 0, 119), Span(38, 171, 1, 0), Span(171, 172, 2, 0), Span(172, 176, 3, 16)]
KINDS = [
    (*kind, DTYPES[i % 2], (16, 128)[i % 3 == 2], False)
    for i, kind in enumerate(product(HEADS, EXTRAS))
]
KINDS += [(*kind, True) for *kind, _ in KINDS[::4]]  # splits, with all heads and all extras


def expected_chunk(
    query: Tensor,
    blocks: Blocks,
    span: Span,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention with a mask, in float32, [tokens, heads, head_dim] like query."""
    num_tokens, heads, dim = query.shape
    stop = span.num_past + num_tokens
    keys, values = (
        part.repeat_interleave(heads // len(part), 0)
        for part in blocks.sequence(span.slot, 0, stop)
    )
    columns = torch.arange(stop, device=query.device)
    behind = columns[span.num_past :, None] - columns
    hidden = (behind < 0) | (behind >= (window or stop))
    scores = query.float().transpose(0, 1) @ keys.transpose(1, 2) * (scaling or dim**-0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1)


@pytest.mark.parametrize(("shape", "extra", "dtype", "block_tokens", "is_split"), KINDS)
def test_chunks_equal_attention_written_out(
    shape, extra, dtype, block_tokens, is_split, monkeypatch
):
    if is_split:
        monkeypatch.setattr(triton_prefill, "_SPLIT_COLUMNS", 32)
    heads, kv_heads, dim = shape
    blocks = new_blocks(LENGTHS, kv_heads, dim, dtype, block_tokens, shared=1, device=DEVICE)
    tiles = cut(SPANS, tile_tokens(heads, kv_heads, dim, dtype.itemsize), DEVICE)
    splits = triton_prefill.num_splits(len(tiles.rows) * kv_heads, tiles.longest)
    assert splits == (4 if is_split else 1)
    query = torch.randn(heads, 169, dim, device=DEVICE).to(dtype).transpose(0, 1)
    out = prefill_attention(query, blocks.keys, blocks.values, blocks.tables, tiles, **extra)
    assert out.dtype == dtype
    chunks = query.split([s.stop - s.start for s in SPANS])
    expected = torch.cat(
        [expected_chunk(part, blocks, s, **extra) for part, s in zip(chunks, SPANS, strict=True)]
    )
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


def test_output_is_written_where_it_is_wanted():
    blocks = new_blocks([20], 2, 16, torch.float32, device=DEVICE)
    query, out = torch.randn(4, 2, 16, device=DEVICE), torch.zeros(6, 2, 16, device=DEVICE)
    span = Span(0, 4, 0, 16)
    tiles = cut([span], tile_tokens(2, 2, 16, 4), DEVICE)
    prefill_attention(query, blocks.keys, blocks.values, blocks.tables, tiles, out=out[2:])
    torch.testing.assert_close(out[2:], expected_chunk(query, blocks, span), atol=1e-5, rtol=1e-5)
    assert not out[:2].any()


def test_warm_up_launches_every_number_of_splits(monkeypatch):
    splits = []
    buffers = triton_prefill.split_buffers

    def noted(*sizes):
        splits.append(sizes[2])
        return buffers(*sizes)

    monkeypatch.setattr(triton_prefill, "split_buffers", noted)
    blocks = new_blocks([20], 2, 16, torch.float32, device=DEVICE)
    pools = blocks.keys, blocks.values, blocks.tables
    warm_up(torch.randn(1, 4, 16, device=DEVICE), *pools, window=7)
    assert splits == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("programs", "longest", "splits"),
    [(8, 8192, 8), (8, 3000, 2), (8, 1000, 1), (64, 9000, 4), (1024, 9000, 1)],
)
def test_splits_fill_the_device_where_contexts_are_long(programs, longest, splits):
    assert triton_prefill.num_splits(programs, longest) == splits


def test_tiles_hold_every_token_once_and_the_longest_contexts_come_first():
    tiles = cut(SPANS, 32, DEVICE)
    rows = tiles.rows.tolist()
    tokens = sorted(start + i for start, count, _, _ in rows for i in range(count))
    assert tokens == list(range(169))
    assert (tiles.num_tokens, tiles.longest) == (169, 150)
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)
    assert [0, 31, 0, 119] in rows
    assert [31 + 128, 5, 1, 128] in rows
