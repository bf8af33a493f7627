"""The official code's way to train: the model with every weight a scatter_add of its values."""

import torch
from torch.func import functional_call

from neuroada_serve.model.loader import is_transposed


def official_loss_and_grads(model, values, ids, biases=None):
    """The loss of token ids [rows, width] and its gradients: name -> [d_out, k].

    values: name -> (index, value), each [d_out, k].
    biases: name -> [d_out] what has been added to a layer's bias, whose gradient is name.bias.
    Source: official code, utils/utils.py:75, F.linear(x, W.flatten().scatter_add(0, at, values)).
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, (_, value) in values.items()}
    weights = {}
    for name, (index, _) in values.items():
        module = model.get_submodule(name)
        weight = module.weight.t() if is_transposed(module) else module.weight
        at = torch.arange(len(index))[:, None] * weight.shape[1] + index.long()
        flat = weight.flatten().scatter_add(0, at.flatten(), leaves[name].flatten())
        merged = flat.view(weight.shape)
        weights[f"{name}.weight"] = merged.t() if is_transposed(module) else merged
    for name, added in (biases or {}).items():
        bias = model.get_submodule(name).bias.detach() + added
        leaves[f"{name}.bias"] = weights[f"{name}.bias"] = bias.requires_grad_()
    loss = functional_call(model, weights, (ids,), {"labels": ids, "use_cache": False}).loss
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}
