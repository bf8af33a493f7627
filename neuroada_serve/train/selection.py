"""Select which inputs each neuron keeps, by the methods that the method's paper compares.

    magnitude   the largest |W| of each row; the method's own, and the only one whose index all
                adapters of a base share
    reverse     the smallest |W|
    random      any, from the seed
    gradient    the largest |dloss/dW|, summed over training rows before anything is trained
    matrix      the largest |W| of the whole matrix, k per row on average, as Super-Tuning does
                (arXiv:2607.09287); but at most 4 k of one row, to which others would be padded
    custom      those of a file: M.index [d_out, k] for every module M, as adapters have them

k may differ by module, and `coverage` leaves entries to a share of the neurons, drawn from the
seed. An adapter has rows of one width, so neurons with fewer entries are filled up with entries
that are not trained and stay 0: they take room in the file and time in serving as others do.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from neuroada_serve.adapters.format import index_faults
from neuroada_serve.adapters.select import (
    Selection,
    magnitude_index,
    random_index,
    smallest_index,
)
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError, UsageError, listed_faults
from neuroada_serve.model.loader import is_transposed
from neuroada_serve.train.batches import predict
from neuroada_serve.train.examples import Example
from neuroada_serve.train.loop import Notify
from neuroada_serve.train.objectives import Objective
from neuroada_serve.train.quantize import dense_weight

_SUM_BYTES = 2 << 30  # of dense gradient sums held at a time
_MATRIX_MOST = 4  # times k; bench/LOG.md has what it cuts off


def k_of_modules(names: Collection[str], config: TrainConfig) -> dict[str, int]:
    """Return k of each module that is trained, by `config.k_pattern`, else `config.k`; modules with
    0 are left out.

    A pattern matches a whole name or what follows a dot in it, as PEFT's rank_pattern does.

    Raises:
        UsageError: a pattern matches none of the names, or nothing is left to train.
    """
    found = dict.fromkeys(names, config.k)
    free = set(names)
    for pattern, k in config.k_pattern.items():
        matched = {name for name in names if re.fullmatch(rf"(.*\.)?({pattern})", name)}
        if not matched:
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise UsageError(f"k of {pattern!r}: no such module; the base has {', '.join(ends)}")
        found.update(dict.fromkeys(matched & free, k))
        free -= matched
    found = {name: k for name, k in found.items() if k}
    if not found:
        raise UsageError(f"--k {config.k_words} leaves no module to train; give one k above 0")
    return found


def select(
    model: Any,
    modules: Mapping[str, Any],
    examples: Sequence[Example],
    objective: Objective,
    config: TrainConfig,
    notify: Notify,
) -> dict[str, Selection]:
    """Select entries of every trained module, all of one width; see the module's docstring.

    Args:
        model: the base, nothing attached; left as it is.
        modules: of the model, by name.
        examples: to train on; gradients are of the first `config.selection_rows`.
        objective: its loss gives the gradients.

    Raises:
        DataError: the index file does not fit; names the faults.
        UsageError: see `k_of_modules`.
    """
    k_of = k_of_modules(modules, config)
    modules = {name: modules[name] for name in k_of}
    width = max(k_of.values())
    counts = {name: torch.tensor([k]) for name, k in k_of.items()}
    if config.selection == "gradient":
        rows = examples[: config.selection_rows]
        notify(f"Selecting by the gradient of {len(rows)} rows.")
        found = gradient_indices(model, modules, rows, objective, width, config.batch_size)
    elif config.selection == "custom":
        assert config.index_file is not None
        found = _from_file(config.index_file, modules, width)
    elif config.selection == "random":
        found = {}
        for name, module in modules.items():
            d_out, d_in = dense_weight(module).shape
            index = random_index(d_out, d_in, width, _seed(config.seed, name))
            found[name] = index.to(module.weight.device)
    elif config.selection == "matrix":
        narrowest = min(dense_weight(module).shape[1] for module in modules.values())
        for name, module in modules.items():
            most = min(_MATRIX_MOST * k_of[name], narrowest)
            counts[name] = entries_by_row(dense_weight(module), k_of[name], most)
        width = max(int(count.max()) for count in counts.values())
        found = {n: magnitude_index(dense_weight(m), width) for n, m in modules.items()}
    else:
        rank = magnitude_index if config.selection == "magnitude" else smallest_index
        found = {name: rank(dense_weight(module), width) for name, module in modules.items()}

    selections = {}
    for name, index in found.items():  # the best come first, so fewer are a row's beginning
        covered = _covered(len(index), config.coverage, _seed(config.seed, name))
        trained = covered[:, None] & (torch.arange(width) < counts[name][:, None].cpu())
        selections[name] = Selection(index, None if trained.all() else trained.to(index.device))
    return selections


def entries_by_row(weight: Tensor, k: int, most: int) -> Tensor:
    """Count how many of the d_out * k largest |weight| of a matrix lie in each row, [d_out] int64.

    Rows take part with their `most` largest alone, k <= most <= d_in. Ties go to the lower row.
    """
    d_out = len(weight)
    index = magnitude_index(weight, most)
    magnitude = weight.detach().gather(1, index.long()).abs().float().flatten()
    chosen = magnitude.sort(descending=True, stable=True).indices[: d_out * k]
    return (chosen // most).bincount(minlength=d_out)


def gradient_indices(
    model: Any,
    modules: Mapping[str, Any],
    examples: Sequence[Example],
    objective: Objective,
    k: int,
    batch_size: int,
    sum_bytes: int = _SUM_BYTES,
) -> dict[str, Tensor]:
    """Return the k columns of largest |gradient| in each row: name -> [d_out, k] int32.

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
                batch = objective.collate(examples[start : start + batch_size])
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                found = predict(model, batch)
                torch.autograd.backward(objective.loss(found) / len(found.targets))
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
    """Split the modules into parts of at most so many bytes of float32, or of one module."""
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
        raise DataError(f"index file {path} is not a safetensors file: {error}") from error
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
        raise DataError(f"index file {path} does not fit: {listed_faults(faults)}")
    return found


def _covered(d_out: int, share: float, seed: int) -> Tensor:
    """Choose a share of the neurons, at least one: [d_out] bool."""
    order = torch.randperm(d_out, generator=torch.Generator().manual_seed(seed))
    covered = torch.zeros(d_out, dtype=torch.bool)
    covered[order[: max(1, round(share * d_out))]] = True
    return covered


def _seed(seed: int, name: str) -> int:
    """Return a seed of its own for every module."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
