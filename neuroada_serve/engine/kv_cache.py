"""The KV cache: keys and values of the running sequences, by slot."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from neuroada_serve.engine.triton_attention import runs_on, write_kv_

_FIRST_TOKENS = 128
_COARSE_SLOTS, _COARSE_TOKENS = 16, 1024


class CacheMemoryError(MemoryError):
    """Raised when there is no memory for a larger KV cache; the cache is as it was before."""


class KVCache:
    """Keys and values per layer, [slots, kv_heads, tokens, head_dim]; slots and tokens grow by
    need.

    All slots share one length, so that neighbouring slots are one strided view. Entries never
    written are zero: masked attention multiplies them by zero, and 0 * NaN would be NaN. Sizes are
    noted once every layer has its memory.

    Args:
        max_slots, max_tokens: never more than these.
        coarse: grow in large steps and keep the memory, because CUDA graphs read it.
    """

    def __init__(self, max_slots: int, max_tokens: int, coarse: bool = False) -> None:
        self._max_slots = max_slots
        self._max_tokens = max_tokens
        self._coarse = coarse
        self.is_tainted = False  # entries of a failed sequence may be non-finite
        self.version = 0  # counts the times that memory was replaced or freed
        self._slots = 0
        self._tokens = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._known: dict[int, Tensor] = {}  # a layer -> keys of no token

    @property
    def max_slots(self) -> int:
        return self._max_slots

    def holds(self, slot: int, num_tokens: int) -> bool:
        """Return whether a sequence of num_tokens in this slot has room as it is."""
        return slot < self._slots and num_tokens <= self._tokens

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        """Make room for num_slots sequences of num_tokens; grows to at least twice what it was.

        Raises:
            CacheMemoryError: there is no memory for that; all is as before.
        """
        if num_slots <= self._slots and num_tokens <= self._tokens:
            return
        if self._coarse:
            num_slots = min(self._max_slots, -(-num_slots // _COARSE_SLOTS) * _COARSE_SLOTS)
            num_tokens = min(self._max_tokens, -(-num_tokens // _COARSE_TOKENS) * _COARSE_TOKENS)
        slots, tokens = self._slots, self._tokens
        if num_slots > slots:
            slots = min(self._max_slots, max(num_slots, 2 * slots))
        if num_tokens > tokens:
            tokens = min(self._max_tokens, max(num_tokens, 2 * tokens, _FIRST_TOKENS))
        assert num_slots <= slots
        assert num_tokens <= tokens
        self.version += 1  # whoever knows where the memory was looks again, whatever comes
        before = dict(self._shapes())
        try:
            # One by one, so that both sizes never meet in full. A layer that is larger than noted
            # does no harm.
            for i in {**self._layers, **self._known}:
                self._resize(i, slots, tokens)
        except (MemoryError, RuntimeError) as error:
            self._undo(before)
            raise CacheMemoryError(
                f"there is no memory for a KV cache of {slots} x {tokens} tokens"
                f"{self._in_megabytes(slots * tokens)}; it has {self._slots} x {self._tokens}"
            ) from error
        self._slots, self._tokens = slots, tokens

    def release(self) -> None:
        """Release all memory, unless graphs read it; only while no sequence runs."""
        if not self._coarse and (self._layers or self._slots):
            self._clear()

    def add_layer(self, layer: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Give a layer its memory, on the CPU, at the next `reserve` instead of its first
        `write`."""
        self._known[layer] = torch.empty(0, kv_heads, head_dim, dtype=dtype)

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store k and v [tokens, kv_heads, head_dim] of one layer at (slot, position) per token."""
        if layer not in self._layers:
            try:
                self._layers[layer] = (self._new(k), self._new(v))
            except Exception:
                self._clear()  # the model's first forward: there is nothing yet to be kept
                raise
            self._known[layer] = k.new_empty(0, *k.shape[1:])  # a view would keep the step's keys
        keys, values = self._layers[layer]
        if runs_on(k):
            write_kv_(keys, values, k, v, slots, positions)
            return
        keys[slots, :, positions] = k
        values[slots, :, positions] = v

    def view(self, layer: int, first: int, stop: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return K and V of slots first..stop-1, their first num_tokens tokens; no copy."""
        keys, values = self._layers[layer]
        return keys[first:stop, :, :num_tokens], values[first:stop, :, :num_tokens]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return K and V of all slots, as they lie in memory."""
        return self._layers[layer]

    def layers(self) -> Iterable[tuple[int, tuple[Tensor, Tensor]]]:
        """Return number, K and V of every layer, as they lie in memory."""
        return self._layers.items()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token in all layers; 0 before the first `write`."""
        return _bytes_per_token(pair[0] for pair in self._layers.values())

    def taint(self) -> None:
        """Have the cache scrubbed before the next step: masking does not stop non-finite
        entries."""
        self.is_tainted = True

    @torch.inference_mode()
    def scrub(self, used: Mapping[int, int]) -> None:
        """Zero everything beyond the first used[slot] entries of each slot."""
        for pair in self._layers.values():
            for tensor in pair:
                for slot in range(tensor.shape[0]):
                    tensor[slot, :, used.get(slot, 0) :] = 0
        self.is_tainted = False

    def _new(self, like: Tensor) -> Tensor:
        _, heads, dim = like.shape
        return _zeros((self._slots, heads, self._tokens, dim), like)

    def _shapes(self) -> Iterable[tuple[int, tuple[int, int]]]:
        for i, (keys, _) in self._layers.items():
            yield i, (keys.shape[0], keys.shape[2])

    def _resize(self, layer: int, slots: int, tokens: int) -> None:
        """Reallocate a layer's memory in this size; it keeps what it holds."""
        old = self._layers.get(layer)
        if old is None:
            _, heads, dim = (like := self._known[layer]).shape
            shape = (slots, heads, tokens, dim)
            self._layers[layer] = (_zeros(shape, like), _zeros(shape, like))
        elif (old[0].shape[0], old[0].shape[2]) != (slots, tokens):
            self._layers[layer] = (_resized(old[0], slots, tokens), _resized(old[1], slots, tokens))

    def _undo(self, before: Mapping[int, tuple[int, int]]) -> None:
        """Release the memory that layers got since they had these shapes."""
        for i in set(self._layers) - set(before):
            del self._layers[i]
        for i, shape in before.items():
            with suppress(Exception):  # without memory for the smaller one, it stays larger
                self._resize(i, *shape)

    def _clear(self) -> None:
        self._layers, self._slots, self._tokens = {}, 0, 0
        self.version += 1

    def _in_megabytes(self, num_tokens: int) -> str:
        size = _bytes_per_token(self._known.values()) if self._known else 0
        return f" ({num_tokens * size / 1e6:,.0f} MB)" if size else ""


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    return like.new_zeros(shape)


def _resized(tensor: Tensor, slots: int, tokens: int) -> Tensor:
    num_slots, heads, num_tokens, dim = tensor.shape
    new = _zeros((slots, heads, tokens, dim), tensor)
    kept = min(slots, num_slots), min(tokens, num_tokens)
    new[: kept[0], :, : kept[1]] = tensor[: kept[0], :, : kept[1]]
    return new


def _bytes_per_token(keys: Iterable[Tensor]) -> int:
    """Bytes of a token's K and V, for keys [..., kv_heads, head_dim] or [slots, kv_heads, tokens,
    head_dim]."""
    return sum(2 * t.shape[1] * t.shape[-1] * t.element_size() for t in keys)


class KVBlocks:
    """Copies of parts of a KV cache: per layer K and V [num_blocks, kv_heads, tokens, head_dim].

    Args:
        cache: what is copied from and to; it has its layers.
        num_blocks, block_tokens: how many, and of how many tokens.

    Their memory is there from the beginning, or there are no blocks at all.
    """

    def __init__(self, cache: KVCache, num_blocks: int, block_tokens: int) -> None:
        self._cache = cache
        self._num_blocks = num_blocks
        self._tokens = block_tokens
        self._layers = {i: (self._new(k), self._new(v)) for i, (k, v) in cache.layers()}

    @torch.inference_mode()
    def keep(self, slot: int, blocks: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (place in the slot, number) out of a slot of the cache."""
        if not blocks:
            return
        places, numbers = zip(*blocks, strict=True)
        first, stop = places[0], places[-1] + 1
        assert places == tuple(range(first, stop))
        for layer, pair in self._cache.layers():
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
