"""Who is served next: the one who has had the fewest tokens for its weight. Pure Python.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024; S-LoRA
has them per adapter): whoever waits with the lowest counter goes first, and is charged for what it
gets. Whoever was away is lifted to the lowest of those who were not, so nobody saves up a claim by
staying silent. There are two levels: tenants among each other, and within a tenant its adapters,
the base among them. Without tenants all requests are of one, so adapters share alike.
"""

from collections import deque
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
        self._waiting: dict[tuple[str, str], deque[R]] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[R]:
        """All that wait, in no order."""
        for queue in self._waiting.values():
            yield from queue

    def admits(self, tenant: str, adapter: str | None, limit: int) -> bool:
        """Whether a request of this tenant and adapter may join a queue of `limit` places.

        A full queue still takes requests of those who have less than their share of it, so that
        nobody is shut out by another's backlog; up to twice the limit.
        """
        if self._num_waiting < limit:
            return True
        if self._num_waiting >= 2 * limit:
            return False
        # By tenants where they are told apart, else by adapters.
        level, weights = (0, self._tenant_weights) if tenant else (1, self._adapter_weights)
        own: str = (tenant, adapter or "")[level]
        waiting: dict[str, int] = {own: 0}
        for key, queue in self._waiting.items():
            waiting[key[level]] = waiting.get(key[level], 0) + len(queue)
        share = weights.get(own, 1.0) / sum(weights.get(party, 1.0) for party in waiting)
        return waiting[own] < limit * share

    def add(self, request: R) -> None:
        """Queue a request; it is present until `leave`."""
        key = self._key(request)
        self._enter(key)
        self._waiting.setdefault(key, deque()).append(request)
        self._num_waiting += 1

    def take(self, request: R) -> None:
        """A request no longer waits: it runs, or ends."""
        key = self._key(request)
        queue = self._waiting[key]
        queue.remove(request)
        if not queue:
            del self._waiting[key]
        self._num_waiting -= 1

    def leave(self, request: R) -> None:
        """A request that is not queued has ended."""
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
        return sorted((queue[0] for queue in self._waiting.values()), key=self.rank)

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
