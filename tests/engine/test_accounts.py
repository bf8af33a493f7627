"""Parties within parties, and what is remembered of them."""

import pytest

from neuroada_serve.engine import accounts
from neuroada_serve.engine.accounts import Accounts, Party, charge


def num_parties(party: Party) -> int:
    return sum(1 + num_parties(inner) for inner in party.parties.values())


def test_charge_is_paid_on_every_level_by_weight():
    tree = Accounts({"gold": 4.0}, {})
    line = tree.enter(("gold", "a", "request"))
    charge(line, 8)
    assert [party.counter for party in line] == [8, 2, 8, 8]


def test_debt_is_remembered_and_claims_are_not():
    tree = Accounts({}, {})
    tree.enter(("stays", ""))
    for path, cost in ((("debtor", ""), 10), (("modest", ""), 0)):
        charge(tree.enter(path), cost)
        tree.leave(path)
    charge(tree.enter(("stays", "")), 5)
    assert tree.enter(("debtor", ""))[1].counter == 10
    assert tree.enter(("modest", ""))[1].counter == 5


def test_only_those_present_and_the_last_silent_take_memory(monkeypatch):
    monkeypatch.setattr(accounts, "_MOST_SILENT", 10)
    tree = Accounts({}, {}, {})
    stays = ("t", "a", "stays", "r")
    charge(tree.enter(stays), 3)
    for i in range(200):  # an address each, on adapters each
        path = ("t", f"a{i % 7}", f"2001:db8:0:{i}::/64", f"r{i}")
        tree.enter(path)
        tree.leave(path)
    assert num_parties(tree.root) == len(stays)
    assert len(tree._silent) == 10
    assert tree.enter(stays)[3].counter == 3


def test_parties_are_forgotten_before_those_above_them(monkeypatch):
    """Or what they had had would be compared with nothing."""
    monkeypatch.setattr(accounts, "_MOST_SILENT", 3)
    tree = Accounts({}, {})
    for i in range(20):
        path = (f"t{i % 3}", f"a{i % 4}")
        charge(tree.enter(path), 1)
        tree.leave(path)
        for silent in tree._silent:
            assert silent[:1] in tree._silent


@pytest.mark.parametrize("others", [0, 3])
def test_parties_below_the_levels_begin_with_nothing(others):
    tree = Accounts({})
    charge(tree.enter(("t", "long")), 100)
    for i in range(others):
        charge(tree.enter(("t", f"r{i}")), 50)
    assert tree.enter(("t", "new"))[-1].counter == 0
    tree.leave(("t", "new"))
    assert list(tree._silent) == []
