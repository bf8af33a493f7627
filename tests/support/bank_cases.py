"""Adapters for a bank of two modules, and what a batch must see of them."""

import torch

from neuroada_serve.adapters.bank import ResidentAdapter
from neuroada_serve.adapters.format import Adapter, AdapterConfig, ModuleBypass, make_adapter
from tests.support.flat import FlatBank

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


def assert_holds(bank: FlatBank, resident: ResidentAdapter, adapter: Adapter) -> None:
    """A plan of one token with this adapter sees its very columns and values."""
    plan = bank.plan([resident], None)
    for name in SIZES:
        calls = plan.calls(name)
        assert len(calls) == (name in adapter.modules)
        for table, token_slots in calls:
            assert torch.equal(table.index, adapter.modules[name].index)
            assert torch.equal(table.bypass[token_slots.slots[0]], adapter.modules[name].bypass)
