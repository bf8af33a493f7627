"""The decode attention kernels against plain torch; run by test_triton_bypass.py in a process of
its own (see interpreted_bypass.py)."""

from itertools import product

import pytest
import torch
from torch import Tensor

from neuroada_serve.engine import triton_attention
from neuroada_serve.engine.triton_attention import decode_attention, num_splits, write_kv_
from tests.support.triton_interpreter import DEVICE

# The interpreter's dot takes bfloat16 for integers.
DTYPES = [torch.float32, torch.float16 if DEVICE.type == "cpu" else torch.bfloat16]


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: list[int],
    positions: list[int],
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Row by row, in float32."""
    out = torch.zeros_like(query, dtype=torch.float32)
    repeats = query.shape[1] // keys.shape[1]
    for t, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if slot < 0:
            continue
        first = 0 if window is None else max(0, position + 1 - window)
        k = keys[slot, :, first : position + 1].float().repeat_interleave(repeats, 0)
        v = values[slot, :, first : position + 1].float().repeat_interleave(repeats, 0)
        scale = query.shape[2] ** -0.5 if scaling is None else scaling
        scores = (query[t, :, None].float() @ k.transpose(1, 2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[t] = (scores.softmax(-1) @ v)[:, 0]
    return out


def random_cache(kv_heads: int, dim: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (6, kv_heads, tokens, dim)
    return tuple(torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))


HEADS = [(4, 2, 8), (9, 3, 64), (3, 3, 80)]  # heads, of keys and values, size
EXTRAS: list[dict] = [{}, {"window": 7}, {"softcap": 5.0, "window": 70, "scaling": 0.3}]
KINDS = list(product(HEADS, EXTRAS, DTYPES))
if DEVICE.type == "cpu":  # slow: both types with all heads and with all extras, but not all pairs
    KINDS = [(*kind, DTYPES[i % 2]) for i, kind in enumerate(product(HEADS, EXTRAS))]


@pytest.mark.parametrize(("shape", "extra", "dtype"), KINDS)
def test_decode_equals_attention_written_out(shape, extra, dtype, monkeypatch):
    heads, kv_heads, dim = shape
    monkeypatch.setattr(triton_attention, "_MAX_SPLITS", 4)  # each program is slow interpreted
    torch.manual_seed(heads)
    keys, values = random_cache(kv_heads, dim, 150, dtype)
    slots, positions = [3, -1, 0, 5], [130, 0, 0, 64]
    for s, p in zip(slots, positions, strict=True):  # what was never written must not be read
        if s >= 0:
            keys[s, :, p + 1 :] = values[s, :, p + 1 :] = float("nan")
    query = torch.randn(heads, 4, dim, device=DEVICE).to(dtype).transpose(0, 1)
    expected = reference(query, keys, values, slots, positions, **extra)
    where = (torch.tensor(part, device=DEVICE, dtype=torch.int32) for part in (slots, positions))
    out = decode_attention(query, keys, values, *where, **extra)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


def test_many_sequences_need_no_splits(monkeypatch):
    monkeypatch.setattr(triton_attention, "_PROGRAMS", 1)
    torch.manual_seed(0)
    keys, values = random_cache(2, 16, 20, torch.float32)
    slots, positions = [t % 7 - 1 for t in range(40)], [t % 20 for t in range(40)]
    assert num_splits(40, 2) == 1
    query = torch.randn(40, 4, 16, device=DEVICE)
    expected = reference(query, keys, values, slots, positions)
    where = (torch.tensor(part, device=DEVICE) for part in (slots, positions))
    torch.testing.assert_close(
        decode_attention(query, keys, values, *where), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("n", "kv_heads", "splits"), [(1, 8, 32), (16, 8, 8), (64, 8, 2), (256, 8, 1)]
)
def test_splits_fill_the_device(n, kv_heads, splits):
    assert num_splits(n, kv_heads) == splits


def test_keys_and_values_land_in_their_cells():
    keys, values = random_cache(3, 10, 12, torch.bfloat16)
    expected = keys.clone(), values.clone()
    k = torch.randn(3, 5, 10, device=DEVICE).bfloat16().transpose(0, 1)
    v = torch.randn(5, 3, 20, device=DEVICE).bfloat16()[:, :, :10]
    slots, positions = [2, 2, -1, 0, 5], [0, 1, 3, 11, 7]
    for t, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if slot >= 0:
            expected[0][slot, :, position], expected[1][slot, :, position] = k[t], v[t]
    where = (torch.tensor(part, device=DEVICE) for part in (slots, positions))
    write_kv_(keys, values, k, v, *where)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
