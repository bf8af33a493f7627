"""Adapter life: leases, versions and names; and their values on the device."""

import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from neuroada_serve.adapters.bank import AdapterBank, ResidentAdapter
from neuroada_serve.adapters.format import Adapter, AdapterConfig, ModuleBypass, make_adapter
from neuroada_serve.adapters.store import AdapterStore, AdapterVersion, VersionState
from neuroada_serve.errors import AdapterConflictError, AdapterNotFoundError

CPU = torch.device("cpu")
SIZES = {"a.q": (6, 20), "a.up": (4, 30)}  # d_out, d_in


def new_adapter(seed: int = 0, k: int = 2, index_seed: int = 0, modules=tuple(SIZES)) -> Adapter:
    """Adapters of one index_seed share their index; a smaller k takes its beginning."""
    parts = {}
    for name in modules:
        d_out, d_in = SIZES[name]
        columns = torch.Generator().manual_seed(index_seed)
        index = torch.rand(d_out, d_in, generator=columns).argsort(1)[:, :k].int()
        values = torch.randn(d_out, k, generator=torch.Generator().manual_seed(seed))
        parts[name] = ModuleBypass(index, values)
    return make_adapter(AdapterConfig("base", "0" * 64, k, tuple(modules)), parts)


def upload(bank: AdapterBank, adapter: Adapter) -> ResidentAdapter:
    return bank.upload(adapter, {name: part.bypass for name, part in adapter.modules.items()})


def assert_holds(bank: AdapterBank, resident: ResidentAdapter, adapter: Adapter) -> None:
    """A batch of one token with this adapter sees its very columns and values."""
    batch = bank.batch([resident], None)
    for name in SIZES:
        calls = batch.calls(name)
        assert len(calls) == (name in adapter.modules)
        for part, token_slots in calls:
            assert torch.equal(part.table.index, adapter.modules[name].index)
            assert torch.equal(
                part.table.bypass[token_slots.slots[0]], adapter.modules[name].bypass
            )


# --- store -----------------------------------------------------------------------------------


class Versions:
    """A store, and every version that has gone from it."""

    def __init__(self) -> None:
        self.gone: list[AdapterVersion] = []
        self.store = AdapterStore(self.gone.append)

    def publish(self, name: str, replace: bool = False) -> AdapterVersion:
        version = AdapterVersion(name, ADAPTER, ResidentAdapter(None, 0))
        self.store.publish(version, replace)
        return version


ADAPTER = new_adapter()


def test_unknown_name_lists_the_known_ones():
    versions = Versions()
    with pytest.raises(AdapterNotFoundError, match="'x'; adapters here: none is loaded"):
        versions.store.get("x")
    versions.publish("b")
    versions.publish("a")
    for action in (versions.store.get, versions.store.acquire, versions.store.remove):
        with pytest.raises(AdapterNotFoundError, match="'x'; adapters here: a, b"):
            action("x")


def test_taken_name_is_a_conflict_and_changes_nothing():
    versions = Versions()
    first = versions.publish("a")
    with pytest.raises(AdapterConflictError, match="'a' is already loaded"):
        versions.publish("a")
    assert versions.store.get("a") is first
    assert versions.gone == []


def test_version_without_leases_goes_with_its_name():
    versions = Versions()
    first = versions.publish("a")
    second = versions.publish("a", replace=True)
    assert first.state is VersionState.GONE
    versions.store.remove("a")
    assert second.state is VersionState.GONE
    assert versions.gone == [first, second]
    assert versions.store.names == ()


def test_leased_version_drains_and_goes_with_its_last_lease():
    versions = Versions()
    version = versions.publish("a")
    leases = [versions.store.acquire("a") for _ in range(3)]
    versions.store.remove("a")
    for lease in leases:
        assert version.state is VersionState.DRAINING
        assert versions.gone == []
        lease.release()
    assert version.state is VersionState.GONE
    assert versions.gone == [version]


def test_lease_is_released_once_however_often_it_is_called():
    versions = Versions()
    version = versions.publish("a")
    first, second = versions.store.acquire("a"), versions.store.acquire("a")
    for _ in range(5):
        first.release()
    assert version.num_leases == 1
    versions.store.remove("a")
    assert version.state is VersionState.DRAINING
    second.release()
    second.release()
    assert versions.gone == [version]


def test_lease_keeps_the_version_it_was_given():
    versions = Versions()
    old = versions.publish("a")
    lease = versions.store.acquire("a")
    new = versions.publish("a", replace=True)
    assert lease.version is old
    assert versions.store.acquire("a").version is new
    assert old.state is VersionState.DRAINING


def test_lease_release_leaves_a_named_version_ready():
    versions = Versions()
    version = versions.publish("a")
    versions.store.acquire("a").release()
    assert version.state is VersionState.READY
    assert versions.gone == []


class StoreMachine(RuleBasedStateMachine):
    """Any order of calls, beside a store of lists: no lease is lost, no version goes too soon."""

    leases = Bundle("leases")
    names = st.sampled_from(["a", "b", "c"])

    def __init__(self):
        super().__init__()
        self.versions = Versions()
        self.named = {}
        self.held = []  # (lease, version)
        self.all = []

    @rule(name=names, replace=st.booleans())
    def publish(self, name, replace):
        if name in self.named and not replace:
            with pytest.raises(AdapterConflictError):
                self.versions.publish(name)
        else:
            self.named[name] = self.versions.publish(name, replace)
            self.all.append(self.named[name])

    @rule(name=names)
    def remove(self, name):
        if name in self.named:
            self.versions.store.remove(name)
            del self.named[name]
        else:
            with pytest.raises(AdapterNotFoundError):
                self.versions.store.remove(name)

    @rule(target=leases, name=names)
    def acquire(self, name):
        if name not in self.named:
            with pytest.raises(AdapterNotFoundError):
                self.versions.store.acquire(name)
            return multiple()
        lease = self.versions.store.acquire(name)
        assert lease.version is self.named[name]
        self.held.append((lease, lease.version))
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease):
        lease.release()
        self.held = [held for held in self.held if held[0] is not lease]

    @rule(lease=leases)
    def release_twice(self, lease):
        lease.release()
        lease.release()
        self.held = [held for held in self.held if held[0] is not lease]

    @invariant()
    def names_are_those_published(self):
        assert set(self.versions.store.names) == set(self.named)
        for name, version in self.named.items():
            assert self.versions.store.get(name) is version

    @invariant()
    def states_follow_names_and_leases(self):
        for version in self.all:
            leases = sum(held is version for _, held in self.held)
            assert version.num_leases == leases
            if version in self.named.values():
                assert version.state is VersionState.READY
            else:
                assert version.state is (VersionState.DRAINING if leases else VersionState.GONE)

    @invariant()
    def a_version_goes_once(self):
        gone = [version for version in self.all if version.state is VersionState.GONE]
        assert len(self.versions.gone) == len(gone)
        assert set(self.versions.gone) == set(gone)


# --- bank ------------------------------------------------------------------------------------


def test_adapters_of_one_base_share_their_index():
    bank = AdapterBank(CPU)
    residents = [(upload(bank, new_adapter(0)), new_adapter(0))]
    index_bytes = bank.index_bytes
    assert index_bytes == 4 * 2 * (6 + 4)
    residents += [(upload(bank, new_adapter(s)), new_adapter(s)) for s in range(1, 20)]
    assert bank.index_bytes == index_bytes
    assert bank.num_resident == 20
    for resident, adapter in residents:
        assert_holds(bank, resident, adapter)


@pytest.mark.parametrize("ks", list(itertools.permutations([1, 8, 3])))
def test_smaller_k_reads_the_table_of_larger_k_in_any_order(ks):
    bank = AdapterBank(CPU)
    adapters = [new_adapter(seed=k, k=k) for k in ks]
    residents = [upload(bank, adapter) for adapter in adapters]
    assert bank.index_bytes == 4 * 8 * (6 + 4)
    for resident, adapter in zip(residents, adapters, strict=True):
        assert_holds(bank, resident, adapter)


def test_other_index_gets_tables_of_its_own():
    bank = AdapterBank(CPU)
    adapters = [new_adapter(seed=s, index_seed=s % 3, k=1 + s % 4) for s in range(12)]
    residents = [upload(bank, adapter) for adapter in adapters]
    for resident, adapter in zip(residents, adapters, strict=True):
        assert_holds(bank, resident, adapter)


def test_index_shared_by_some_modules_is_kept_once():
    bank = AdapterBank(CPU)
    upload(bank, new_adapter())
    index_bytes = bank.index_bytes
    fewer = new_adapter(seed=1, modules=("a.up",))
    assert_holds(bank, upload(bank, fewer), fewer)
    assert bank.index_bytes == index_bytes


def test_plane_grows_and_keeps_its_values():
    bank = AdapterBank(CPU)
    residents = []
    for seed in range(40):
        residents.append((upload(bank, new_adapter(seed)), new_adapter(seed)))
        for resident, adapter in residents:
            assert_holds(bank, resident, adapter)


def test_evicted_slot_is_used_again():
    bank = AdapterBank(CPU)
    residents = [upload(bank, new_adapter(seed)) for seed in range(4)]
    bank.evict(residents[1])
    assert bank.num_resident == 3
    again = new_adapter(9)
    resident = upload(bank, again)
    assert resident.slot == residents[1].slot
    assert_holds(bank, resident, again)
    assert_holds(bank, residents[3], new_adapter(3))


def test_evicting_the_last_adapter_frees_its_tables():
    bank = AdapterBank(CPU)
    one, two, other = (upload(bank, new_adapter(s, index_seed=s // 2)) for s in range(3))
    both = bank.index_bytes
    bank.evict(one)
    assert bank.index_bytes == both
    bank.evict(two)
    assert bank.index_bytes == both // 2
    assert_holds(bank, other, new_adapter(2, index_seed=1))
    bank.evict(other)
    assert (bank.index_bytes, bank.num_resident) == (0, 0)


def test_table_stays_for_the_smaller_k_when_the_larger_goes():
    bank = AdapterBank(CPU)
    small, large = new_adapter(0, k=1), new_adapter(1, k=8)
    resident, evicted = upload(bank, small), upload(bank, large)
    bank.evict(evicted)
    assert_holds(bank, resident, small)


def test_evicting_twice_is_refused():
    bank = AdapterBank(CPU)
    resident, _ = upload(bank, new_adapter(0)), upload(bank, new_adapter(1))
    bank.evict(resident)
    with pytest.raises(KeyError):
        bank.evict(resident)


def test_batch_gives_each_plane_the_slots_of_its_own_tokens():
    bank = AdapterBank(CPU)
    a, b = upload(bank, new_adapter(0)), upload(bank, new_adapter(1))
    c = upload(bank, new_adapter(2, k=5))
    calls = bank.batch([a, None, c, b, c], None).calls("a.q")
    assert [slots.slots for _, slots in calls] == [
        (a.slot, -1, -1, b.slot, -1),
        (-1, -1, c.slot, -1, c.slot),
    ]
    assert all(slots.merged_slot is None for _, slots in calls)


def test_batch_takes_the_merged_adapter_out_for_all_others():
    bank = AdapterBank(CPU)
    a, c = upload(bank, new_adapter(0)), upload(bank, new_adapter(2, k=5))
    (_, of_c), (_, of_a) = bank.batch([None, c, a], merged=a).calls("a.q")
    assert (of_c.slots, of_c.merged_slot) == ((-1, c.slot, -1), None)
    assert (of_a.slots, of_a.merged_slot) == ((-1, -1, a.slot), a.slot)


def test_batch_without_work_calls_nothing():
    bank = AdapterBank(CPU)
    a = upload(bank, new_adapter(0))
    assert bank.batch([None, None], None).calls("a.q") == []
    assert bank.batch([a, a], merged=a).calls("a.q") == []
    assert bank.batch([a], None).calls("another.module") == []


class BankMachine(RuleBasedStateMachine):
    """Any order of uploads and evictions: every resident adapter keeps its own values."""

    def __init__(self):
        super().__init__()
        self.bank = AdapterBank(CPU)
        self.resident = []
        self.seeds = itertools.count()

    @rule(k=st.integers(1, 5), index_seed=st.integers(0, 2), fewer=st.booleans())
    def upload(self, k, index_seed, fewer):
        modules = ("a.up",) if fewer else tuple(SIZES)
        adapter = new_adapter(next(self.seeds), k, index_seed, modules)
        self.resident.append((upload(self.bank, adapter), adapter))

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def evict(self, data):
        place = data.draw(st.integers(0, len(self.resident) - 1))
        resident, _ = self.resident.pop(place)
        self.bank.evict(resident)

    @invariant()
    def every_resident_adapter_holds_its_own_values(self):
        assert self.bank.num_resident == len(self.resident)
        for resident, adapter in self.resident:
            assert_holds(self.bank, resident, adapter)

    @invariant()
    def nothing_is_kept_for_nobody(self):
        assert self.resident or self.bank.index_bytes == 0


_QUICK = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
TestStore = StoreMachine.TestCase
TestStore.settings = _QUICK
TestBank = BankMachine.TestCase
TestBank.settings = settings(_QUICK, max_examples=30)
