"""Keys and values of the running sequences, by slot."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroada_serve.engine.triton_attention import runs_on, write_kv_

_FIRST_TOKENS = 128
_COARSE_SLOTS, _COARSE_TOKENS = 16, 1024


class KVCache:
    """Per layer K and V [slots, kv_heads, tokens, head_dim]; slots and tokens grow by need.

    All slots share one length, so that neighbouring slots are one strided view. Entries never
    written are zero: masked attention multiplies them by zero, and 0 * NaN would be NaN.

    Args:
        max_slots, max_tokens: never more than these.
        coarse: grow in large steps and keep the memory, because CUDA graphs read it.
    """

    def __init__(self, max_slots: int, max_tokens: int, coarse: bool = False) -> None:
        self._max_slots = max_slots
        self._max_tokens = max_tokens
        self._coarse = coarse
        self.version = 0  # counts the times that memory was replaced or freed
        self._slots = 0
        self._tokens = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._known: dict[int, Tensor] = {}  # a layer -> keys of no token

    @property
    def max_slots(self) -> int:
        return self._max_slots

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        """Make room for num_slots sequences of num_tokens; grows to at least twice what it was."""
        if num_slots <= self._slots and num_tokens <= self._tokens:
            return
        self.version += 1
        if self._coarse:
            num_slots = min(self._max_slots, -(-num_slots // _COARSE_SLOTS) * _COARSE_SLOTS)
            num_tokens = min(self._max_tokens, -(-num_tokens // _COARSE_TOKENS) * _COARSE_TOKENS)
        if num_slots > self._slots:
            self._slots = min(self._max_slots, max(num_slots, 2 * self._slots))
        if num_tokens > self._tokens:
            grown = max(num_tokens, 2 * self._tokens, _FIRST_TOKENS)
            self._tokens = min(self._max_tokens, grown)
        assert num_slots <= self._slots
        assert num_tokens <= self._tokens
        for i, pair in self._layers.items():  # one by one, so that both sizes never meet in full
            self._layers[i] = self._grown(pair)
        for i, like in self._known.items():
            if i not in self._layers:
                self._layers[i] = (self._new(like), self._new(like))

    def release(self) -> None:
        """Give all memory back, unless graphs read it; only while no sequence runs."""
        if not self._coarse:
            self._layers, self._slots, self._tokens = {}, 0, 0
            self.version += 1

    def add_layer(self, layer: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Have a layer's memory, on the CPU, from the first `reserve` on, not the first `write`."""
        self._known[layer] = torch.empty(0, kv_heads, head_dim, dtype=dtype)

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store k and v [tokens, kv_heads, head_dim] of one layer at (slot, position) per token."""
        if layer not in self._layers:
            self._layers[layer] = (self._new(k), self._new(v))
            self._known[layer] = k[:0]
        keys, values = self._layers[layer]
        if runs_on(k):
            write_kv_(keys, values, k, v, slots, positions)
            return
        keys[slots, :, positions] = k
        values[slots, :, positions] = v

    def view(self, layer: int, first: int, stop: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """K and V of slots first..stop-1, their first num_tokens tokens; no copy."""
        keys, values = self._layers[layer]
        return keys[first:stop, :, :num_tokens], values[first:stop, :, :num_tokens]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of all slots, as they lie in memory."""
        return self._layers[layer]

    def layers(self) -> Iterable[tuple[int, tuple[Tensor, Tensor]]]:
        """The same of every layer, with its number."""
        return self._layers.items()

    @property
    def bytes_per_token(self) -> int:
        """Of all layers; 0 before the first `write`."""
        pairs = [pair for pair in self._layers.values()]
        return sum(t.shape[1] * t.shape[3] * t.element_size() for pair in pairs for t in pair)

    def scrub(self, used: Mapping[int, int]) -> None:
        """Zero everything beyond the first used[slot] entries of each slot.

        Needed once non-finite entries may have been written: masking does not stop them.
        """
        for pair in self._layers.values():
            for tensor in pair:
                for slot in range(tensor.shape[0]):
                    tensor[slot, :, used.get(slot, 0) :] = 0

    def _new(self, like: Tensor) -> Tensor:
        _, heads, dim = like.shape
        return like.new_zeros(self._slots, heads, self._tokens, dim)

    def _grown(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        more_slots = self._slots - pair[0].shape[0]
        more_tokens = self._tokens - pair[0].shape[2]
        if not more_slots and not more_tokens:
            return pair
        padding = (0, 0, 0, more_tokens, 0, 0, 0, more_slots)
        return F.pad(pair[0], padding), F.pad(pair[1], padding)


class KVBlocks:
    """Copies of parts of a KV cache: per layer K and V [num_blocks, kv_heads, tokens, head_dim].

    Args:
        cache: what is copied from and to; it has its layers by the first `keep`.
        num_blocks, block_tokens: how many, and of how many tokens.
    """

    def __init__(self, cache: KVCache, num_blocks: int, block_tokens: int) -> None:
        self._cache = cache
        self._num_blocks = num_blocks
        self._tokens = block_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def keep(self, slot: int, blocks: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (place in the slot, number) out of a slot of the cache."""
        if not blocks:
            return
        places, numbers = zip(*blocks, strict=True)
        first, stop = places[0], places[-1] + 1
        assert places == tuple(range(first, stop))
        for layer, pair in self._cache.layers():
            if layer not in self._layers:
                self._layers[layer] = (self._new(pair[0]), self._new(pair[1]))
            to = torch.tensor(numbers, device=pair[0].device)
            for kept, source in zip(self._layers[layer], pair, strict=True):
                part = source[slot, :, first * self._tokens : stop * self._tokens]
                kept[to] = part.view(len(part), -1, self._tokens, part.shape[-1]).transpose(0, 1)

    @torch.inference_mode()
    def restore(self, slot: int, numbers: Sequence[int]) -> None:
        """Copy blocks to the beginning of a slot, which has room for them."""
        for layer, pair in self._cache.layers():
            source = torch.tensor(numbers, device=pair[0].device)
            for kept, target in zip(self._layers[layer], pair, strict=True):
                part = target[slot, :, : len(numbers) * self._tokens]
                blocks = part.view(len(part), -1, self._tokens, part.shape[-1])
                blocks.copy_(kept[source].transpose(0, 1))

    def _new(self, like: Tensor) -> Tensor:
        _, heads, _, dim = like.shape
        return like.new_empty(self._num_blocks, heads, self._tokens, dim)
