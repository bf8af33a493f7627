"""Adapter life: names, versions, leases, mixes; from many threads at once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from neuroada_serve.adapters.store import (
    AdapterStore,
    AdapterVersion,
    VersionState,
    mix_name,
    parse_mix,
)
from neuroada_serve.errors import (
    AdapterConflictError,
    AdapterError,
    AdapterFormatError,
    AdapterInUseError,
    AdapterNotFoundError,
)


class Versions:
    """A store, and every version that has gone from it."""

    def __init__(self) -> None:
        self.gone: list[AdapterVersion] = []
        self.store = AdapterStore("base", self.gone.append)

    def add(self, name: str, digest: str = "d1", replace: bool = False, **options):
        return self.store.add(new_version(name, digest), replace=replace, **options)


def new_version(name: str, digest: str = "d1", nnz: int = 10) -> AdapterVersion:
    return AdapterVersion(name, digest, nnz, source=None)


@pytest.fixture
def versions() -> Versions:
    return Versions()


# --- names -----------------------------------------------------------------------------------


def test_unknown_name_lists_the_known_ones(versions):
    with pytest.raises(AdapterNotFoundError, match="'x'; adapters here: none is loaded"):
        versions.store.get("x")
    versions.add("b")
    versions.add("a")
    for action in (versions.store.get, versions.store.acquire, versions.store.remove):
        with pytest.raises(AdapterNotFoundError, match="'x'; adapters here: a, b"):
            action("x")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a b", "a+b", "a:1", "x" * 64, "a\n"])
def test_name_that_could_be_a_path_or_a_mix_is_refused(versions, name):
    with pytest.raises(AdapterError, match="is not allowed"):
        versions.add(name)


def test_base_models_name_is_taken(versions):
    with pytest.raises(AdapterConflictError, match="'base' is the base model's name"):
        versions.add("base", replace=True)


def test_taken_name_is_a_conflict_and_changes_nothing(versions):
    first = versions.add("a")
    with pytest.raises(AdapterConflictError, match="'a' is already loaded"):
        versions.add("a", "d2")
    assert versions.store.get("a") is first
    assert versions.gone == []


def test_same_digest_again_is_the_same_version(versions):
    first = versions.add("a")
    for replace in (False, True):
        assert versions.add("a", replace=replace) is first
    assert versions.store.get("a") is first
    assert versions.gone == []


def test_version_is_no_ones_before_it_is_prepared(versions):
    def prepare(version):
        assert version.state is VersionState.LOADING
        assert "a" not in versions.store
        assert versions.store.names == ()
        assert versions.store.versions == (version,)

    version = versions.add("a", prepare=prepare)
    assert version.state is VersionState.READY
    assert versions.store.names == ("a",)


def test_failed_replace_leaves_the_old_one_serving(versions):
    def fail(version):
        raise AdapterFormatError("'a'", ["broken"])

    first = versions.add("a")
    with pytest.raises(AdapterFormatError):
        versions.add("a", "d2", replace=True, prepare=fail)
    assert versions.store.get("a") is first
    assert first.state is VersionState.READY
    assert [v.digest for v in versions.gone] == ["d2"]


def test_old_version_serves_while_the_new_one_is_read(versions):
    seen = []
    first = versions.add("a")
    versions.add("a", "d2", True, prepare=lambda new: seen.append(versions.store.get("a")))
    assert seen == [first]
    assert versions.store.get("a").digest == "d2"


def test_replacement_is_pinned_as_the_old_one_was(versions):
    versions.add("a")
    versions.store.pin("a")
    assert versions.add("a", "d2", replace=True).is_pinned
    assert not versions.add("b").is_pinned


# --- leases ----------------------------------------------------------------------------------


def test_version_without_leases_goes_with_its_name(versions):
    first = versions.add("a")
    second = versions.add("a", "d2", replace=True)
    assert first.state is VersionState.GONE
    versions.store.remove("a")
    assert second.state is VersionState.GONE
    assert versions.gone == [first, second]
    assert versions.store.names == ()


def test_leased_version_drains_and_goes_with_its_last_lease(versions):
    version = versions.add("a")
    leases = [versions.store.acquire("a") for _ in range(3)]
    versions.store.remove("a", wait=False)
    for lease in leases:
        assert version.state is VersionState.DRAINING
        assert versions.gone == []
        lease.release()
    assert version.state is VersionState.GONE
    assert versions.gone == [version]


def test_lease_is_released_once_however_often_it_is_called(versions):
    version = versions.add("a")
    first, second = versions.store.acquire("a"), versions.store.acquire("a")
    for _ in range(5):
        first.release()
    assert version.num_leases == 1
    versions.store.remove("a", wait=False)
    second.release()
    second.release()
    assert versions.gone == [version]


def test_lease_and_what_is_shared_of_it_keep_their_version(versions):
    old = versions.add("a")
    lease = versions.store.acquire("a")
    new = versions.add("a", "d2", replace=True)
    shared = lease.share()
    assert lease.version is shared.version is old
    assert versions.store.acquire("a").version is new
    lease.release()
    assert old.state is VersionState.DRAINING
    shared.release()
    assert old.state is VersionState.GONE


def test_version_that_has_gone_cannot_be_leased(versions):
    version = versions.add("a")
    versions.store.lease_of(version).release()
    versions.store.remove("a")
    assert versions.store.lease_of(version) is None


# --- unloading -------------------------------------------------------------------------------


def test_removal_waits_for_leases_and_takes_no_new_ones(versions):
    versions.add("a")
    lease = versions.store.acquire("a")
    with ThreadPoolExecutor() as pool:
        removal = pool.submit(versions.store.remove, "a", 10.0)
        while "a" in versions.store:
            time.sleep(0.001)
        with pytest.raises(AdapterNotFoundError):
            versions.store.acquire("a")
        assert not removal.done()
        lease.release()
        assert removal.result(120).state is VersionState.GONE


def test_removal_gives_up_with_the_count_and_the_adapter_serves_on(versions):
    version = versions.add("a")
    leases = [versions.store.acquire("a") for _ in range(2)]
    with pytest.raises(AdapterInUseError, match="in use by 2 requests") as raised:
        versions.store.remove("a", timeout_s=0.02)
    assert raised.value.num_leases == 2
    assert versions.store.get("a") is version
    assert versions.gone == []
    for lease in leases:
        lease.release()
    assert version.state is VersionState.READY


def test_removal_can_have_the_requests_aborted(versions):
    versions.add("a")
    lease = versions.store.acquire("a")
    aborted = []

    def abort(version):
        aborted.append(version)
        lease.release()

    assert versions.store.remove("a", 0.01, abort).state is VersionState.GONE
    assert aborted == versions.gone


def test_change_of_one_name_never_waits_for_another(versions):
    started, go_on = threading.Event(), threading.Event()

    def slow(version):
        started.set()
        assert go_on.wait(120)

    with ThreadPoolExecutor() as pool:
        loading = pool.submit(versions.add, "slow", prepare=slow)
        assert started.wait(120)
        versions.add("b")
        versions.store.acquire("b").release()
        versions.store.remove("b")
        assert not loading.done()
        go_on.set()
        loading.result(120)
    assert versions.store.names == ("slow",)


def test_many_loads_of_one_file_under_one_name_read_it_once(versions):
    reads = []

    def read(version):
        reads.append(version)
        time.sleep(0.02)

    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda i: versions.add("a", prepare=read), range(8)))
    assert len(reads) == 1
    assert len({id(version) for version in loaded}) == 1
    assert not versions.store._in_change._locks


def test_32_threads_of_load_and_unload_leave_nothing(versions):
    """Triton's L0_lifecycle figure (T22), on one name, with traffic beside it."""
    stop = threading.Event()

    def churn(thread: int) -> None:
        for i in range(128):
            if (thread + i) % 2:
                versions.add("a", f"d{thread}-{i}", replace=True)
            else:
                try:
                    versions.store.remove("a", 1.0)
                except AdapterNotFoundError:
                    continue

    def serve() -> int:
        served = 0
        while not stop.is_set():
            try:
                lease = versions.store.acquire("a")
            except AdapterNotFoundError:
                continue
            assert lease.version.state is not VersionState.GONE
            lease.release()
            served += 1
        return served

    with ThreadPoolExecutor(36) as pool:
        traffic = [pool.submit(serve) for _ in range(4)]
        for churning in [pool.submit(churn, thread) for thread in range(32)]:
            churning.result(120)
        stop.set()
        assert sum(t.result(120) for t in traffic) > 0
    for name in versions.store.names:
        versions.store.remove(name)
    assert len(versions.gone) == len(set(versions.gone))
    assert all(v.state is VersionState.GONE and not v.num_leases for v in versions.gone)


# --- mixes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("sql", None),
        ("sql:0.7+json:0.3", {"sql": 0.7, "json": 0.3}),
        ("sql+json", {"sql": 1.0, "json": 1.0}),
        ("sql:-1e-1", {"sql": -0.1}),
    ],
)
def test_mixes_are_read(name, weights):
    assert parse_mix(name) == weights


@pytest.mark.parametrize(
    "name",
    ["a:", "a:b", "a:0", "a:nan", "a:inf", "a:101", "+", "a+", "a:1:2", "a+a", "a/b:1", ":1"],
)
def test_what_is_no_mix_is_refused_with_an_example(name):
    with pytest.raises(AdapterError, match=r"sql:0.7\+json:0.3|twice"):
        parse_mix(name)


def test_mixes_are_short():
    with pytest.raises(AdapterError, match="9 adapters in one mix, at most 8"):
        parse_mix("+".join("abcdefghi"))


def test_mix_name_is_read_back():
    weights = {"sql": 0.7, "json": -0.25}
    assert parse_mix(mix_name(weights)) == weights


def test_mix_leases_all_its_parts(versions):
    a, b = versions.add("a"), versions.add("b", "d2")
    lease = versions.store.acquire("a:0.5+b")
    assert (a.num_leases, b.num_leases, lease.version.num_leases) == (1, 1, 1)
    with pytest.raises(AdapterInUseError):
        versions.store.remove("b", timeout_s=0)
    lease.release()
    assert (a.num_leases, b.num_leases) == (0, 0)


def test_mix_of_the_same_versions_is_one_version(versions):
    versions.add("a")
    versions.add("b", "d2")
    one, two = versions.store.acquire("a:0.5+b:1"), versions.store.acquire("a:0.50+b")
    assert one.version is two.version
    assert versions.store.acquire("a:0.6+b").version is not one.version


def test_mix_with_a_replaced_part_is_another_and_the_old_one_goes(versions):
    versions.add("a")
    old = versions.store.acquire("a:2")
    versions.add("a", "d2", replace=True)
    new = versions.store.acquire("a:2")
    assert new.version.digest != old.version.digest
    assert old.version.state is VersionState.READY
    old.release()
    assert old.version in versions.gone
    assert new.version not in versions.gone


def test_idle_mixes_are_kept_but_not_without_end(versions):
    versions.add("a")
    for i in range(1, 400):
        versions.store.acquire(f"a:{i / 1000}").release()
    assert len(versions.store._mixes._versions) <= 257
    assert len(versions.gone) >= 399 - 257
    assert versions.store.get("a").num_leases == 0


def test_mix_of_an_unknown_adapter_is_not_found(versions):
    versions.add("a")
    with pytest.raises(AdapterNotFoundError, match="'x'"):
        versions.store.acquire("a:0.5+x:0.5")
    assert versions.store.get("a").num_leases == 0


# --- any order -------------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """T4: any order of calls, beside a store of dictionaries."""

    leases = Bundle("leases")
    names = st.sampled_from(["a", "b", "c"])
    digests = st.sampled_from(["d1", "d2", "d3"])

    def __init__(self):
        super().__init__()
        self.versions = Versions()
        self.named = {}
        self.held = []  # (lease, versions that it is on)
        self.all = []

    @rule(name=names, digest=digests, replace=st.booleans(), fails=st.booleans())
    def add(self, name, digest, replace, fails):
        def prepare(version):
            if fails:
                raise AdapterFormatError(name, ["broken"])

        before = self.named.get(name)
        if before is not None and before.digest == digest:
            assert self.versions.add(name, digest, replace, prepare=prepare) is before
        elif before is not None and not replace:
            with pytest.raises(AdapterConflictError):
                self.versions.add(name, digest, replace, prepare=prepare)
        elif fails:
            with pytest.raises(AdapterFormatError):
                self.versions.add(name, digest, replace, prepare=prepare)
            self.versions.gone.pop()  # told once; it never served
        else:
            self.named[name] = self.versions.add(name, digest, replace, prepare=prepare)
            self.all.append(self.named[name])

    @rule(name=names, wait=st.booleans())
    def remove(self, name, wait):
        if name not in self.named:
            with pytest.raises(AdapterNotFoundError):
                self.versions.store.remove(name, wait=wait)
        elif wait and self.named[name].num_leases:
            with pytest.raises(AdapterInUseError):
                self.versions.store.remove(name, wait=wait)
        else:
            self.versions.store.remove(name, wait=wait)
            del self.named[name]

    @rule(target=leases, parts=st.lists(names, min_size=1, max_size=2, unique=True))
    def acquire(self, parts):
        if any(name not in self.named for name in parts):
            with pytest.raises(AdapterNotFoundError):
                self.versions.store.acquire("+".join(parts))
            return multiple()
        lease = self.versions.store.acquire("+".join(parts))
        used = [self.named[name] for name in parts]
        if len(parts) == 1:
            assert lease.version is used[0]
        else:
            used.append(lease.version)
            if lease.version not in self.all:
                self.all.append(lease.version)
        self.held.append((lease, used))
        return lease

    @rule(target=leases, lease=leases)
    def share(self, lease):
        of = next((used for held, used in self.held if held is lease), None)
        if of is None:
            return multiple()
        shared = lease.share()
        self.held.append((shared, of))
        return shared

    @rule(lease=consumes(leases), times=st.integers(1, 3))
    def release(self, lease, times):
        for _ in range(times):
            lease.release()
        self.held = [held for held in self.held if held[0] is not lease]

    @rule(name=names, pinned=st.booleans())
    def pin(self, name, pinned):
        if name in self.named:
            assert self.versions.store.pin(name, pinned).is_pinned == pinned

    @invariant()
    def names_are_those_added(self):
        assert set(self.versions.store.names) == set(self.named)
        for name, version in self.named.items():
            assert self.versions.store.get(name) is version

    @invariant()
    def states_follow_names_and_leases(self):
        for version in self.all:
            leases = sum(used.count(version) for _, used in self.held)
            assert version.num_leases == leases
            if version in self.named.values() or version.is_mix:
                assert version.state is VersionState.READY or (version.is_mix and not leases)
            else:
                assert version.state is (VersionState.DRAINING if leases else VersionState.GONE)

    @invariant()
    def a_version_goes_once(self):
        gone = [version for version in self.all if version.state is VersionState.GONE]
        assert len(self.versions.gone) == len(set(self.versions.gone))
        assert set(self.versions.gone) == set(gone)


class TestStore(StoreMachine.TestCase):
    settings = settings(max_examples=120, stateful_step_count=50, deadline=None, derandomize=True)


@pytest.mark.slow
class TestStoreForLong(StoreMachine.TestCase):
    settings = settings(max_examples=1000, stateful_step_count=50, deadline=None, derandomize=True)
