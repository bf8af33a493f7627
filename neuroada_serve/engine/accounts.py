"""Fair-share accounting: what each party has been given, in a tree of parties. Pure Python.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024; S-LoRA
has them per adapter), at any number of levels: whoever has the lowest counter goes first, and is
charged for what it gets. Whoever was away is lifted to the lowest of those who were not, so nobody
saves up a claim by staying silent.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_MOST_SILENT = 4096  # parties kept of those who ask for nothing just now


@dataclass(eq=False)
class Party:
    """A party that shares with its siblings.

    weight: of its share.
    counter: costs of what it was given, for its weight.
    floor: the lowest counter that one of its parties had when it was last the lowest present.
    num_present: requests that wait or run.
    parties: those within it of whom a request is present, in the order in which they came.
    """

    weight: float = 1.0
    counter: float = 0.0
    floor: float = 0.0
    num_present: int = 0
    num_waiting: int = 0
    num_slots: int = 0
    parties: "dict[str, Party]" = field(default_factory=dict)


def charge(line: Iterable[Party], cost: float) -> None:
    """Charge the parties on a line for what one of their requests was given."""
    for party in line:
        party.counter += cost / party.weight


class Accounts:
    """A tree of parties, each named by the path of names that leads to it.

    Args:
        weights: for each level from the top, the weights of parties by name, 1 for all others. Of
            the last that left, it is remembered what they had had. Parties below these levels begin
            with nothing each time.
    """

    def __init__(self, *weights: Mapping[str, float]) -> None:
        self.root = Party()
        self.weights = weights
        self._silent: OrderedDict[tuple[str, ...], Party] = OrderedDict()  # longest silent first

    def enter(self, path: tuple[str, ...]) -> list[Party]:
        """Count one more present request of a party; return the parties from the root to it."""
        line = [self.root]
        self.root.num_present += 1
        for level, name in enumerate(path):
            above = line[-1]
            party = above.parties.get(name)
            if party is None:
                party = above.parties[name] = self._return(above, path[: level + 1])
            party.num_present += 1
            line.append(party)
        return line

    def leave(self, path: tuple[str, ...]) -> None:
        """Count one present request of a party less."""
        line = [self.root]
        for name in path:
            line.append(line[-1].parties[name])
        self.root.num_present -= 1
        for level in reversed(range(len(path))):  # so parties are forgotten before those above them
            above, party = line[level], line[level + 1]
            party.num_present -= 1
            if party.num_present:
                continue
            del above.parties[path[level]]
            if not above.parties:
                above.floor = max(above.floor, party.counter)
            if level < len(self.weights):
                self._silent[path[: level + 1]] = party
        while len(self._silent) > _MOST_SILENT:
            self._silent.popitem(last=False)

    def _return(self, above: Party, path: tuple[str, ...]) -> Party:
        """Return a party that was away, its counter lifted to the lowest of those present."""
        if len(path) > len(self.weights):
            return Party()
        party = self._silent.pop(path, None)
        if party is None:
            party = Party(self.weights[len(path) - 1].get(path[-1], 1.0))
        present = (other.counter for other in above.parties.values())
        above.floor = max(above.floor, min(present, default=above.floor))
        party.counter = max(party.counter, above.floor)
        return party
