"""Layers in a batch: grouped or alone, packed or not, by runs or by lanes, the sum is the same."""

import itertools

import pytest
import torch
from torch import nn

from neuroada_serve.adapters.bank import RUN_TOKENS
from neuroada_serve.adapters.format import Adapter, AdapterConfig, ModuleBypass, make_adapter
from neuroada_serve.model import bypass_linear
from neuroada_serve.model.bypass_linear import AttachedBypass, attach_bypass, plain_layers
from neuroada_serve.ops import cpu_team
from tests.support.flat import FlatBank

CPU = torch.device("cpu")
SIZES = {"q_proj": (24, 48), "k_proj": (8, 48), "v_proj": (8, 48), "o_proj": (48, 24)}
SHORTEST = RUN_TOKENS["cpu"]
LONG = SHORTEST + 3


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        for name, (d_out, d_in) in SIZES.items():
            setattr(self, name, nn.Linear(d_in, d_out, bias=bias))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v], -1), self.o_proj(q)


class Model(nn.Module):
    """One block and a head, with the one method of transformers' models that attaching needs."""

    def __init__(self, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention(bias)])
        self.head = nn.Linear(48, 100, bias=False)
        self.to(dtype).requires_grad_(False)

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, head):
        self.head = head


def name_of(child: str) -> str:
    return f"layers.0.{child}"


def new_adapter(
    seed: int, k: int, index_seed: int = 0, children=tuple(SIZES), biased=()
) -> Adapter:
    parts = {}
    for child in children:
        d_out, d_in = SIZES[child]
        columns = torch.Generator().manual_seed(index_seed)
        index = torch.rand(d_out, d_in, generator=columns).argsort(1)[:, :k].int()
        values = torch.randn(d_out, k, generator=torch.Generator().manual_seed(seed))
        bias = torch.randn(d_out, generator=columns).bfloat16() if child in biased else None
        parts[name_of(child)] = ModuleBypass(index, values.bfloat16(), bias)
    return make_adapter(AdapterConfig("base", "0" * 64, k, tuple(children)), parts)


class Served:
    """A model with adapters in its bank, beside the plain sums that it must give."""

    def __init__(self, dtype: torch.dtype, adapters: list[Adapter], bias: bool = False) -> None:
        self.plain = Model(dtype, bias)
        self.model = Model(dtype, bias)
        self.attached: AttachedBypass = attach_bypass(self.model)
        shapes = {name_of(child): SIZES[child] for child in SIZES}
        self.bank = FlatBank(shapes, dtype, self.attached.sites)
        self.adapters = adapters
        self.residents = [self.bank.upload(adapter) for adapter in adapters]

    def run(self, tokens: list[int | None], merged: int | None = None):
        """(actual, expected) outputs of q, k, v side by side; a token names its adapter."""
        x = torch.randn(1, len(tokens), 48, generator=torch.Generator().manual_seed(1))
        x = x.to(self.plain.head.weight.dtype)
        residents = [None if a is None else self.residents[a] for a in tokens]
        into = None if merged is None else self.residents[merged]
        block, plain = self.model.layers[0], self.plain.layers[0]
        with self.attached.context.applying(self.bank.plan(residents, into)):
            actual, _ = block(x)
        expected = []
        for child in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(plain, child)
            y = torch.nn.functional.linear(x[0].float(), linear.weight.float())
            if linear.bias is not None:
                y += linear.bias.float()
            for t, adapter in enumerate(tokens):
                for number, sign in ((adapter, 1), (merged, -1)):
                    part = None
                    if number is not None:
                        part = self.adapters[number].modules.get(name_of(child))
                    if part is not None:
                        gathered = x[0, t].float()[part.index.long()]
                        y[t] += sign * (part.bypass.float() * gathered).sum(1)
                        if part.bias is not None:
                            y[t] += sign * part.bias.float()
            expected.append(y)
        return actual[0].float(), torch.cat(expected, -1)


MIXES = {
    "lanes": [0, None, 1, 2, 0],
    "one run": [0] * LONG,
    "base run between": [1] + [None] * LONG + [2],
    "runs of several": [2] + [0] * LONG + [1] * LONG + [None, 0],
    "short and long": [0, 1, 2] * 3 + [2] * LONG + [1] * (SHORTEST - 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [None, 0, 2])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("with_numba", [True, False])
def test_every_mix_gives_the_plain_sum(dtype, merged, mix, with_numba, monkeypatch):
    if not with_numba:
        monkeypatch.setattr(cpu_team, "kernels", lambda: None)
    adapters = [
        new_adapter(0, 3, biased=("k_proj", "v_proj")),
        new_adapter(1, 1),
        new_adapter(2, 2, index_seed=1, biased=("q_proj", "v_proj")),
    ]
    served = Served(dtype, adapters, bias=True)
    actual, expected = served.run(MIXES[mix], merged)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "children", [c for n in (1, 2, 3) for c in itertools.combinations(list(SIZES)[:3], n)]
)
def test_adapter_of_some_layers_of_a_group_leaves_the_others(children):
    served = Served(torch.float32, [new_adapter(0, 2, children=children), new_adapter(1, 2)])
    for mix in MIXES.values():
        tokens = [None if a is None else a % 2 for a in mix]
        actual, expected = served.run(tokens)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_leave_the_weights_as_they_were(dtype):
    served = Served(dtype, [new_adapter(0, 3), new_adapter(1, 2, index_seed=1)])
    before = {n: w.clone() for n, w in served.model.state_dict().items()}
    assert {n: tuple(w.shape) for n, w in before.items()} == {
        n: tuple(w.shape) for n, w in served.plain.state_dict().items()
    }
    for mix, merged in itertools.product(("one run", "runs of several"), (None, 0)):
        served.run([None if a is None else a % 2 for a in MIXES[mix]], merged)
    for name, weight in served.model.state_dict().items():
        assert torch.equal(weight, before[name])
        assert torch.equal(weight, served.plain.state_dict()[name])


def test_failing_run_puts_the_weights_back(monkeypatch):
    served = Served(torch.bfloat16, [new_adapter(0, 3), new_adapter(1, 2, index_seed=1)])
    before = {n: w.clone() for n, w in served.model.state_dict().items()}
    site = served.model.layers[0].q_proj.site

    def fail(x, bias, out):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(site.matrix, "multiply", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        served.run([1] * LONG, merged=0)
    for name, weight in served.model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_group_is_multiplied_once(monkeypatch):
    served = Served(torch.float32, [new_adapter(0, 2)])
    calls = []
    real = bypass_linear.BypassSite._forward
    monkeypatch.setattr(
        bypass_linear.BypassSite,
        "_forward",
        lambda site, x: calls.append(site.name) or real(site, x),
    )
    served.run([0, None])
    assert calls == [name_of("q_proj"), name_of("o_proj")]


def test_second_call_of_a_layer_computes_again():
    """A changed input under the same name, or the same layer twice, never gets an old product."""
    model, plain = Model(torch.float32), Model(torch.float32)
    attach_bypass(model)
    block, expected = model.layers[0], plain.layers[0]
    x = torch.randn(2, 48)
    for other in (x, x + 1, x):
        torch.testing.assert_close(block.q_proj(other), expected.q_proj(other))
        torch.testing.assert_close(block.q_proj(other), expected.q_proj(other))
        torch.testing.assert_close(block.v_proj(x), expected.v_proj(x))


def test_layers_with_different_biases_are_not_grouped():
    model = Model(torch.float32, bias=True)
    model.layers[0].k_proj.bias = None
    sites = attach_bypass(model).sites
    assert sorted(map(list, sites.values())) == [
        [name_of("k_proj")],
        [name_of("o_proj")],
        [name_of("q_proj"), name_of("v_proj")],
    ]


def test_plain_layers_leave_the_model_alone():
    model = Model(torch.bfloat16)
    modules = dict(model.named_modules())
    layers = plain_layers(model)
    assert dict(model.named_modules()) == modules
    for name, layer in layers.items():
        assert layer.weight is modules[name].weight
