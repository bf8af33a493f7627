"""Which inputs each neuron keeps, by the ways that the method's paper compares.

    magnitude   the largest |W| of each row; the method's own, and the only one whose index all
                adapters of a base share
    reverse     the smallest |W|
    random      any, from the seed
    gradient    the largest |dloss/dW|, summed over training rows before anything is trained
    custom      those of a file: M.index [d_out, k] for every module M, as adapters have them

`coverage` leaves entries to a share of the neurons, drawn from the seed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from neuroada_serve.adapters.format import MAX_FAULTS, index_faults
from neuroada_serve.adapters.select import (
    Selection,
    magnitude_index,
    random_index,
    smallest_index,
)
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError
from neuroada_serve.model.loader import is_transposed
from neuroada_serve.train.data import Example
from neuroada_serve.train.loop import Notify
from neuroada_serve.train.quantize import dense_weight
from neuroada_serve.train.score import answer_logits, collate

_SUM_BYTES = 2 << 30  # of dense gradient sums held at a time


def select(
    model: Any,
    modules: Mapping[str, Any],
    examples: Sequence[Example],
    config: TrainConfig,
    notify: Notify,
) -> dict[str, Selection]:
    """A selection for every module, by `config.selection` and `config.coverage`.

    Args:
        model: the base, nothing attached; left as it is.
        modules: of the model, by name.
        examples: to train on; gradients are of the first `config.selection_rows`.

    Raises:
        DataError: the index file does not fit; names the faults.
    """
    if config.selection == "gradient":
        rows = examples[: config.selection_rows]
        notify(f"Selecting by the gradient of {len(rows)} rows.")
        found = gradient_indices(model, modules, rows, config.k, config.batch_size)
    elif config.selection == "custom":
        assert config.index_file is not None
        found = _from_file(config.index_file, modules, config.k)
    else:
        found = {}
        for name, module in modules.items():
            weight = dense_weight(module)
            if config.selection == "magnitude":
                found[name] = magnitude_index(weight, config.k)
            elif config.selection == "reverse":
                found[name] = smallest_index(weight, config.k)
            else:
                d_out, d_in = weight.shape
                index = random_index(d_out, d_in, config.k, _seed(config.seed, name))
                found[name] = index.to(weight.device)
    return {
        name: Selection(index, _covered(index, config.coverage, _seed(config.seed, name)))
        for name, index in found.items()
    }


def gradient_indices(
    model: Any,
    modules: Mapping[str, Any],
    examples: Sequence[Example],
    k: int,
    batch_size: int,
    sum_bytes: int = _SUM_BYTES,
) -> dict[str, Tensor]:
    """The k columns of largest |gradient| in each row: name -> [d_out, k] int32.

    The gradient is that of the mean loss of each batch, summed over the batches, in float32. Only
    `sum_bytes` of sums are held: where the modules need more, the rows are passed once for every
    group of modules. Weights do not change; what requires a gradient comes back as it was.
    """
    model.eval()
    device = next(model.parameters()).device
    required = {p: p.requires_grad for p in model.parameters()}
    indices: dict[str, Tensor] = {}
    try:
        for group in _groups(modules, sum_bytes):
            model.requires_grad_(False)
            sums = {
                name: torch.zeros_like(group[name].weight, dtype=torch.float32) for name in group
            }
            for module in group.values():
                module.weight.requires_grad_(True)
            for start in range(0, len(examples), batch_size):
                batch = collate(examples[start : start + batch_size])
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                logits, targets, _ = answer_logits(model, batch)
                torch.autograd.backward(F.cross_entropy(logits, targets))
                for name, module in group.items():
                    sums[name] += module.weight.grad
                    module.weight.grad = None
            for name, total in sums.items():
                dense = total.t() if is_transposed(group[name]) else total
                indices[name] = magnitude_index(dense, k)
    finally:
        for parameter, wanted in required.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None
    return indices


def _groups(modules: Mapping[str, Any], sum_bytes: int) -> list[dict[str, Any]]:
    """The modules in parts of at most so many bytes of float32, or of one module."""
    groups: list[dict[str, Any]] = []
    room = 0
    for name, module in modules.items():
        size = 4 * module.weight.numel()
        if size > room or not groups:
            groups.append({})
            room = sum_bytes
        groups[-1][name] = module
        room -= size
    return groups


def _from_file(path: Path, modules: Mapping[str, Any], k: int) -> dict[str, Tensor]:
    try:
        tensors = load(path.read_bytes())
    except OSError as error:
        raise DataError(f"index file {path} cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise DataError(f"index file {path} is no safetensors file: {error}") from error
    faults, found = [], {}
    for name, module in modules.items():
        index = tensors.get(f"{name}.index")
        d_out, d_in = dense_weight(module).shape
        if index is None:
            faults.append(f"{name}.index is missing")
        elif index.is_floating_point() or index.dtype == torch.bool or index.shape != (d_out, k):
            faults.append(
                f"{name}.index is {index.dtype} {list(index.shape)}, expected integers "
                f"[{d_out}, k={k}]"
            )
        else:
            found[name] = index.to(torch.int32)
            faults += index_faults(name, found[name], d_in)
            found[name] = found[name].to(module.weight.device)
    if faults:
        raise DataError(f"index file {path} does not fit: {'; '.join(faults[:MAX_FAULTS])}")
    return found


def _covered(index: Tensor, share: float, seed: int) -> Tensor | None:
    """[d_out, k] bool: all entries of a share of the neurons, at least one of them."""
    if share >= 1:
        return None
    d_out = len(index)
    order = torch.randperm(d_out, generator=torch.Generator().manual_seed(seed))
    trained = torch.zeros(d_out, dtype=torch.bool)
    trained[order[: max(1, round(share * d_out))]] = True
    return trained[:, None].expand(index.shape).contiguous().to(index.device)


def _seed(seed: int, name: str) -> int:
    """One of its own for every module."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
