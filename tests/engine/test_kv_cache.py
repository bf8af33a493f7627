"""The KV cache: what is written is read through the tables, and memory is taken and given back."""

import mmap
from array import array
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from neuroada_serve.engine.block_tables import Changes
from neuroada_serve.engine.kv_cache import KVCache, KVLayout, LayerLayout, block_bytes

CPU = torch.device("cpu")
SIZE = 16  # tokens of a block
UNEVEN = {0: LayerLayout(2, 8, 8), 3: LayerLayout(1, 16, 4), 5: LayerLayout(4, 8, 24)}


def new_cache(
    layers: dict[int, LayerLayout] | None = None,
    num_blocks: int = 8,
    dtype: torch.dtype = torch.float32,
    size: int = SIZE,
) -> KVCache:
    layout = KVLayout(UNEVEN if layers is None else layers, dtype)
    cache = KVCache(layout, num_blocks, size, max_slots=3, max_tokens=4 * size, device=CPU)
    for layer in layout.layers:
        for part in cache.layer(layer):
            part.fill_(float("nan"))  # cells that no token has written may hold anything
    return cache


def place(cache: KVCache, **blocks: list[int]) -> None:
    """Set the tables: place(cache, s0=[4, 2]) gives slot 0 the blocks 4 and 2."""
    entries = [
        (int(slot[1:]), at, number)
        for slot, numbers in blocks.items()
        for at, number in enumerate(numbers)
    ]
    cache.change(Changes(entries=entries))


def random_kv(cache: KVCache, layer: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = cache.layout.layers[layer]
    dtype = cache.layout.dtype
    return (
        torch.randn(num_tokens, shape.kv_heads, shape.key_dim).to(dtype),
        torch.randn(num_tokens, shape.kv_heads, shape.value_dim).to(dtype),
    )


def write(cache: KVCache, slot: int, first: int, num: int) -> dict[int, tuple]:
    """Write tokens of one slot in all layers; return them."""
    written = {}
    for layer in cache.layout.layers:
        written[layer] = k, v = random_kv(cache, layer, num)
        cache.write(layer, k, v, torch.full((num,), slot), torch.arange(first, first + num))
    return written


def read(cache: KVCache, slot: int, num: int) -> dict[int, tuple]:
    """Return the first tokens of one slot in all layers."""
    found = {}
    for layer in cache.layout.layers:
        parts = cache.gather(layer, torch.tensor([slot]), num)
        found[layer] = tuple(part[0].transpose(0, 1) for part in parts)
    return found


def assert_same(found: dict[int, tuple], written: dict[int, tuple]) -> None:
    for layer, pair in written.items():
        for one, other in zip(found[layer], pair, strict=True):
            assert torch.equal(one, other)


# --- cells -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE + 5])
def test_what_is_written_is_read_through_the_table(num_tokens, dtype):
    cache = new_cache(dtype=dtype)
    place(cache, s1=[5, 0, 7, 2])
    written = write(cache, 1, 0, num_tokens)
    assert_same(read(cache, 1, num_tokens), written)


def test_token_is_in_the_cell_that_the_table_names():
    cache = new_cache()
    place(cache, s2=[6, 3])
    written = write(cache, 2, SIZE + 5, 1)
    for layer, pair in written.items():
        for part, token in zip(cache.layer(layer), pair, strict=True):
            assert torch.equal(part[3, :, 5], token[0])
            assert part.isnan().sum() == part.numel() - token.numel(), "no other cell"


def test_tokens_of_several_slots_are_written_at_once():
    cache = new_cache()
    place(cache, s0=[1], s2=[4, 0])
    k, v = random_kv(cache, 3, 4)
    slots, positions = torch.tensor([2, 0, 2, 0]), torch.tensor([SIZE, 0, 3, 1])
    cache.write(3, k, v, slots, positions)
    keys, values = cache.gather(3, torch.tensor([2, 0]), SIZE + 1)
    for part, token in ((keys, k), (values, v)):
        assert torch.equal(part[0, :, SIZE], token[0])
        assert torch.equal(part[0, :, 3], token[2])
        assert torch.equal(part[1, :, 0], token[1])
        assert torch.equal(part[1, :, 1], token[3])


def test_slots_that_name_one_block_read_the_same():
    cache = new_cache()
    place(cache, s0=[1, 2], s1=[1, 3])
    common = write(cache, 0, 0, SIZE)
    own = [write(cache, slot, SIZE, 2) for slot in (0, 1)]
    for slot in (0, 1):
        assert_same(read(cache, slot, SIZE), common)
        for layer, pair in read(cache, slot, SIZE + 2).items():
            assert torch.equal(pair[0][SIZE:], own[slot][layer][0])


def test_parts_of_layers_do_not_overlap():
    cache = new_cache(num_blocks=3)
    parts = [part for layer in UNEVEN for part in cache.layer(layer)]
    for number, part in enumerate(parts):
        part.fill_(number)
    for number, part in enumerate(parts):
        assert (part == number).all()
    assert [tuple(part.shape[1:]) for part in parts[2:4]] == [(1, SIZE, 16), (1, SIZE, 4)]


def test_keys_and_values_have_the_strides_that_kernels_expect():
    cache = new_cache()
    for layer, shape in UNEVEN.items():
        keys, values = cache.layer(layer)
        assert keys.stride()[1:] == (SIZE * shape.key_dim, shape.key_dim, 1)
        assert values.stride()[1:] == (SIZE * shape.value_dim, shape.value_dim, 1)
        assert keys.stride(0) == values.stride(0) == cache.layer(0)[0].stride(0)


# --- changes ---------------------------------------------------------------------------------


def test_copied_block_holds_the_same_in_all_layers_and_is_its_own():
    cache = new_cache()
    place(cache, s0=[1], s1=[2])
    written = write(cache, 0, 0, 5)
    cache.change(Changes(copies=[(1, 2)]))
    assert_same(read(cache, 1, 5), written)
    write(cache, 1, 5, 2)
    write(cache, 1, 0, 1)
    assert_same(read(cache, 0, 5), written)
    assert cache.layer(0)[0][1, :, 5:].isnan().all()


def test_copies_are_made_in_order_and_may_be_made_again():
    cache = new_cache()
    place(cache, s0=[1], s1=[2], s2=[3])
    written = write(cache, 0, 0, 3)
    for _ in range(2):
        cache.change(Changes(copies=[(1, 2), (2, 3)]))
        assert_same(read(cache, 2, 3), written)


def test_of_two_blocks_for_one_place_the_last_counts():
    cache = new_cache()
    cache.change(Changes(entries=[(1, 0, 4), (1, 1, 2), (1, 0, 6)]))
    assert cache.tables[1, :2].tolist() == [6, 2]


def test_nothing_moves():
    cache = new_cache()
    places = [part.data_ptr() for layer in UNEVEN for part in cache.layer(layer)]
    tables = cache.tables.data_ptr()
    place(cache, s0=[1, 2, 3, 4])
    write(cache, 0, 0, 4 * SIZE)
    cache.give_back([0, 5])
    assert [part.data_ptr() for layer in UNEVEN for part in cache.layer(layer)] == places
    assert cache.tables.data_ptr() == tables


def test_tables_hold_all_blocks_of_the_longest_sequence():
    layout = KVLayout(UNEVEN, torch.float32)
    cache = KVCache(layout, 8, SIZE, max_slots=3, max_tokens=2 * SIZE + 1, device=CPU)
    assert cache.tables.shape == (3, 3)
    assert cache.tables.dtype == torch.int32
    assert ((cache.tables >= 0) & (cache.tables < 8)).all(), "also where nothing was set"


# --- memory ----------------------------------------------------------------------------------

LARGE = {0: LayerLayout(8, 128, 128)}  # 128 KiB a block of 16 in float32
PAGES = Path("/proc/self/pagemap")


def resident_bytes(cache: KVCache) -> int:
    """Bytes of the pool for which the system holds memory."""
    first = cache.layer(0)[0].data_ptr() // mmap.PAGESIZE
    num = cache.num_bytes // mmap.PAGESIZE
    with PAGES.open("rb") as file:
        file.seek(8 * first)
        entries = array("Q", file.read(8 * num))
    return sum(entry >> 63 for entry in entries) * mmap.PAGESIZE  # the bit says that it is there


def large_cache(num_blocks: int = 64) -> KVCache:
    layout = KVLayout(LARGE, torch.float32)
    return KVCache(layout, num_blocks, SIZE, max_slots=1, max_tokens=64 * SIZE, device=CPU)


@pytest.mark.skipif(not PAGES.exists(), reason="the system does not tell")
def test_memory_is_taken_when_it_is_written_and_given_back():
    cache = large_cache()
    size = cache.num_bytes // 64
    assert resident_bytes(cache) == 0
    place(cache, s0=list(range(64)))
    write(cache, 0, 0, 16 * SIZE)
    assert resident_bytes(cache) == 16 * size
    cache.give_back([3, 4, 9])
    assert resident_bytes(cache) == 13 * size
    cache.give_back(range(64))
    assert resident_bytes(cache) == 0
    written = write(cache, 0, 0, 3 * SIZE)
    assert_same(read(cache, 0, 3 * SIZE), written)
    assert resident_bytes(cache) == 3 * size


@pytest.mark.parametrize("given", [[2], [0, 1], [7, 1, 2, 5], []])
def test_memory_of_other_blocks_stays_as_it_is(given):
    cache = new_cache()
    for block in range(8):
        for layer in UNEVEN:
            for part in cache.layer(layer):
                part[block] = block + 1
    cache.give_back(given)
    for block in set(range(8)) - set(given):
        for layer in UNEVEN:
            for part in cache.layer(layer):
                assert (part[block] == block + 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [UNEVEN, LARGE, {0: LayerLayout(1, 8, 8)}])
def test_blocks_begin_at_pages(layers, dtype):
    cache = new_cache(layers, dtype=dtype)
    keys, _ = cache.layer(0)
    begins = [keys[block].data_ptr() for block in range(cache.num_blocks)]
    assert all(begin % mmap.PAGESIZE == 0 for begin in begins)
    (size,) = {after - before for before, after in pairwise(begins)}
    assert size == block_bytes(cache.layout, SIZE, CPU) == cache.num_bytes // cache.num_blocks
    needed = cache.layout.bytes_per_token * SIZE
    assert needed <= size < needed + mmap.PAGESIZE


def test_blocks_of_a_device_have_nothing_between_them():
    layout = KVLayout({0: LayerLayout(1, 8, 8)}, torch.bfloat16)
    assert block_bytes(layout, 16, torch.device("cuda")) == 16 * layout.bytes_per_token == 512


def test_tokens_need_what_their_layers_say():
    layout = KVLayout(UNEVEN, torch.bfloat16)
    assert layout.bytes_per_token == 2 * (2 * 16 + 20 + 4 * 32)


def test_stretch_of_addresses_that_the_system_refuses_is_a_memory_error():
    layout = KVLayout(LARGE, torch.float32)
    with pytest.raises(MemoryError, match="the system gives no .* bytes of addresses"):
        KVCache(layout, 1 << 40, SIZE, max_slots=1, max_tokens=SIZE, device=CPU)
