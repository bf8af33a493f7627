"""The fair queue: next is served who has had the fewest tokens for its weight. Pure Python.

There are three levels of parties (`accounts.py`): tenants among each other, within a tenant its
adapters, the base among them, and of an adapter its clients. So adapters share alike however many
clients each has, and one client's backlog holds up no other. Where tenants or clients are not told
apart, there is one.

Slots are shared in the same way, and below that among the requests of one client: whoever has
fewer than its share may take one back from whoever has most (`may_displace`). So are the places of
the queue.
"""

from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from neuroada_serve.engine.accounts import Accounts, Party, charge

# A computed prompt token and an answered one, as in the paper; on the demo base a decode token at
# 16 requests takes twice the time of a prompt token (bench/results/throughput_16.json).
PROMPT_COST = 1.0
OUTPUT_COST = 2.0
# Adapters whose counters are this close (in costs) are level: the one on the device goes first.
AFFINITY = 64.0


class Request(Hashable, Protocol):
    """A request that can be queued."""

    tenant: str
    client: str
    request_id: str  # of all its choices

    @property
    def adapter(self) -> str | None: ...


R = TypeVar("R", bound=Request)


class FairQueue(Generic[R]):
    """A queue of requests, and the accounts of all that are present.

    Args:
        tenant_weights, adapter_weights: shares; 1 for those that are not named.
    """

    def __init__(
        self,
        tenant_weights: Mapping[str, float] | None = None,
        adapter_weights: Mapping[str, float] | None = None,
    ) -> None:
        self._accounts = Accounts(dict(tenant_weights or {}), dict(adapter_weights or {}), {})
        # Of all that are present: the root, tenant, adapter, client and request.
        self._lines: dict[R, list[Party]] = {}
        self._queues: dict[Party, deque[R]] = {}  # choices of a request that wait

    def __len__(self) -> int:
        return self._accounts.root.num_waiting

    def __iter__(self) -> Iterator[R]:
        """Iterate over all waiting requests, in no order."""
        for queue in self._queues.values():
            yield from queue

    # --- places in the queue -----------------------------------------------------------------

    def admits(self, tenant: str, adapter: str | None, limit: int, client: str = "") -> bool:
        """Return whether a request of this tenant, adapter and client may join a queue of
        `limit` places.

        A full queue still takes requests of those who have less than their share of it, so that
        nobody is shut out by another's backlog; up to twice the limit.
        """
        path = (tenant, adapter or "", client)
        return len(self) < limit or (
            len(self) < 2 * limit and self._crowding(path, limit) is not None
        )

    def displaced_by(
        self, tenant: str, adapter: str | None, limit: int, client: str = ""
    ) -> R | None:
        """Return the request that must leave a queue of twice the limit for one that has less
        than its share: of whoever has most, the one that came last; None if nobody has more than
        one."""
        if len(self) < 2 * limit:
            return None
        crowding = self._crowding((tenant, adapter or "", client), limit) or []
        parties = [party for party in crowding if party.num_waiting > 1]
        if not parties:
            return None
        while parties:
            most = max(reversed(parties), key=lambda party: party.num_waiting / party.weight)
            parties = _that_wait(most)
        return self._queues[most][-1]

    def _crowding(self, path: tuple[str, ...], limit: int) -> list[Party] | None:
        """Return the other parties on the first level, from the top, where a newcomer's party
        has less than its share of the places. None if it has its share on every level."""
        share, party = float(limit), self._accounts.root
        for name, weights in zip(path, self._accounts.weights, strict=True):
            own = party.parties.get(name)
            others = [other for other in _that_wait(party) if other is not own]
            weight = weights.get(name, 1.0)
            share *= weight / (weight + sum(other.weight for other in others))
            if own is None or own.num_waiting < share:
                return others
            party = own
        # Among its client's, a request is shut out by many others, not by few with many choices.
        requests = _that_wait(party)
        return requests if share >= 2 * (len(requests) + 1) else None

    # --- requests come and go ----------------------------------------------------------------

    def add(self, request: R) -> None:
        """Queue a request; it is present until `leave`."""
        self._lines[request] = line = self._accounts.enter(self._path(request))
        self._queues.setdefault(line[-1], deque()).append(request)
        for party in line:
            party.num_waiting += 1

    def take(self, request: R) -> None:
        """Take a request out of the queue: it has a slot, or ends."""
        line = self._lines[request]
        queue = self._queues[line[-1]]
        queue.remove(request)
        if not queue:
            del self._queues[line[-1]]
        for party in line:
            party.num_waiting -= 1
            party.num_slots += 1

    def requeue(self, request: R) -> None:
        """Queue a request that had a slot again, before all later ones of its client."""
        line = self._lines[request]
        self._queues.setdefault(line[-1], deque()).appendleft(request)
        for party in line:
            party.num_waiting += 1
            party.num_slots -= 1

    def leave(self, request: R) -> None:
        """End the presence of a request that is not queued."""
        for party in self._lines.pop(request):
            party.num_slots -= 1
        self._accounts.leave(self._path(request))

    def charge(self, request: R, cost: float) -> None:
        """Charge a present request for what it was given."""
        charge(self._lines[request], cost)

    # --- whose turn it is --------------------------------------------------------------------

    def rank(self, request: R) -> tuple[float, float]:
        """Return what a present request's tenant, and its adapter there, have had: lower is
        first."""
        _, tenant, adapter, *_ = self._lines[request]
        return tenant.counter, adapter.counter

    def heads(self) -> list[R]:
        """Return the next request of every tenant and adapter, in the order of their claims."""
        tenants = _that_wait(self._accounts.root)
        heads = [self._head(adapter) for tenant in tenants for adapter in _that_wait(tenant)]
        return sorted(heads, key=self.rank)

    def _head(self, adapter: Party) -> R:
        """Return the next request of the client that has had least: the first of those with
        fewest slots."""
        client = min(_that_wait(adapter), key=lambda party: party.counter)
        fewest: Party | None = None
        for request in client.parties.values():
            if request.num_waiting and (fewest is None or request.num_slots < fewest.num_slots):
                fewest = request
                if not request.num_slots:  # most requests that wait have none
                    break
        assert fewest is not None
        return self._queues[fewest][0]

    def may_displace(self, waiting: R, running: R) -> bool:
        """Return whether a slot of one request is due to another: on the first level where they
        differ, the waiting one has fewer slots than the other, has no more than it afterwards,
        and has not had more so far.

        Never to an equal: where each of as many as there are slots has one, whoever comes next
        waits until one ends. Slices of time would shorten the longest waits, but what loses its
        slot is computed again, and answers would stop midway for as long as the waits that they
        save (bench/LOG.md).
        """
        for own, other in zip(self._lines[waiting], self._lines[running], strict=True):
            if own is not other:
                own_slots, other_slots = own.num_slots + 1, other.num_slots - 1
                return (
                    own_slots / own.weight <= other_slots / other.weight
                    and own.counter <= other.counter
                )
        return False

    def slots_of(self, request: R, more: int = 0) -> tuple[float, ...]:
        """Return the slots of a request's tenant, of its adapter there, of its client and of
        itself, each with `more`, divided by their weights."""
        return tuple((p.num_slots + more) / p.weight for p in self._lines[request][1:])

    def _path(self, request: R) -> tuple[str, str, str, str]:
        return request.tenant, request.adapter or "", request.client, request.request_id


def _that_wait(party: Party) -> list[Party]:
    """Return a party's parties that have a waiting request."""
    return [p for p in party.parties.values() if p.num_waiting]
