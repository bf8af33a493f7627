"""The states of a version on its way: which may follow which, and the room that each holds."""

import itertools

import pytest
import torch

from neuroada_serve.adapters.residency import (
    ABSENT,
    Absent,
    Failed,
    NeedsIndex,
    Reading,
    Residency,
    Resident,
    Writing,
)
from neuroada_serve.adapters.slot_memory import SLOT_BYTES
from neuroada_serve.adapters.store import AdapterVersion
from neuroada_serve.errors import AdapterError
from tests.adapters.test_bank import SIZES, new_adapter
from tests.support.flat import FlatBank

NEXT = {
    Absent: [Absent, Reading],
    Reading: [Absent, NeedsIndex, Writing, Failed],
    NeedsIndex: [Absent, NeedsIndex, Writing, Failed],
    Writing: [Resident, Failed],
    Resident: [Absent],
    Failed: [Absent, Reading],
}
PATHS = {
    Absent: [],
    Reading: [Reading],
    NeedsIndex: [Reading, NeedsIndex],
    Writing: [Reading, Writing],
    Resident: [Reading, Writing, Resident],
    Failed: [Reading, Failed],
}


class Way:
    """One version in a small bank."""

    def __init__(self) -> None:
        self.bank = FlatBank(SIZES)
        adapter = new_adapter(1)
        self.values = self.bank.reader.of(adapter)
        self.version = AdapterVersion("a", adapter.digest, adapter.nnz, adapter)
        self.plane = self.bank.add_plane(self.values.table)
        self.residency = Residency(self.bank)
        self.reading = self.resident = None

    def go(self, kind):
        """Move on to a state of this kind, as the loaders would."""
        if kind is Reading:
            self.reading = Reading(
                self.bank.memory.take(SLOT_BYTES), self.bank.memory.take(SLOT_BYTES)
            )
            self.residency.move(self.version, self.reading)
        elif kind is Writing and self.resident is None:
            self.resident = self.residency.settle(self.version, self.values).resident
        else:
            self.residency.move(self.version, self.state(kind))

    def state(self, kind):
        if kind is Absent:
            return ABSENT
        if kind is Failed:
            return Failed(AdapterError("it failed"))
        if kind in (Writing, Resident):
            return kind(self.resident or self.bank.upload(new_adapter(2)))
        room = self.reading or Reading(self.bank.memory.take(SLOT_BYTES), None)
        return room if kind is Reading else NeedsIndex(self.values, room.room, room.index_room)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(NEXT, NEXT)))
def test_only_the_drawn_moves_are_possible(before, after):
    way = Way()
    for kind in PATHS[before]:
        way.go(kind)
    state = way.residency[way.version]
    if after in NEXT[before]:
        way.go(after)
        assert isinstance(way.residency[way.version], after)
    else:
        with pytest.raises(AssertionError, match="cannot go from"):
            way.residency.move(way.version, way.state(after))
        assert way.residency[way.version] is state


@pytest.mark.parametrize(
    ("state", "end"),
    [(state, end) for state in (Reading, NeedsIndex, Writing) for end in NEXT[state]],
)
def test_room_goes_back_to_the_bank_with_the_last_state_that_holds_it(state, end):
    way = Way()
    before = way.bank.memory.used_bytes
    for kind in [*PATHS[state], end]:
        way.go(kind)
    if end in (Absent, Failed):
        assert way.bank.memory.used_bytes == before
    elif end is Resident:
        way.go(Absent)
        assert way.bank.memory.used_bytes == before
    else:
        assert way.bank.memory.used_bytes > before
    assert way.residency.num_writing == (end is Writing)


def test_index_room_is_given_up_once_the_index_is_there():
    way = Way()
    used = way.bank.memory.used_bytes
    way.go(Reading)
    assert way.bank.memory.used_bytes == used + 2 * SLOT_BYTES
    way.go(Writing)
    assert way.bank.memory.used_bytes == used + SLOT_BYTES
    assert way.residency.num_writing == 1
    assert way.residency.nnz(way.version) == way.version.nnz
    assert torch.equal(way.plane.table.index, way.values.table.index)


def test_absent_version_is_not_kept_but_for_the_index_it_lacks():
    way = Way()
    way.go(Reading)
    way.residency.move(way.version, Absent(lacks_index=True))
    assert list(way.residency) == [way.version]
    way.go(Absent)
    assert list(way.residency) == []
