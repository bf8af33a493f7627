"""Who is served next: the one who has had the fewest tokens for its weight. Pure Python.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024; S-LoRA
has them per adapter): whoever waits with the lowest counter goes first, and is charged for what it
gets. Whoever was away is lifted to the lowest of those who were not, so nobody saves up a claim by
staying silent. There are two levels: tenants among each other, and within a tenant its adapters,
the base among them. Without tenants all requests are of one, so adapters share alike.

Slots are shared in the same way, and below that among the requests of one adapter: whoever has
fewer than its share may take one back from whoever has most (`may_displace`).
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

# A computed prompt token and an answered one, as in the paper; on the demo base a decode token at
# 16 requests takes twice the time of a prompt token (bench/results/throughput_16.json).
PROMPT_COST = 1.0
OUTPUT_COST = 2.0
# Adapters whose counters are this close (in costs) are level: the one on the device goes first.
AFFINITY = 64.0
_MOST_SILENT = 4096  # accounts kept of those who ask for nothing just now


class Request(Protocol):
    """What is queued."""

    tenant: str
    request_id: str  # of all its choices

    @property
    def adapter(self) -> str | None: ...


R = TypeVar("R", bound=Request)


@dataclass(eq=False)
class _Account:
    """What one party has had. Its parties, if any, share what it gets."""

    weight: float = 1.0
    counter: float = 0.0
    num_present: int = 0  # requests that wait or run
    parties: "dict[str, _Account]" = field(default_factory=dict)
    floor: float = 0.0  # the lowest counter that a party had when it was last the lowest present

    def enter(self, name: str, weight: float) -> "_Account":
        """A party has one more request present."""
        account = self.parties.setdefault(name, _Account(weight))
        if not account.num_present:
            present = [a.counter for a in self.parties.values() if a.num_present]
            self.floor = max(self.floor, min(present, default=self.floor))
            account.counter = max(account.counter, self.floor)
        account.num_present += 1
        return account

    def leave(self, name: str) -> None:
        account = self.parties[name]
        account.num_present -= 1
        if account.num_present:
            return
        if not any(a.num_present for a in self.parties.values()):
            self.floor = max(self.floor, account.counter)
        if len(self.parties) > _MOST_SILENT:
            self.parties = {n: a for n, a in self.parties.items() if a.num_present}


class FairQueue(Generic[R]):
    """Requests that wait, by tenant and adapter; and the accounts of all that are present.

    Args:
        tenant_weights, adapter_weights: shares; 1 for those that are not named.
    """

    def __init__(
        self,
        tenant_weights: Mapping[str, float] | None = None,
        adapter_weights: Mapping[str, float] | None = None,
    ) -> None:
        self._tenant_weights = dict(tenant_weights or {})
        self._adapter_weights = dict(adapter_weights or {})
        self._accounts = _Account()
        # By tenant and adapter, then by request, in the order in which these came.
        self._waiting: dict[tuple[str, str], dict[str, deque[R]]] = {}
        self._num_waiting = 0
        # Slots in use by (tenant), (tenant, adapter) and (tenant, adapter, request id).
        self._slots: Counter[tuple[str, ...]] = Counter()

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[R]:
        """All that wait, in no order."""
        for requests in self._waiting.values():
            for queue in requests.values():
                yield from queue

    def admits(self, tenant: str, adapter: str | None, limit: int) -> bool:
        """Whether a request of this tenant and adapter may join a queue of `limit` places.

        A full queue still takes requests of those who have less than their share of it, so that
        nobody is shut out by another's backlog; up to twice the limit.
        """
        if self._num_waiting < limit:
            return True
        return self._num_waiting < 2 * limit and self._is_below_share(tenant, adapter, limit)

    def displaced_by(self, tenant: str, adapter: str | None, limit: int) -> R | None:
        """Who must go from a queue of twice the limit for a request that has less than its share:
        of whoever has most, the one that came last; None where nobody has more than one."""
        if self._num_waiting < 2 * limit or not self._is_below_share(tenant, adapter, limit):
            return None
        tenants: Counter[str] = Counter()
        for key in self._waiting:
            tenants[key[0]] += self._num_of(key)
        most = max(self._waiting, key=lambda key: (tenants[key[0]], self._num_of(key)))
        if self._num_of(most) < 2:
            return None
        return max(reversed(self._waiting[most].values()), key=len)[-1]

    def _is_below_share(self, tenant: str, adapter: str | None, limit: int) -> bool:
        # By tenants where they are told apart, else by adapters.
        level, weights = (0, self._tenant_weights) if tenant else (1, self._adapter_weights)
        own: str = (tenant, adapter or "")[level]
        waiting: dict[str, int] = {own: 0}
        num_requests = 0
        for key, requests in self._waiting.items():
            waiting[key[level]] = waiting.get(key[level], 0) + self._num_of(key)
            num_requests += len(requests) if key[level] == own else 0
        share = limit * weights.get(own, 1.0) / sum(weights.get(party, 1.0) for party in waiting)
        # Among its own, a request is shut out by many others, not by few with many choices.
        return waiting[own] < share or share >= 2 * (num_requests + 1)

    def _num_of(self, key: tuple[str, str]) -> int:
        return sum(map(len, self._waiting[key].values()))

    def add(self, request: R) -> None:
        """Queue a request; it is present until `leave`."""
        key = self._key(request)
        self._enter(key)
        requests = self._waiting.setdefault(key, {})
        requests.setdefault(request.request_id, deque()).append(request)
        self._num_waiting += 1

    def take(self, request: R) -> None:
        """A request no longer waits: it has a slot, or ends."""
        key = self._key(request)
        requests = self._waiting[key]
        queue = requests[request.request_id]
        queue.remove(request)
        if not queue:
            del requests[request.request_id]
        if not requests:
            del self._waiting[key]
        self._num_waiting -= 1
        self._count(request, 1)

    def put_back(self, request: R) -> None:
        """A request that had a slot waits again, before all others of its adapter."""
        self._count(request, -1)
        requests = self._waiting.setdefault(self._key(request), {})
        queue = requests.pop(request.request_id, deque())
        queue.appendleft(request)
        self._waiting[self._key(request)] = {request.request_id: queue, **requests}
        self._num_waiting += 1

    def leave(self, request: R) -> None:
        """A request that is not queued has ended."""
        self._count(request, -1)
        tenant, adapter = self._key(request)
        self._accounts.parties[tenant].leave(adapter)
        self._accounts.leave(tenant)

    def charge(self, request: R, cost: float) -> None:
        """A present request was given something."""
        tenant, account = self._present(request)
        tenant.counter += cost / tenant.weight
        account.counter += cost / account.weight

    def rank(self, request: R) -> tuple[float, float]:
        """What a present request's tenant, and its adapter there, have had: lower is first."""
        tenant, account = self._present(request)
        return tenant.counter, account.counter

    def heads(self) -> list[R]:
        """The next request of every tenant and adapter, in the order of their claims."""
        return sorted(map(self._head, self._waiting.values()), key=self.rank)

    def may_displace(self, waiting: R, running: R) -> bool:
        """Whether a slot of one request is due to another: on the first level where they differ,
        the one that waits has less of the slots than the other, and still has not more after it;
        and it has not had more so far."""
        own, other = self._path(waiting), self._path(running)
        if own == other:
            return False
        level = next(i for i in range(len(own)) if own[i] != other[i])
        if self.slots_of(waiting, 1)[level] > self.slots_of(running, -1)[level]:
            return False
        return level == 2 or self.rank(waiting)[level] <= self.rank(running)[level]

    def slots_of(self, request: R, more: int = 0) -> tuple[float, float, float]:
        """Slots of a request's tenant, of its adapter there and of itself, each with `more`, for
        their weights."""
        tenant, adapter, request_id = self._path(request)
        slots = self._slots
        return (
            (slots[tenant,] + more) / self._tenant_weights.get(tenant, 1.0),
            (slots[tenant, adapter] + more) / self._adapter_weights.get(adapter, 1.0),
            slots[tenant, adapter, request_id] + more,
        )

    def _head(self, requests: dict[str, deque[R]]) -> R:
        """Of the requests of one adapter, the first of those with fewest slots."""
        first: deque[R] | None = None
        fewest = 0
        for queue in requests.values():
            slots = self._slots[self._path(queue[0])]
            if first is None or slots < fewest:
                first, fewest = queue, slots
            if not fewest:
                break
        assert first is not None
        return first[0]

    def _count(self, request: R, num: int) -> None:
        path = self._path(request)
        for level in range(1, len(path) + 1):
            self._slots[path[:level]] += num
            if not self._slots[path[:level]]:
                del self._slots[path[:level]]

    def _path(self, request: R) -> tuple[str, str, str]:
        return request.tenant, request.adapter or "", request.request_id

    def _enter(self, key: tuple[str, str]) -> None:
        tenant, adapter = key
        account = self._accounts.enter(tenant, self._tenant_weights.get(tenant, 1.0))
        account.enter(adapter, self._adapter_weights.get(adapter, 1.0))

    def _present(self, request: R) -> tuple[_Account, _Account]:
        tenant, adapter = self._key(request)
        account = self._accounts.parties[tenant]
        return account, account.parties[adapter]

    def _key(self, request: R) -> tuple[str, str]:
        return request.tenant, request.adapter or ""
