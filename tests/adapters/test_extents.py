"""Stretches of a memory, against a model that marks every unit with its owner."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.adapters.extents import Extents


class Memory:
    """Extents beside a list of who owns each unit; None owns what is free."""

    def __init__(self, size: int) -> None:
        self.extents = Extents(size)
        self.owners: list[int | None] = [None] * size
        self.starts: dict[int, int] = {}  # owner -> where its stretch begins

    def take(self, owner: int, size: int) -> None:
        start = self.extents.take(size)
        assert start == self.first_fit(size)
        if start is not None:
            self.starts[owner] = start
            self.owners[start : start + size] = [owner] * size

    def free(self, owner: int) -> None:
        self.extents.free(self.starts.pop(owner))
        self.owners = [None if other == owner else other for other in self.owners]

    def shrink(self, owner: int, size: int) -> None:
        start, before = self.starts[owner], self.owners.count(owner)
        self.extents.shrink(start, size)
        self.owners[start + size : start + before] = [None] * (before - size)

    def close_holes(self) -> None:
        moves = self.extents.close_holes()
        assert list(moves) == sorted(self.starts.values())
        assert all(new <= old for old, new in moves.items())
        self.starts = {owner: moves[start] for owner, start in self.starts.items()}
        taken = [owner for owner in self.owners if owner is not None]
        self.owners = taken + [None] * (len(self.owners) - len(taken))

    def first_fit(self, size: int) -> int | None:
        for start in range(len(self.owners) - size + 1):
            if self.owners[start : start + size] == [None] * size:
                return start
        return None

    def check(self) -> None:
        for owner, start in self.starts.items():
            size = self.owners.count(owner)
            assert self.owners[start : start + size] == [owner] * size
        assert self.extents.num_free == self.owners.count(None)
        assert self.extents.num_taken == len(self.owners) - self.extents.num_free
        # Only neighbours that were joined leave every hole in one piece.
        assert self.extents._starts == [
            at
            for at, owner in enumerate(self.owners)
            if owner is None and (at == 0 or self.owners[at - 1] is not None)
        ]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_use_keeps_stretches_apart_and_holes_joined(data):
    memory = Memory(data.draw(st.integers(0, 24)))
    for owner in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["take", "take", "free", "shrink", "close"]))
        chosen = data.draw(st.sampled_from(list(memory.starts) or [None]))
        if action == "take":
            memory.take(owner, data.draw(st.integers(1, 8)))
        elif action == "close":
            memory.close_holes()
        elif chosen is not None and action == "free":
            memory.free(chosen)
        elif chosen is not None:
            memory.shrink(chosen, data.draw(st.integers(1, memory.owners.count(chosen))))
        memory.check()
    for owner in list(memory.starts):
        memory.free(owner)
    memory.check()


def test_first_hole_that_fits_is_taken():
    extents = Extents(10)
    starts = [extents.take(2) for _ in range(5)]
    assert starts == [0, 2, 4, 6, 8]
    extents.free(2)
    extents.free(6)
    extents.free(8)
    assert extents.take(3) == 6
    assert extents.take(1) == 2


def test_no_hole_large_enough_is_none_and_changes_nothing():
    extents = Extents(6)
    for _ in range(3):
        extents.take(2)
    extents.free(0)
    extents.free(4)
    assert extents.num_free == 4
    assert extents.take(3) is None
    assert extents.num_free == 4
    assert extents.take(2) == 0


@pytest.mark.parametrize(
    "order", [(0, 2, 4), (0, 4, 2), (2, 0, 4), (2, 4, 0), (4, 0, 2), (4, 2, 0)]
)
def test_neighbours_join_in_whatever_order_they_are_freed(order):
    extents = Extents(6)
    for _ in range(3):
        extents.take(2)
    for start in order:
        extents.free(start)
    assert extents.take(6) == 0


def test_shrinking_frees_the_end_and_joins_it():
    extents = Extents(10)
    extents.take(6)
    extents.shrink(0, 2)
    assert extents.num_taken == 2
    assert extents.take(8) == 2


def test_shrinking_to_the_same_size_changes_nothing():
    extents = Extents(4)
    extents.take(3)
    extents.shrink(0, 3)
    assert extents.num_taken == 3
    assert extents.take(1) == 3


@pytest.mark.parametrize("size", [0, 4])
def test_stretch_neither_grows_nor_vanishes_by_shrinking(size):
    extents = Extents(8)
    extents.take(3)
    with pytest.raises(AssertionError):
        extents.shrink(0, size)


def test_closing_holes_moves_down_in_order_and_leaves_one_hole():
    extents = Extents(12)
    for _ in range(4):
        extents.take(2)
    extents.free(0)
    extents.free(4)
    assert extents.close_holes() == {2: 0, 6: 2}
    assert extents.num_taken == 4
    assert extents.take(8) == 4
    extents.free(0)
    extents.free(2)
    assert extents.take(4) == 0


def test_closing_holes_of_a_full_or_empty_memory_leaves_it_so():
    full, empty = Extents(3), Extents(3)
    full.take(3)
    assert full.close_holes() == {0: 0}
    assert full.take(1) is None
    assert empty.close_holes() == {}
    assert empty.take(3) == 0


def test_memory_of_no_size_holds_nothing():
    extents = Extents(0)
    assert extents.take(1) is None
    assert extents.close_holes() == {}
    assert extents.num_free == 0


def test_what_is_not_taken_cannot_be_freed():
    extents = Extents(4)
    extents.take(2)
    for start in (1, 2):
        with pytest.raises(KeyError):
            extents.free(start)
    assert extents.num_taken == 2
