"""Random cases of `bypass_add_`, and how close two kernels must be."""

import random

import torch
from torch import Tensor

from neuroada_serve.ops.bypass import (
    NO_SLOT,
)

NUM_SLOTS = 9


def slots_of(popularity: str, num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Slots of a batch in which the adapters are wanted this unevenly."""
    draw = random.Random(seed)
    if popularity == "base":
        return (NO_SLOT,) * num_tokens
    if popularity == "identical":
        return (3,) * num_tokens
    if popularity == "distinct":
        return tuple(t % NUM_SLOTS for t in range(num_tokens))
    if popularity == "uniform":
        return tuple(draw.randrange(-1, NUM_SLOTS) for _ in range(num_tokens))
    if popularity == "prefills":  # long runs of several adapters between single tokens
        slots = [s for s in (2, NO_SLOT, 5, 2, 8) for _ in range(draw.randrange(1, 40))]
        return tuple((slots * num_tokens)[:num_tokens])
    assert popularity == "zipf"
    weights = [1 / (rank + 1) for rank in range(NUM_SLOTS + 1)]
    return tuple(draw.choices(range(-1, NUM_SLOTS), weights, k=num_tokens))


def random_case(num_tokens: int, d_out: int, d_in: int, k: int, dtype: torch.dtype):
    """(y, x, index, bypass)."""
    generator = torch.Generator().manual_seed(num_tokens + d_out + d_in + k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    index = torch.rand(d_out, d_in, generator=generator).topk(k).indices.int()
    return normal(num_tokens, d_out), normal(num_tokens, d_in), index, normal(NUM_SLOTS, d_out, k)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Float32 sums in another order; one rounding more or less apart in 16 bits."""
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=2e-5)
