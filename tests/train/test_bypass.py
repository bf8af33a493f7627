"""Values trained beside layers that stay as they are."""

import pytest
import torch
from torch import nn

from neuroada_serve.adapters.select import Selection, magnitude_index
from neuroada_serve.errors import UsageError
from neuroada_serve.model.loader import adaptable_modules
from neuroada_serve.train.bypass import bypass_training
from neuroada_serve.train.inplace import magnitude_selections
from neuroada_serve.train.quantize import dense_weight, quantize_
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

IDS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


def training(model, k):
    modules = adaptable_modules(model)
    return bypass_training(model, modules, magnitude_selections(modules, k))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_official_forward(family, dtype):
    model = random_model(family).to(dtype)
    with training(model, 3) as layers:
        for layer in layers.values():
            layer.to(dtype)
        randomise(layers)
        loss, grads = grads_of(model, layers, IDS)
        values = {name: (layer.index, layer.value.detach()) for name, layer in layers.items()}
    expected_loss, expected = official_loss_and_grads(model, values, IDS)
    # Sums in another order, and the other families' norms round to float32 in float64, too.
    rounds = family != "gpt2" or dtype == torch.float32
    bound = 1e-4 if rounds else TOLERANCE[dtype]
    torch.testing.assert_close(loss, expected_loss, rtol=bound, atol=bound)
    assert_close(grads, expected, bound)


def test_the_base_is_not_touched_even_while_training():
    model = random_model("llama").bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = adaptable_modules(model)
    with training(model, 2) as layers:
        randomise(layers)
        grads_of(model, layers, IDS)
        for name, module in modules.items():
            assert torch.equal(module.weight, before[f"{name}.weight"])
    assert adaptable_modules(model) == modules


def test_entries_that_are_not_selected_get_no_gradient():
    model = random_model("llama")
    modules = adaptable_modules(model)
    selections = {
        name: Selection(s.index, torch.rand(s.index.shape) < 0.5)
        for name, s in magnitude_selections(modules, 3).items()
    }
    with bypass_training(model, modules, selections) as layers:
        _, grads = grads_of(model, layers, IDS)
        assert all(grads[name][~s.trained].eq(0).all() for name, s in selections.items())


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_quantized_base_trains_like_its_dequantized_self(how):
    pytest.importorskip("bitsandbytes")
    model = random_model("llama", heads=4, head_dim=16, width=128)
    dense = random_model("llama", heads=4, head_dim=16, width=128)
    modules = quantize_(model, adaptable_modules(model), how)
    weights = {name: dense_weight(module).float() for name, module in modules.items()}
    for name, weight in weights.items():
        with torch.no_grad():
            original = dense.get_submodule(name).weight
            assert float((weight - original).norm()) < 0.2 * float(original.norm())
            original.copy_(weight)
    selections = {name: Selection(magnitude_index(w, 2)) for name, w in weights.items()}
    with bypass_training(model, modules, selections) as layers:
        randomise(layers)
        loss, grads = grads_of(model, layers, IDS)
        values = {name: (layer.index, layer.value.detach()) for name, layer in layers.items()}
    expected_loss, expected = official_loss_and_grads(dense, values, IDS)
    bound = 0.05 if how == "int8" else 0.02  # int8 products round the activations too
    torch.testing.assert_close(loss, expected_loss, rtol=bound, atol=bound)
    assert_close(grads, expected, 5 * bound)


def test_what_cannot_be_quantized_is_refused_by_name():
    pytest.importorskip("bitsandbytes")
    model = random_model("gpt2")
    with pytest.raises(UsageError, match=r"transformer\.h\.0.*Conv1D"):
        quantize_(model, adaptable_modules(model), "nf4")
    llama = random_model("llama")
    with pytest.raises(UsageError, match=r"64 inputs.*has 32.*int8"):
        quantize_(llama, adaptable_modules(llama), "nf4")
    assert not any(isinstance(module, nn.Linear) for module in adaptable_modules(model).values())
