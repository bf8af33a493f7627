"""Gradients of values inside the weights, under everything that changes how a model runs."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.model.loader import adaptable_modules
from neuroada_serve.train.inplace import inplace_training, magnitude_selections
from neuroada_serve.train.recompute import set_recompute
from tests.support.gradients import (
    FAMILIES,
    TOLERANCE,
    VOCABULARY,
    assert_close,
    grads_of,
    random_model,
    randomise,
)
from tests.support.official import official_loss_and_grads

compiling = pytest.mark.filterwarnings("ignore")  # torch's compiler does what torch warns of


def needs_compiler(backend):
    missing = shutil.which("g++") is None and shutil.which("clang++") is None
    return pytest.param(backend, marks=pytest.mark.skipif(missing, reason="no C++ compiler"))


def training(model, k, tune_bias=False):
    modules = adaptable_modules(model)
    return inplace_training(model, modules, magnitude_selections(modules, k), tune_bias)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_gradients_equal_those_of_the_official_forward(data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    heads = data.draw(st.sampled_from([2, 4]))
    model = random_model(
        data.draw(st.sampled_from(sorted(FAMILIES))),
        seed=data.draw(st.integers(0, 99)),
        heads=heads,
        kv_heads=data.draw(st.sampled_from([1, heads])),
        head_dim=data.draw(st.sampled_from([4, 8, 16])),
        width=data.draw(st.integers(5, 70)),
        layers=data.draw(st.integers(1, 3)),
    ).to(dtype)
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(2, 40)))
    ids = torch.randint(VOCABULARY, shape)
    with training(model, data.draw(st.integers(1, 5)), data.draw(st.booleans())) as layers:
        randomise(layers)
        loss, grads = grads_of(model, layers, ids)
        values = {name: (layer.index, layer.value.detach()) for name, layer in layers.items()}
        biases = {
            n: b.detach() for n, layer in layers.items() if (b := layer.bias_value) is not None
        }
    expected_loss, expected = official_loss_and_grads(model, values, ids, biases)
    assert grads.keys() == expected.keys()
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(loss, expected_loss, rtol=bound, atol=bound)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=bound, atol=bound)


@pytest.mark.parametrize("what", ["cheap", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_changes_no_gradient(family, what):
    model, ids = random_model(family).train(), torch.randint(VOCABULARY, (2, 9))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with training(model, 2, tune_bias=True) as layers:
        randomise(layers)
        loss, expected = grads_of(model, layers, ids)
        undo = set_recompute(model, what)
        again, found = grads_of(model, layers, ids)
        undo()
        assert torch.equal(again, loss)
        assert_close(found, expected, 1e-6)


@pytest.mark.parametrize(("share", "again"), [(1.0, [1, 1, 1]), (0.5, [1, 1, 0]), (0.3, [1, 0, 0])])
def test_a_share_of_the_layers_computes_again(share, again):
    model, ids = random_model("llama", layers=3).train(), torch.randint(VOCABULARY, (2, 9))
    with training(model, 2) as layers:
        _, expected = grads_of(model, layers, ids)
        forwards = [0] * 3
        for number, layer in enumerate(model.model.layers):

            def count(*_, number=number):
                forwards[number] += 1

            layer.mlp.register_forward_pre_hook(count)
        undo = set_recompute(model, "all", share)
        _, found = grads_of(model, layers, ids)
        undo()
        assert forwards == [1 + more for more in again]
        assert_close(found, expected, 1e-6)


def test_one_backward_through_two_forwards():
    model, ids = random_model("llama"), torch.randint(VOCABULARY, (2, 9))
    with training(model, 2) as layers:
        randomise(layers)
        _, expected = grads_of(model, layers, ids)
        model.zero_grad()
        losses = [model(ids, labels=ids, use_cache=False).loss for _ in range(2)]
        sum(losses).backward()
        found = {name: layer.value.grad / 2 for name, layer in layers.items()}
    assert_close(found, expected, 1e-6)


def test_a_backward_after_the_values_have_changed_is_refused():
    model, ids = random_model("llama"), torch.randint(VOCABULARY, (2, 9))
    with training(model, 2) as layers:
        loss = model(ids, labels=ids, use_cache=False).loss
        randomise(layers)
        model(ids)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_values_set_behind_autograds_back_reach_the_next_forward():
    model, ids = random_model("llama"), torch.randint(VOCABULARY, (2, 9))
    with training(model, 2) as layers:
        first = model(ids).logits
        for layer in layers.values():
            layer.value.data += 0.1  # as some optimizers do
        second = model(ids).logits
        assert not torch.equal(first, second)
        randomise(layers, 0)
        for layer in layers.values():
            layer.value.data += 0.1
        assert torch.equal(model(ids).logits, second)


def saved_bytes(model, ids):
    """Bytes of distinct storages that the backward of a forward would read, parameters apart."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    return sum(found.values()), loss


def test_nothing_of_a_weights_size_is_kept_for_the_backward():
    model = random_model("llama", width=4000, layers=1)
    ids = torch.randint(VOCABULARY, (1, 2))
    with training(model, 1) as layers:
        randomise(layers)
        kept, _ = saved_bytes(model, ids)
        weights = sum(layer.weight.numel() for layer in layers.values())
    assert kept < weights  # one byte for each would already be more


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_trains_float32_weights_in_bfloat16(family):
    model, ids = random_model(family), torch.randint(VOCABULARY, (2, 9))

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    with training(model, 2) as layers:
        randomise(layers)
        _, expected = grads_of(model, layers, ids)
        dtypes = set()
        for layer in layers.values():
            layer.register_forward_hook(lambda layer, args, y: dtypes.add(y.dtype))
        _, found = grads_of(model, layers, ids, autocast)
        assert dtypes == {torch.bfloat16}
        assert all(layer.value.grad.dtype == torch.float32 for layer in layers.values())
        assert_close(found, expected, 0.1)
    with autocast():  # torch's own layers
        expected_loss = model(ids, labels=ids, use_cache=False).loss
        with training(model, 2):
            assert torch.equal(model(ids, labels=ids, use_cache=False).loss, expected_loss)


@compiling
@pytest.mark.parametrize("backend", ["aot_eager", needs_compiler("inductor")])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled_layers_train_as_eager_ones_do(family, backend):
    torch._dynamo.reset()  # its limit of compilations is for the whole process
    model, ids = random_model(family), torch.randint(VOCABULARY, (2, 40))
    with training(model, 2) as layers:
        randomise(layers)
        _, expected = grads_of(model, layers, ids)
        for block in model.model.layers if family == "llama" else model.transformer.h:
            block.compile(backend=backend, fullgraph=True)
        _, found = grads_of(model, layers, ids)
        assert_close(found, expected, 1e-5)

        randomise(layers, 0.3)  # compiled code, too, runs on the values of now
        loss, found = grads_of(model, layers, ids)
        values = {name: (layer.index, layer.value.detach()) for name, layer in layers.items()}
    expected_loss, expected = official_loss_and_grads(random_model(family), values, ids)
    torch.testing.assert_close(loss, expected_loss)
    assert_close(found, expected, 1e-5)


@compiling
def test_compiled_and_recomputed_bfloat16():
    model, ids = random_model("llama").bfloat16().train(), torch.randint(VOCABULARY, (2, 40))
    with training(model, 2) as layers:
        randomise(layers)
        _, expected = grads_of(model, layers, ids)
        undo = set_recompute(model, "cheap")
        for block in model.model.layers:
            block.compile(backend="aot_eager")
        _, found = grads_of(model, layers, ids)
        undo()
        assert_close(found, expected, 0.05)
