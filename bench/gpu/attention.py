"""The attention kernels over blocks, beside what they replaced: a contiguous cache, and SDPA on
gathered keys and values."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from bench.gpu.contiguous import contiguous_attention
from bench.gpu.report import Report, time_ms
from bench.gpu.tiles import recorded
from neuroada_serve.engine.attention import PrefillSpan
from neuroada_serve.engine.triton_attention import decode_attention, runs_on
from neuroada_serve.engine.triton_prefill import cut, prefill_attention, tile_tokens


@dataclass(frozen=True)
class AttentionSizes:
    """The case that is measured.

    layers: parts of a block, each launched once a sample, so that no cache holds them.
    decodes: (requests, tokens of each context).
    prefills: (tokens, tokens before them).
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    decodes: tuple[tuple[int, int], ...]
    prefills: tuple[tuple[int, int], ...]
    block_tokens: int = 16
    layers: int = 4
    rounds: int = 7


LLAMA_ATTENTION = AttentionSizes(
    *(32, 8, 128, torch.bfloat16),
    decodes=tuple((n, length) for n in (1, 4, 16, 64) for length in (64, 1024, 4096)),
    prefills=((2048, 0), (2048, 6144), (512, 4096), (64, 8000)),
)
# The interpreter's dot takes bfloat16 for integers.
TINY_ATTENTION = AttentionSizes(
    *(4, 2, 16, torch.float32),
    decodes=((1, 40), (2, 17)),
    prefills=((20, 0), (5, 30)),
    layers=2,
    rounds=2,
)


class Pool:
    """Random keys and values of sequences of one length, in shuffled blocks."""

    def __init__(self, sizes: AttentionSizes, num: int, length: int, device: torch.device) -> None:
        blocks = -(-length // sizes.block_tokens)
        shape = (2, sizes.kv_heads, sizes.block_tokens, sizes.head_dim)
        self.pool = torch.empty(
            num * blocks, sizes.layers, *shape, dtype=sizes.dtype, device=device
        ).normal_()
        order = torch.randperm(num * blocks, device=device)
        self.tables = order.view(num, blocks).int()

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all blocks."""
        return self.pool[:, number, 0], self.pool[:, number, 1]

    def gather(self, number: int, slots: int, length: int) -> tuple[Tensor, Tensor]:
        """Copy the first tokens of the first slots, [slots, kv_heads, length, head_dim]."""
        keys, values = (
            part[self.tables[:slots].long()].transpose(1, 2).flatten(2, 3)[:, :, :length]
            for part in self.layer(number)
        )
        return keys.contiguous(), values.contiguous()


def time_ways(
    report: Report, sizes: AttentionSizes, name: str, ways: dict[str, Callable[[], object]]
) -> None:
    """Time calls in turn, without the host's part, in milliseconds a layer."""
    on_gpu = report.device.type == "cuda"
    calls = {way: recorded(call) if on_gpu else call for way, call in ways.items()}
    for _ in range(sizes.rounds):
        for way, call in calls.items():
            ms = time_ms(call, report.device) / sizes.layers
            report.samples_ms.setdefault(f"{name}/{way}", []).append(ms)


def agree(report: Report, name: str, found: Tensor, expected: Tensor) -> None:
    """Check that two ways have one result, up to rounding."""
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    report.facts.setdefault("relative_error", {})[name] = error
    report.checks[name] = error < 1e-2  # nan never passes


@torch.inference_mode()
def measure_decode_attention(report: Report, sizes: AttentionSizes) -> None:
    """Time decode attention over blocks and over a contiguous cache."""
    device = report.device
    for n, length in sizes.decodes:
        name = f"attention/{n}x{length}"
        if not report.may_start(name, 5):
            continue
        pool = Pool(sizes, n, length, device)
        old = [pool.gather(layer, n, length) for layer in range(sizes.layers)]
        query = torch.randn(n, sizes.heads, sizes.head_dim, device=device).to(sizes.dtype)
        slots = torch.arange(n, dtype=torch.int32, device=device)
        positions = torch.full_like(slots, length - 1)

        def paged(pool=pool, query=query, slots=slots, positions=positions) -> Tensor:
            for layer in range(sizes.layers):
                where = *pool.layer(layer), pool.tables, slots, positions
                out = decode_attention(query, *where)
            return out

        def contiguous(old=old, query=query, positions=positions) -> Tensor:
            for keys, values in old:
                out = contiguous_attention(query, keys, values, positions)
            return out

        agree(report, f"{name}: blocks as contiguous", paged(), contiguous())
        time_ways(report, sizes, name, {"paged": paged, "contiguous": contiguous})


@torch.inference_mode()
def measure_prefill_attention(report: Report, sizes: AttentionSizes) -> None:
    """Time a chunk's attention over blocks, and SDPA with and without gathering them."""
    device = report.device
    heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.head_dim
    for tokens, past in sizes.prefills:
        name = f"chunk attention/{tokens} after {past}"
        if not report.may_start(name, 5):
            continue
        length = past + tokens
        pool = Pool(sizes, 1, length, device)
        query = torch.randn(tokens, heads, dim, device=device).to(sizes.dtype)
        size = tile_tokens(heads, kv_heads, dim, sizes.dtype.itemsize)
        tiles = cut([PrefillSpan(0, tokens, 0, past)], size, device)
        ready = [pool.gather(layer, 1, length) for layer in range(sizes.layers)]
        bias = causal_lower_right(tokens, length)

        def sdpa(layers, query=query, bias=bias) -> Tensor:
            for keys, values in layers:
                grouped = query.transpose(0, 1)[None]
                out = F.scaled_dot_product_attention(
                    grouped, keys, values, attn_mask=bias, enable_gqa=True
                )
            return out[0].transpose(0, 1)

        def paged(pool=pool, query=query, tiles=tiles) -> Tensor:
            for layer in range(sizes.layers):
                out = prefill_attention(query, *pool.layer(layer), pool.tables, tiles)
            return out

        def gathered(pool=pool, sdpa=sdpa, length=length) -> Tensor:
            return sdpa(pool.gather(layer, 1, length) for layer in range(sizes.layers))

        def alone(sdpa=sdpa, ready=ready) -> Tensor:
            return sdpa(ready)

        agree(report, f"{name}: blocks as SDPA", paged(), alone())
        ways = {"paged": paged, "SDPA on gathered": gathered, "SDPA alone": alone}
        time_ways(report, sizes, name, ways)


def measure_attention(report: Report, sizes: AttentionSizes) -> None:
    """Measure both kernels, where they run."""
    if not runs_on(torch.empty(0, device=report.device)):
        report.skipped.append("attention kernels")
        return
    measure_decode_attention(report, sizes)
    measure_prefill_attention(report, sizes)
