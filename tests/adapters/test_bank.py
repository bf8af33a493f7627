"""The device side: one memory for all adapters, each index in it once."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from neuroada_serve.adapters.slot_memory import SLOT_BYTES
from tests.support.bank_cases import SIZES, assert_holds, new_adapter
from tests.support.flat import FlatBank


def new_bank(num_slots: int = 512) -> FlatBank:
    return FlatBank(SIZES, size_bytes=num_slots * SLOT_BYTES)


def test_adapters_of_one_base_share_their_index():
    bank = new_bank()
    residents = [(bank.upload(new_adapter(0)), new_adapter(0))]
    index_bytes = bank.index_bytes
    assert index_bytes == SLOT_BYTES  # 20 columns of 4 bytes
    residents += [(bank.upload(new_adapter(s)), new_adapter(s)) for s in range(1, 20)]
    assert bank.index_bytes == index_bytes
    assert bank.num_resident == 20
    for resident, adapter in residents:
        assert_holds(bank, resident, adapter)


def test_an_adapter_takes_its_values_and_no_more():
    """Any k, any modules, any index: rounded up to 128 bytes, no padding to a largest."""
    bank = new_bank()
    for k, modules in itertools.product((1, 2, 8, 20), (("a.q",), ("a.up",), tuple(SIZES))):
        bank.upload(new_adapter(k=k, modules=modules))
        before = bank.memory.used_bytes
        adapter = new_adapter(seed=1, k=k, modules=modules)
        assert_holds(bank, bank.upload(adapter), adapter)
        assert bank.memory.used_bytes - before == -(-4 * adapter.nnz // SLOT_BYTES) * SLOT_BYTES


def test_adapters_of_any_k_index_and_modules_lie_side_by_side():
    bank = new_bank()
    kinds = itertools.product((1, 2, 5, 20), range(2), (("a.up",), tuple(SIZES)))
    adapters = [new_adapter(seed, *kind) for seed, kind in enumerate(kinds)]
    residents = [bank.upload(adapter) for adapter in adapters]
    for resident, adapter in zip(residents, adapters, strict=True):
        assert_holds(bank, resident, adapter)


def test_memory_never_moves_while_adapters_come_and_go():
    bank = new_bank()
    first = bank.upload(new_adapter(0))
    version = bank.memory.version
    residents = [bank.upload(new_adapter(seed, k=1 + seed % 5)) for seed in range(1, 30)]
    for resident in residents[::2]:
        bank.release(resident)
    assert bank.memory.version == version
    assert_holds(bank, first, new_adapter(0))


def test_freed_room_is_used_again():
    bank = new_bank()
    residents = [bank.upload(new_adapter(seed)) for seed in range(4)]
    bank.release(residents[1])
    assert bank.num_resident == 3
    resident = bank.upload(new_adapter(9))
    assert resident.slot == residents[1].slot
    assert_holds(bank, resident, new_adapter(9))
    assert_holds(bank, residents[3], new_adapter(3))


def test_index_stays_for_the_next_adapter_until_its_room_is_wanted():
    bank = new_bank()
    bank.release(bank.upload(new_adapter(0)))
    assert bank.index_bytes == SLOT_BYTES
    assert bank.evict_plane()
    assert (bank.index_bytes, bank.memory.used_bytes) == (0, 0)
    assert not bank.evict_plane()


def test_index_in_use_or_about_to_be_is_not_evicted():
    bank = new_bank()
    resident = bank.upload(new_adapter(0))
    assert not bank.evict_plane()
    room = bank.memory.take(SLOT_BYTES)
    coming = bank.settle(room, resident.plane)  # its values are on their way
    bank.release(resident)
    assert not bank.evict_plane()
    bank.release(coming)
    assert bank.evict_plane()


def test_freeing_twice_is_refused():
    bank = new_bank()
    resident, _ = bank.upload(new_adapter(0)), bank.upload(new_adapter(1))
    bank.release(resident)
    with pytest.raises(KeyError):
        bank.release(resident)


def test_full_bank_says_so():
    bank = new_bank(num_slots=3)
    bank.upload(new_adapter(0))  # its index and its values
    assert bank.memory.take(SLOT_BYTES) is not None
    assert bank.memory.take(1) is None
    assert bank.add_plane(bank.reader.of(new_adapter(index_seed=1)).table) is None


def test_room_reserved_for_more_is_given_back():
    bank = new_bank()
    plane = bank.upload(new_adapter(0)).plane
    before = bank.memory.used_bytes
    extent = bank.memory.take(20 * SLOT_BYTES)
    bank.settle(extent, plane)
    assert bank.memory.used_bytes - before == bank.memory.values_bytes(plane.nnz)


def test_compaction_joins_what_is_free_and_keeps_what_is_there():
    bank = new_bank(num_slots=40)
    adapters = [new_adapter(seed, k=1 + seed % 4, index_seed=seed % 2) for seed in range(9)]
    residents = [bank.upload(adapter) for adapter in adapters]
    for resident in residents[::2]:
        bank.release(resident)
    free = bank.memory.free_bytes
    assert bank.memory.take(free) is None
    version = bank.memory.version
    bank.memory.compact()
    assert bank.memory.version > version
    for resident, adapter in list(zip(residents, adapters, strict=True))[1::2]:
        assert_holds(bank, resident, adapter)
    assert bank.memory.take(free) is not None


def test_batch_gives_each_plane_the_slots_of_its_own_tokens():
    bank = new_bank()
    a, b = bank.upload(new_adapter(0)), bank.upload(new_adapter(1))
    c = bank.upload(new_adapter(2, k=5))
    calls = bank.plan([a, None, c, b, c], None).calls("a.q")
    assert [slots.slots for _, slots in calls] == [
        (a.slot, -1, -1, b.slot, -1),
        (-1, -1, c.slot, -1, c.slot),
    ]
    assert all(slots.merged_slot is None for _, slots in calls)


def test_batch_takes_the_merged_adapter_out_for_all_others():
    bank = new_bank()
    a, c = bank.upload(new_adapter(0)), bank.upload(new_adapter(2, k=5))
    # The merged one's plane comes first in every batch.
    (_, of_a), (_, of_c) = bank.plan([None, c, a], merged=a).calls("a.q")
    assert (of_c.slots, of_c.merged_slot) == ((-1, c.slot, -1), None)
    assert (of_a.slots, of_a.merged_slot) == ((-1, -1, a.slot), a.slot)


def test_batch_without_work_calls_nothing():
    bank = new_bank()
    a = bank.upload(new_adapter(0))
    assert bank.plan([None, None], None).calls("a.q") == []
    assert bank.plan([a, a], merged=a).calls("a.q") == []
    assert bank.plan([a], None).calls("another.module") == []


class BankMachine(RuleBasedStateMachine):
    """Any order of uploads, frees and compactions: every resident adapter keeps its own values."""

    def __init__(self):
        super().__init__()
        self.bank = new_bank(num_slots=4096)
        self.resident = []
        self.seeds = itertools.count()

    @rule(k=st.integers(1, 5), index_seed=st.integers(0, 2), fewer=st.booleans())
    def upload(self, k, index_seed, fewer):
        modules = ("a.up",) if fewer else tuple(SIZES)
        adapter = new_adapter(next(self.seeds), k, index_seed, modules)
        self.resident.append((self.bank.upload(adapter), adapter))

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def free(self, data):
        place = data.draw(st.integers(0, len(self.resident) - 1))
        resident, _ = self.resident.pop(place)
        self.bank.release(resident)

    @rule()
    def evict_planes(self):
        while self.bank.evict_plane():
            pass
        assert self.resident or self.bank.memory.used_bytes == 0

    @rule()
    def compact(self):
        self.bank.memory.compact()
        assert self.bank.memory.take(self.bank.memory.free_bytes + 1) is None
        extent = self.bank.memory.take(self.bank.memory.free_bytes)
        self.bank.memory.release(extent)

    @invariant()
    def every_resident_adapter_holds_its_own_values(self):
        assert self.bank.num_resident == len(self.resident)
        for resident, adapter in self.resident:
            assert_holds(self.bank, resident, adapter)


TestBank = BankMachine.TestCase
TestBank.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, derandomize=True
)
