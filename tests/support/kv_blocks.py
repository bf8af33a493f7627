"""A KV cache in blocks, and attention over it written out in plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAYERS, LAYER = 3, 1  # in the pool, and the one that is looked at


@dataclass
class Blocks:
    """keys, values: [num_blocks, kv_heads, block_tokens, head_dim]; tables: [slots, max_blocks]."""

    keys: Tensor
    values: Tensor
    tables: Tensor

    def cell(self, slot: int, position: int) -> tuple[int, int]:
        """Block, and place in it."""
        tokens = self.keys.shape[2]
        return int(self.tables[slot, position // tokens]), position % tokens

    def sequence(self, slot: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions, [kv_heads, positions, head_dim] float32."""
        cells = [self.cell(slot, position) for position in range(first, stop)]
        return tuple(
            torch.stack([pool[block, :, place] for block, place in cells], 1).float()
            for pool in (self.keys, self.values)
        )


def new_blocks(
    lengths: Sequence[int],
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    block_tokens: int = 16,
    shared: int = 0,
    device: torch.device | None = None,
) -> Blocks:
    """Random keys and values of sequences of these lengths, one a slot, in shuffled blocks; all
    other cells are NaN, and so is a block that tables name beyond a sequence's own.

    shared: blocks at their beginnings that all sequences have in common.
    """
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    needed = [-(-length // block_tokens) for length in lengths]
    total = 1 + shared + sum(needed)
    order = (1 + torch.randperm(total - 1, generator=generator)).tolist()
    pool = torch.full((total, LAYERS, 2, kv_heads, block_tokens, dim), float("nan"), dtype=dtype)
    tables = torch.zeros(len(lengths), max(needed) + 2, dtype=torch.int32)
    common, left = order[:shared], order[shared:]
    for slot, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        own = common[:count] + [left.pop() for _ in range(count - len(common[:count]))]
        tables[slot, :count] = torch.tensor(own, dtype=torch.int32)
        for place, block in enumerate(own):
            used = min(block_tokens, length - place * block_tokens)
            shape = (2, kv_heads, used, dim)
            if pool[block, LAYER, 0, 0, used - 1, 0].isnan():
                pool[block, LAYER, :, :, :used] = torch.randn(shape, generator=generator).to(dtype)
    pool = pool.to(device)
    return Blocks(pool[:, LAYER, 0], pool[:, LAYER, 1], tables.to(device))


def attention_of(
    query: Tensor,
    blocks: Blocks,
    slot: int,
    position: int,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The attention of one token, [heads, head_dim] float32 of query [heads, head_dim]."""
    heads, dim = query.shape
    first = 0 if window is None else max(0, position + 1 - window)
    keys, values = (
        part.repeat_interleave(heads // len(part), 0)
        for part in blocks.sequence(slot, first, position + 1)
    )
    scores = (keys @ query.float()[..., None])[..., 0] * (scaling or dim**-0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.softmax(-1)[:, None] @ values)[:, 0]
