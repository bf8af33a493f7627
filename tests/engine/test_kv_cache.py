"""The pool of blocks: where tokens lie, what copies take along, and memory that is given back."""

import mmap
from array import array
from pathlib import Path

import pytest
import torch

from neuroada_serve.engine.block_tables import Changes
from neuroada_serve.engine.kv_cache import KVCache, KVLayout, LayerLayout

CPU = torch.device("cpu")
# Keys and values of different sizes, as some models have them; a layer without a number has none.
LAYERS = {0: LayerLayout(2, 8, 8), 2: LayerLayout(1, 16, 4)}
TOKENS = 16  # of a block


def new_cache(num_blocks: int = 6, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(KVLayout(LAYERS, dtype), num_blocks, TOKENS, 3, 4 * TOKENS, CPU)


def tokens_of(layer: int, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values of one layer."""
    sizes = LAYERS[layer]
    k = torch.randn(num, sizes.kv_heads, sizes.key_dim)
    return k, torch.randn(num, sizes.kv_heads, sizes.value_dim)


def write(cache: KVCache, slot: int, num: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Write the first tokens of a sequence to all layers."""
    slots, positions = torch.full((num,), slot), torch.arange(num)
    written = {layer: tokens_of(layer, num) for layer in LAYERS}
    for layer, (k, v) in written.items():
        cache.write(layer, k, v, slots, positions)
    return written


def check(cache: KVCache, slot: int, written: dict) -> None:
    for layer, parts in written.items():
        found = cache.gather(layer, torch.tensor([slot]), len(parts[0]))
        for part, expected in zip(found, parts, strict=True):
            assert torch.equal(part[0].transpose(0, 1), expected)


def test_tokens_are_found_by_slot_and_position_in_whatever_blocks_they_lie():
    cache = new_cache()
    cache.change(Changes(entries=[(1, 0, 5), (1, 1, 0), (1, 2, 3), (2, 0, 4), (2, 1, 1)]))
    one, two = write(cache, 1, 2 * TOKENS + 3), write(cache, 2, TOKENS + 1)
    check(cache, 1, one)
    check(cache, 2, two)


def test_a_block_is_one_piece_of_the_pool_in_all_layers():
    cache = new_cache()
    (keys, values), (other_keys, _) = cache.layer(0), cache.layer(2)
    assert keys.shape == values.shape == (6, 2, TOKENS, 8)
    assert other_keys.shape == (6, 1, TOKENS, 16)
    strides = {part.stride(0) for part in (keys, values, other_keys)}
    assert strides == {cache.num_bytes // 6 // keys.itemsize}
    assert keys.stride()[1:] == (TOKENS * 8, 8, 1)


def test_copied_block_has_the_tokens_of_all_layers():
    cache = new_cache()
    cache.change(Changes(entries=[(0, 0, 2)]))
    written = write(cache, 0, TOKENS)
    cache.change(Changes(entries=[(1, 0, 4)], copies=[(2, 4)]))
    check(cache, 1, written)
    write(cache, 1, 3)
    check(cache, 0, written)


def test_changes_may_be_made_twice():
    cache = new_cache()
    cache.change(Changes(entries=[(0, 0, 2)]))
    written = write(cache, 0, TOKENS)
    for _ in range(2):
        cache.change(Changes(entries=[(1, 0, 4)], copies=[(2, 4)]))
    check(cache, 1, written)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="asks the system for its pages")
def test_memory_is_taken_when_blocks_are_written_and_given_back():
    cache = KVCache(KVLayout({0: LayerLayout(8, 64, 64)}, torch.float32), 64, TOKENS, 1, 320, CPU)

    def in_memory() -> list[int]:
        """Those of the first 20 blocks that have all their pages in memory."""
        num_pages = cache.num_bytes // 64 // mmap.PAGESIZE  # of a block
        with Path("/proc/self/pagemap").open("rb") as file:
            file.seek(cache.layer(0)[0].data_ptr() // mmap.PAGESIZE * 8)
            pages = array("Q", file.read(20 * num_pages * 8))
        parts = [pages[at * num_pages : (at + 1) * num_pages] for at in range(20)]
        return [at for at, part in enumerate(parts) if all(page >> 63 for page in part)]

    k = torch.ones(20 * TOKENS, 8, 64)
    cache.change(Changes(entries=[(0, at, at) for at in range(20)]))
    assert in_memory() == []
    cache.write(0, k, k, torch.zeros(len(k), dtype=torch.int64), torch.arange(len(k)))
    assert in_memory() == [*range(20)]
    cache.give_back([*range(3, 8), 10, 19])
    assert in_memory() == [0, 1, 2, 8, 9, *range(11, 19)]
    found, _ = cache.gather(0, torch.tensor([0]), 3 * TOKENS)
    assert bool((found == 1).all()), "what is in use stays"
