"""The KV cache: one pool of blocks for the keys and values of all sequences."""

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from neuroada_serve.engine.block_tables import Changes
from neuroada_serve.engine.triton_attention import runs_on, write_kv_
from neuroada_serve.ops import cpu_attention

# Blocks begin at such a multiple, so that the memory of each can be given back alone.
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class LayerLayout:
    """A layer's part of a token: kv_heads keys of key_dim, and as many values of value_dim."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def size(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class KVLayout:
    """The layers of a model, by their number; all of one dtype."""

    layers: Mapping[int, LayerLayout]
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.size for layer in self.layers.values()) * self.dtype.itemsize


class KVCache:
    """Blocks of `block_tokens` positions, and the table of each slot's blocks.

    All layers of a block lie together, so that a block is copied, and its memory given back, in one
    piece. The pool's address never changes. On the CPU its memory is taken when it is written.

    Args:
        layout: what a token needs.
        num_blocks: their number.
        max_slots, max_tokens: sequences that run at once, and most tokens of one.

    tables: [max_slots, max_blocks] int32; tables[slot, i] is the block of positions
        i * block_tokens and on. Entries beyond a sequence's blocks are valid numbers.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        block_tokens: int,
        max_slots: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self.max_slots = max_slots
        self.layout = layout
        most_blocks = -(-max_tokens // block_tokens)
        self.tables = torch.zeros(max_slots, most_blocks, dtype=torch.int32, device=device)
        self._block_bytes = block_bytes(layout, block_tokens, device)
        self._memory, storage = _allocate(num_blocks * self._block_bytes, device)
        # [num_blocks, elements of a block]
        self._pool = storage.view(layout.dtype).view(num_blocks, -1)
        sizes = [layer.size * block_tokens for layer in layout.layers.values()]
        starts = accumulate(sizes, initial=0)
        self._layers = {
            number: self._views(layer, start)
            for (number, layer), start in zip(layout.layers.items(), starts, strict=False)
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of the pool, in use or not."""
        return self.num_blocks * self._block_bytes

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return K and V of all blocks, [num_blocks, kv_heads, block_tokens, head_dim]; strided
        views of the pool."""
        return self._layers[layer]

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store k and v [tokens, kv_heads, head_dim] of one layer at (slot, position) per token."""
        keys, values = self._layers[layer]
        if runs_on(k) and k.shape == v.shape:
            write_kv_(keys, values, k, v, self.tables, slots, positions)
            return
        if k.shape == v.shape and cpu_attention.fits(k):
            cpu_attention.write_kv_(keys, values, k, v, self.tables, slots, positions)
            return
        blocks = self.tables[slots, positions // self.block_tokens].long()
        within = positions % self.block_tokens
        keys[blocks, :, within] = k
        values[blocks, :, within] = v

    def gather(self, layer: int, slots: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Copy K and V of the first num_tokens positions of some slots, each
        [slots, kv_heads, num_tokens, head_dim]. Beyond a sequence's own tokens they hold
        anything."""
        num_blocks = -(-num_tokens // self.block_tokens)
        blocks = self.tables[slots, :num_blocks].long()
        keys, values = (
            part[blocks].transpose(1, 2).flatten(2, 3)[:, :, :num_tokens]
            for part in self._layers[layer]
        )
        return keys, values

    @torch.inference_mode()
    def change(self, changes: Changes) -> None:
        """Set entries of the tables, and copy blocks. May be repeated after it has failed."""
        for source, target in changes.copies:
            self._pool[target].copy_(self._pool[source])
        if changes.entries:
            # Of two entries of one place the last counts, which a GPU would not promise.
            last = {(slot, place): block for slot, place, block in changes.entries}
            entries = [(slot, place, block) for (slot, place), block in last.items()]
            slots, places, blocks = torch.tensor(entries, device=self.tables.device).unbind(1)
            self.tables[slots, places] = blocks.int()

    def give_back(self, blocks: Iterable[int]) -> None:
        """Give the memory of blocks back to the system, where that is possible; they hold anything
        then."""
        if self._memory is None:
            return
        for first, stop in _stretches(blocks):
            start, size = first * self._block_bytes, (stop - first) * self._block_bytes
            self._memory.madvise(mmap.MADV_DONTNEED, start, size)

    def _views(self, layer: LayerLayout, start: int) -> tuple[Tensor, Tensor]:
        heads, tokens = layer.kv_heads, self.block_tokens
        middle = start + heads * tokens * layer.key_dim
        stop = start + layer.size * tokens
        keys = self._pool[:, start:middle].view(-1, heads, tokens, layer.key_dim)
        values = self._pool[:, middle:stop].view(-1, heads, tokens, layer.value_dim)
        return keys, values


def block_bytes(layout: KVLayout, block_tokens: int, device: torch.device) -> int:
    """Return the bytes of a block, with what separates it from the next."""
    size = layout.bytes_per_token * block_tokens
    return -(-size // _PAGE) * _PAGE if device.type == "cpu" else size


def _allocate(num_bytes: int, device: torch.device) -> tuple[mmap.mmap | None, Tensor]:
    """Allocate bytes; on the CPU as pages that are taken when they are written, if the system has
    such, which come with them.

    Raises:
        MemoryError: the system gives no such stretch.
        torch.OutOfMemoryError: the device has no memory.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_DONTNEED"):
        return None, torch.empty(num_bytes, dtype=torch.uint8, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=flags)
    except OSError as error:
        raise MemoryError(f"the system gives no {num_bytes:,} bytes of addresses") from error
    return memory, torch.frombuffer(memory, dtype=torch.uint8)


def _stretches(numbers: Iterable[int]) -> Iterable[tuple[int, int]]:
    """Yield (first, one behind the last) of each stretch of successive numbers."""
    first = stop = -1
    for number in sorted(numbers):
        if number != stop:
            if stop > first:
                yield first, stop
            first = number
        stop = number + 1
    if stop > first:
        yield first, stop
