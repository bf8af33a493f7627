"""Disk, host, device: who is where, who goes, and that nothing is lost on the way."""

import itertools
import shutil
import threading
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from neuroada_serve.adapters import residency as residency_module
from neuroada_serve.adapters import room as room_module
from neuroada_serve.adapters.format import Adapter, BaseSpec, save_adapter
from neuroada_serve.adapters.host import HostValues
from neuroada_serve.adapters.loaders import Loaders
from neuroada_serve.adapters.reader import AdapterReader
from neuroada_serve.adapters.readiness import Readiness
from neuroada_serve.adapters.residency import Absent, Failed, Resident
from neuroada_serve.adapters.slot_memory import SLOT_BYTES, SlotMemory
from neuroada_serve.adapters.store import AdapterStore, AdapterVersion
from neuroada_serve.adapters.tiers import AdapterTiers
from neuroada_serve.errors import AdapterError, AdapterFormatError, AdapterNotFoundError
from neuroada_serve.wakeup import Wakeup
from tests.support.bank_cases import SIZES, assert_holds, new_adapter
from tests.support.flat import FlatBank

BASE = BaseSpec("base", "0" * 64, SIZES)


class Tiers(AdapterTiers):
    """Tiers over a small bank, with a store in front.

    room: slots of the device memory. host_bytes: of host copies.
    """

    def __init__(self, room: int = 64, host_bytes: int = 1 << 20) -> None:
        self.flat = FlatBank(SIZES, size_bytes=room * SLOT_BYTES)
        self.num_originals = 0
        self.wakeup = Wakeup()
        self.wakeup.wait()  # it has been told to look, whatever there is
        super().__init__(
            self.flat,
            AdapterReader(BASE),
            self.flat.reader,
            self._zeros,
            host_bytes,
            self.wakeup,
        )
        self.store = AdapterStore("base", self.discard)

    @property
    def device_bytes(self) -> tuple[int, int]:
        return self.flat.memory.used_bytes, self.flat.memory.size_bytes

    @property
    def host_bytes(self) -> tuple[int, int]:
        return self.host.used_bytes, self.host.size_bytes

    @property
    def num_resident(self) -> int:
        return self.flat.num_resident

    def _zeros(self, table):
        self.num_originals += 1
        return torch.zeros(table.layout.nnz)

    def add(self, name: str, adapter: Adapter, replace: bool = False) -> AdapterVersion:
        version = AdapterVersion(name, adapter.digest, adapter.nnz, adapter)
        return self.store.add(version, replace=replace)

    def add_file(self, name: str, adapter: Adapter, folder) -> AdapterVersion:
        save_adapter(adapter, folder / name)
        header = AdapterReader(BASE).header(folder / name)
        return self.store.add(AdapterVersion(name, header.digest, header.nnz, header))

    def settle(self, *versions: AdapterVersion) -> list[Readiness]:
        """Ask for versions until none is on its way."""
        deadline = time.monotonic() + 120
        while True:
            states = [self.request(version) for version in versions]
            if Readiness.COMING not in states:
                return states
            assert time.monotonic() < deadline, states
            self.wakeup.wait(0.05)
            self.poll()

    def assert_holds(self, version: AdapterVersion, adapter: Adapter) -> None:
        assert self.hold(version)
        assert_holds(self.flat, self.resident(version), adapter)
        self.release(version)


@pytest.fixture
def new_tiers(monkeypatch):
    made = []

    def new(*args, **kwargs) -> Tiers:
        made.append(Tiers(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(room_module, "FRESH_S", 0.0)
    yield new
    for tiers in made:
        tiers.close()


def test_adapter_comes_up_from_disk_beside_the_engine(new_tiers, tmp_path):
    tiers, adapter = new_tiers(), new_adapter(1)
    version = tiers.add_file("a", adapter, tmp_path)
    assert tiers.tier_of(version) == "disk"
    assert tiers.request(version) is Readiness.COMING
    assert tiers.wakeup.wait(120), "its index is new: the engine's thread is called"
    assert tiers.settle(version) == [Readiness.READY]
    assert tiers.tier_of(version) == "device"
    tiers.assert_holds(version, adapter)
    assert tiers.metrics.num_disk_reads == tiers.num_originals == 1


def test_known_index_needs_no_engine(new_tiers):
    """The engine may be in the middle of a step: nobody polls."""
    tiers = new_tiers()
    tiers.settle(tiers.add("a", new_adapter(1)))
    version = tiers.add("b", new_adapter(2))
    tiers.prefetch(version)
    deadline = time.monotonic() + 120
    while not tiers.is_ready(version):
        assert time.monotonic() < deadline
    assert tiers.num_originals == 1


def test_least_recently_used_goes_and_comes_back_from_the_host(new_tiers, tmp_path):
    tiers = new_tiers(room=4)  # an index and three adapters
    adapters = [new_adapter(seed) for seed in range(5)]
    versions = [tiers.add_file(f"a{i}", a, tmp_path) for i, a in enumerate(adapters)]
    for version in versions[:3]:
        tiers.settle(version)
    tiers.assert_holds(versions[0], adapters[0])  # used: now a1 is the oldest
    tiers.settle(versions[3])
    assert [tiers.tier_of(v) for v in versions] == ["device", "host", "device", "device", "disk"]
    tiers.settle(versions[1])
    tiers.assert_holds(versions[1], adapters[1])
    assert tiers.metrics.num_disk_reads == 4


def test_what_is_held_pinned_or_fresh_stays(new_tiers, monkeypatch):
    tiers = new_tiers(room=4)
    versions = [tiers.add(f"a{i}", new_adapter(i)) for i in range(5)]
    tiers.settle(*versions[:2])
    assert tiers.hold(versions[0])
    tiers.store.pin("a1")
    monkeypatch.setattr(room_module, "FRESH_S", 60.0)
    tiers.settle(versions[2])
    assert tiers.request(versions[3]) is Readiness.NO_ROOM
    assert tiers.hold(versions[2])
    tiers.release(versions[2])  # it has had its turn
    assert tiers.settle(versions[3]) == [Readiness.READY]
    assert [tiers.tier_of(v) for v in versions[:3]] == ["device", "device", "host"]


def test_no_room_is_said_at_once_and_ends_when_somebody_lets_go(new_tiers):
    tiers = new_tiers(room=3)
    a, b, c = (tiers.add(name, new_adapter(i)) for i, name in enumerate("abc"))
    tiers.settle(a, b)
    assert tiers.hold(a)
    assert tiers.hold(b)
    assert tiers.request(c) is Readiness.NO_ROOM
    tiers.release(b)
    assert tiers.settle(c) == [Readiness.READY]


def test_room_that_only_pins_and_the_merged_one_leave_is_told(new_tiers):
    tiers = new_tiers(room=3)
    a, b, c = (tiers.add(name, new_adapter(i)) for i, name in enumerate("abc"))
    tiers.settle(a, b)
    assert tiers.could_fit(c, beside=a)
    tiers.store.pin("b")
    assert not tiers.could_fit(c, beside=a)
    assert tiers.could_fit(c, beside=None)


def test_prefetch_takes_nothing_that_others_wait_for(new_tiers, monkeypatch):
    tiers = new_tiers(room=3)
    a, b, c = (tiers.add(name, new_adapter(i)) for i, name in enumerate("abc"))
    tiers.settle(a, b)
    assert tiers.hold(a)
    assert tiers.hold(b)
    monkeypatch.setattr(room_module, "FRESH_S", 60.0)
    assert tiers.request(c) is Readiness.NO_ROOM
    tiers.release(b)
    tiers.prefetch(tiers.add("d", new_adapter(3)))
    assert tiers.tier_of(b) == "device"
    assert tiers.settle(c) == [Readiness.READY]


def test_budgets_are_never_exceeded(new_tiers):
    tiers = new_tiers(room=20, host_bytes=2000)
    for seed in range(60):
        version = tiers.add(f"a{seed}", new_adapter(seed, (1, 2, 8, 20)[seed % 4], seed % 3))
        assert tiers.settle(version) == [Readiness.READY]
        assert tiers.device_bytes[0] <= 20 * SLOT_BYTES
        assert tiers.host_bytes[0] <= 2000
    assert tiers.metrics.num_host_evictions > 0


def test_index_of_its_own_finds_room_too(new_tiers):
    """Values fit at once, the index only once others have gone for it."""
    tiers = new_tiers(room=12)
    versions = [tiers.add(f"a{i}", new_adapter(i)) for i in range(11)]
    tiers.settle(*versions)
    other, adapter = new_adapter(99, k=8, index_seed=1), new_adapter(99, k=8, index_seed=1)
    version = tiers.add("other", other)  # 3 slots of values and 3 of columns
    assert tiers.settle(version) == [Readiness.READY]
    tiers.assert_holds(version, adapter)


def test_holes_are_closed_where_only_together_they_are_large_enough(new_tiers):
    tiers = new_tiers(room=20)
    small = [tiers.add(f"a{i}", new_adapter(i)) for i in range(19)]
    tiers.settle(*small)
    for version in small[::2]:
        assert tiers.hold(version)  # every other slot is to stay
    large = tiers.add("large", new_adapter(50, k=20, modules=("a.up",)))
    deadline = time.monotonic() + 120
    while tiers.request(large) is not Readiness.READY:
        assert time.monotonic() < deadline
        tiers.poll()
    assert tiers.metrics.num_compactions > 0
    for i, version in enumerate(small[::2]):
        assert_holds(tiers.flat, tiers.resident(version), new_adapter(2 * i))
        tiers.release(version)


def test_too_large_for_the_device_is_refused_with_the_flag(new_tiers):
    tiers = new_tiers(room=4)
    with pytest.raises(AdapterError, match="'a' needs .* raise --adapter-memory"):
        tiers.check_size(2000, "a")
    tiers.check_size(20, "a")


# --- going -----------------------------------------------------------------------------------


def test_unloading_frees_device_and_host(new_tiers):
    """vLLM's unload leaves the weights where they are until they are pushed out (#54839)."""
    tiers = new_tiers()
    tiers.settle(tiers.add("keep", new_adapter(0)))
    before = tiers.device_bytes, tiers.host_bytes, tiers.num_resident
    version = tiers.add("a", new_adapter(1))
    tiers.settle(version)
    tiers.store.remove("a")
    assert (tiers.device_bytes, tiers.host_bytes, tiers.num_resident) == before
    assert tiers.request(tiers.store.get("keep")) is Readiness.READY


def test_version_that_goes_on_its_way_leaves_nothing(new_tiers, monkeypatch):
    tiers = new_tiers()
    tiers.settle(tiers.add("keep", new_adapter(0)))
    before = tiers.device_bytes, tiers.host_bytes, tiers.num_resident
    reading, go_on = threading.Event(), threading.Event()
    real = Loaders._fill

    def write(self, *args):
        reading.set()
        assert go_on.wait(120)
        real(self, *args)

    monkeypatch.setattr(Loaders, "_fill", write)
    version = tiers.add("a", new_adapter(1))
    tiers.prefetch(version)
    assert reading.wait(120)
    tiers.store.remove("a")
    go_on.set()
    tiers.close()
    assert (tiers.device_bytes, tiers.host_bytes, tiers.num_resident) == before
    tiers.prefetch(version)  # too late
    assert isinstance(tiers.residency[version], Absent)


def test_version_that_goes_while_it_is_fetched_leaves_nothing(new_tiers, monkeypatch):
    tiers = new_tiers()
    version = tiers.add("a", new_adapter(1))
    real = HostValues.read

    def read(host, version):
        values = real(host, version)
        tiers.store.remove("a")
        return values

    monkeypatch.setattr(HostValues, "read", read)
    assert tiers.fetch(version) is Readiness.NO_ROOM
    assert (tiers.num_resident, tiers.host_bytes[0], list(tiers.residency)) == (0, 0, [])
    assert not tiers._room.versions
    while tiers.flat.evict_plane():
        pass
    assert tiers.device_bytes[0] == 0


def test_loaded_adapters_outlive_their_files(new_tiers, tmp_path):
    """vLLM #5105: an LRU reload that found no file killed the engine (T24)."""
    tiers = new_tiers(room=3, host_bytes=0)
    a, b = (tiers.add_file(n, new_adapter(i), tmp_path) for i, n in enumerate("ab"))
    tiers.settle(a)
    shutil.rmtree(tmp_path / "a")
    tiers.assert_holds(a, new_adapter(0))
    assert tiers.settle(b, tiers.add("c", new_adapter(2))) == [Readiness.READY] * 2
    assert tiers.settle(a) == [Readiness.FAILED]
    assert "cannot be used now: adapter 'a' has no" in str(tiers.error(a)) or "no adapter" in str(
        tiers.error(a)
    )
    assert tiers.settle(b) == [Readiness.READY]


def test_failure_is_kept_for_a_moment_and_then_tried_again(new_tiers, tmp_path, monkeypatch):
    tiers = new_tiers(host_bytes=0)
    version = tiers.add_file("a", new_adapter(1), tmp_path)
    (tmp_path / "a").rename(tmp_path / "away")
    assert tiers.settle(version) == [Readiness.FAILED]
    (tmp_path / "away").rename(tmp_path / "a")
    assert tiers.settle(version) == [Readiness.FAILED]
    assert tiers.metrics.num_failures == 1
    monkeypatch.setattr(residency_module, "RETRY_S", 0.0)
    assert tiers.settle(version) == [Readiness.READY]


def test_values_that_break_a_rule_fail_when_they_are_first_read(new_tiers, tmp_path):
    tiers, adapter = new_tiers(), new_adapter(1)
    adapter.modules["a.q"].bypass[0, 0] = float("nan")
    version = tiers.add_file("a", adapter, tmp_path)
    assert tiers.settle(version) == [Readiness.FAILED]
    assert "a.q.bypass has NaN" in str(tiers.error(version))
    with pytest.raises(AdapterFormatError):
        tiers.host.read(version)
    assert tiers.device_bytes[0] == 0


def test_unforeseen_failure_is_logged_and_not_told(new_tiers, monkeypatch, caplog):
    tiers = new_tiers()

    def explode(self, *args):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(Loaders, "_fill", explode)
    version = tiers.add("a", new_adapter(1))
    assert tiers.settle(version) == [Readiness.FAILED]
    assert "secret" not in str(tiers.error(version))
    assert "a secret of the server" in caplog.text
    monkeypatch.undo()
    used = tiers.device_bytes[0]
    assert used == SLOT_BYTES  # its index alone


@pytest.mark.parametrize("kth", range(1, 8))
def test_allocation_that_fails_leaves_the_budget_as_it_was(new_tiers, monkeypatch, kth):
    """T25, with an allocator that says no at its k-th call."""
    tiers = new_tiers()
    kept = tiers.add("keep", new_adapter(0))
    tiers.settle(kept)
    assert tiers.hold(kept)
    before = tiers.device_bytes
    calls = itertools.count(1)
    real = SlotMemory.take
    monkeypatch.setattr(SlotMemory, "take", lambda s, n: None if next(calls) == kth else real(s, n))
    version = tiers.add("a", new_adapter(1, k=8, index_seed=1))
    deadline = time.monotonic() + 120
    while tiers.request(version) is not Readiness.READY:
        assert time.monotonic() < deadline
        tiers.poll()
    tiers.store.remove("a")
    while tiers.flat.evict_plane():
        pass
    assert tiers.device_bytes == before


# --- in this thread --------------------------------------------------------------------------


def test_fetch_needs_nobody_else(new_tiers, tmp_path):
    tiers, adapter = new_tiers(), new_adapter(1)
    version = tiers.add_file("a", adapter, tmp_path)
    assert tiers.fetch(version) is Readiness.READY
    tiers.assert_holds(version, adapter)
    assert tiers.fetch(version) is Readiness.READY
    assert tiers.metrics.num_uploads == 1


def test_fetch_raises_what_is_wrong(new_tiers, tmp_path):
    tiers = new_tiers()
    version = tiers.add_file("a", new_adapter(1), tmp_path)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(AdapterNotFoundError):
        tiers.fetch(version)
    assert tiers.device_bytes[0] == 0


def test_fetch_says_where_there_is_no_room(new_tiers):
    tiers = new_tiers(room=2)
    a, b = tiers.add("a", new_adapter(0)), tiers.add("b", new_adapter(1))
    tiers.fetch(a)
    assert tiers.hold(a)
    assert tiers.fetch(b) is Readiness.NO_ROOM


def test_mix_is_made_of_its_parts_and_cached(new_tiers, tmp_path):
    tiers = new_tiers()
    parts = [new_adapter(1), new_adapter(2, k=8), new_adapter(3, index_seed=1)]
    for name, adapter in zip("abc", parts, strict=True):
        tiers.add_file(name, adapter, tmp_path)
    lease = tiers.store.acquire("a:0.5+b:2+c:-1")
    assert tiers.settle(lease.version) == [Readiness.READY]
    assert lease.version.nnz <= sum(adapter.nnz for adapter in parts)
    reads = tiers.metrics.num_disk_reads
    assert reads == 3
    again = tiers.store.acquire("a:0.5+b:2+c:-1")
    assert tiers.settle(again.version) == [Readiness.READY]
    assert (tiers.metrics.num_disk_reads, tiers.metrics.num_uploads) == (reads, 1)


def test_values_to_be_merged_are_read_beside_the_engine(new_tiers, tmp_path):
    tiers, adapter = new_tiers(host_bytes=0), new_adapter(1)
    version = tiers.add_file("a", adapter, tmp_path)
    deadline = time.monotonic() + 120
    while (values := tiers.host.request(version)) is None:
        assert time.monotonic() < deadline
    assert torch.equal(values.values, tiers.flat.reader.of(adapter).values)


# --- any order -------------------------------------------------------------------------------


class TiersMachine(RuleBasedStateMachine):
    """T4: load, replace, unload, pin, acquire, hold, let go, fail: in any order, on little room.

    Loads run in this thread, so that a failing order can be told and repeated; with loader threads
    the chaos tests do the same.
    """

    names = st.sampled_from(["a", "b", "c", "d", "e"])

    def __init__(self):
        super().__init__()
        room_module.FRESH_S = 0.0
        residency_module.RETRY_S = 0.0
        self.tiers = Tiers(room=14, host_bytes=700)
        self.adapters = {}  # version -> Adapter
        self.leases = []  # (lease, whether it holds)
        self.seeds = itertools.count()
        self.fails = False
        real = self.tiers._loaders._fill

        def write(*args):
            if self.fails:
                raise AdapterError("it failed")
            real(*args)

        self.tiers._loaders._fill = write

    @rule(name=names, k=st.sampled_from([1, 2, 8]), index_seed=st.integers(0, 1))
    def load_or_replace(self, name, k, index_seed):
        adapter = new_adapter(next(self.seeds), k, index_seed)
        self.adapters[self.tiers.add(name, adapter, replace=True)] = adapter

    @rule(name=names)
    def unload(self, name):
        if name in self.tiers.store:
            self.tiers.store.remove(name, wait=False)

    @rule(name=names, pinned=st.booleans())
    def pin(self, name, pinned):
        num_pinned = sum(v.is_pinned for v in self.tiers.store.versions)
        if name in self.tiers.store and (not pinned or num_pinned == 0):
            self.tiers.store.pin(name, pinned)

    @rule(name=names)
    def acquire(self, name):
        if name in self.tiers.store:
            self.leases.append([self.tiers.store.acquire(name), False])

    @rule(fails=st.booleans())
    def fault(self, fails):
        self.fails = fails

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def run(self, data):
        held = data.draw(st.sampled_from(self.leases))
        if held[1]:
            return
        try:
            state = self.tiers.fetch(held[0].version)
        except AdapterError:
            assert self.fails
            return
        if state is Readiness.READY:
            assert self.tiers.hold(held[0].version)
            held[1] = True

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def finish(self, data):
        held = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        if held[1]:
            self.tiers.release(held[0].version)
        held[0].release()

    @rule()
    def poll(self):
        self.tiers.poll()

    @invariant()
    def what_is_held_is_there_with_its_own_values(self):
        for lease, holds in self.leases:
            assert lease.version.num_leases > 0
            if holds:
                resident = self.tiers.resident(lease.version)
                assert_holds(self.tiers.flat, resident, self.adapters[lease.version])

    @invariant()
    def memory_is_accounted_for(self):
        tiers = self.tiers
        used, size = tiers.device_bytes
        values = sum(
            tiers.flat.memory.values_bytes(version.nnz)
            for version in tiers.residency
            if tiers.is_ready(version)
        )
        assert used == values + tiers.flat.index_bytes <= size
        assert tiers.host_bytes[0] <= tiers.host_bytes[1]
        at_rest = Absent | Resident | Failed
        assert all(isinstance(tiers.residency[version], at_rest) for version in tiers.residency)

    @invariant()
    def nothing_is_kept_of_what_has_gone(self):
        alive = {*self.tiers.store.versions, *(lease.version for lease, _ in self.leases)}
        assert {*self.tiers.residency, *self.tiers._room.versions} <= alive

    def teardown(self):
        for lease, holds in self.leases:
            if holds:
                self.tiers.release(lease.version)
            lease.release()
        for name in self.tiers.store.names:
            self.tiers.store.remove(name)
        assert self.tiers.num_resident == 0
        assert self.tiers.host_bytes[0] == 0
        room_module.FRESH_S, residency_module.RETRY_S = 0.5, 1.0


class TestTiers(TiersMachine.TestCase):
    settings = settings(max_examples=120, stateful_step_count=50, deadline=None, derandomize=True)


@pytest.mark.slow
class TestTiersForLong(TiersMachine.TestCase):
    settings = settings(max_examples=1000, stateful_step_count=50, deadline=None, derandomize=True)
