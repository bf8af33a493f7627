"""Hot merge: write one adapter into the weights, swap it for another, take it out bit for bit.

Merging touches nnz values. The originals at `index` are saved first and unmerging writes them
back; subtracting would leave some of the touched weights off by a rounding. Two adapters
on one index swap with a single write, since the saved originals serve both.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuroada_serve.adapters.format import Adapter
from neuroada_serve.errors import AdapterFormatError, DirtyWeightsError
from neuroada_serve.model.bypass_linear import BypassLinear


@dataclass(frozen=True)
class _Saved:
    """What a merged module needs to go back."""

    index: Tensor  # [d_out, k] int32
    positions: Tensor  # [d_out * k] int64
    originals: Tensor  # [d_out * k], weight's dtype


class WeightMerger:
    """Owns every change to the adaptable weights of one model."""

    def __init__(self, layers: Mapping[str, BypassLinear]) -> None:
        self._layers = layers
        self._saved: dict[str, _Saved] = {}
        self._dirty = False

    @property
    def is_merged(self) -> bool:
        return bool(self._saved)

    def realise(self, adapter: Adapter) -> dict[str, Tensor]:
        """The change that merging would make, per module: [d_out, k] in the weight's dtype.

        delta = float(round(W0 + v)) - float(W0): serving this instead of v makes a merged and an
        unmerged adapter one model. Exact in the weight's dtype wherever |v| <= |W0| / 2 (Sterbenz).
        W0 is the base's, whatever is merged just now.

        Raises:
            AdapterFormatError: a merged weight overflows the dtype.
        """
        deltas = {}
        for name, part in adapter.modules.items():
            layer = self._layers[name]
            index = part.index.to(layer.device)
            originals = self._originals(name, index)
            merged = self._merged_values(name, originals, part.bypass)
            deltas[name] = (merged.float() - originals.float()).to(merged.dtype).view(index.shape)
        return deltas

    def merge(self, adapter: Adapter) -> None:
        """Make the weights those of `adapter`; a merged one is swapped out. All or nothing.

        Raises:
            AdapterFormatError: a merged weight overflows the dtype; the weights are the base's.
            DirtyWeightsError: the weights could not be restored after an error.
        """
        self._refuse_if_dirty()
        try:
            for name in self._saved.keys() - adapter.modules.keys():
                self._restore(name)
            for name, part in adapter.modules.items():
                layer = self._layers[name]
                index = part.index.to(layer.device)
                saved = self._saved.get(name)
                if saved is None or not torch.equal(saved.index, index):
                    self._restore(name)
                    positions = layer.positions(index)
                    saved = _Saved(index, positions, layer.read_entries(positions))
                    self._saved[name] = saved  # before the write, so that any error can undo it
                values = self._merged_values(name, saved.originals, part.bypass)
                layer.write_entries_(saved.positions, values)
        except BaseException:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Give the base weights back, bit for bit; without a merged adapter, do nothing.

        Raises:
            DirtyWeightsError: that failed; the weights are no longer usable.
        """
        self._refuse_if_dirty()
        try:
            for name in list(self._saved):
                self._restore(name)
        except BaseException as error:
            self._dirty = True
            raise DirtyWeightsError(
                "base weights could not be restored; restart the process"
            ) from error

    def _restore(self, name: str) -> None:
        if (saved := self._saved.get(name)) is not None:
            self._layers[name].write_entries_(saved.positions, saved.originals)
            del self._saved[name]

    def _originals(self, name: str, index: Tensor) -> Tensor:
        """[d_out * k] base weights at index, also where an adapter is merged."""
        layer = self._layers[name]
        current = layer.read_entries(layer.positions(index))
        if (saved := self._saved.get(name)) is None:
            return current
        same_column = index.unsqueeze(2) == saved.index.unsqueeze(1)  # (d_out, k, k_merged)
        touched, which = same_column.any(2), same_column.int().argmax(2)
        originals = saved.originals.view(saved.index.shape).gather(1, which)
        return torch.where(touched, originals, current.view(index.shape)).flatten()

    def _merged_values(self, name: str, originals: Tensor, bypass: Tensor) -> Tensor:
        """[d_out * k] round(W0 + v) in the weight's dtype."""
        values = bypass.to(originals.device).flatten().float()
        merged = (originals.float() + values).to(originals.dtype)
        if not bool(merged.isfinite().all()):
            raise AdapterFormatError("to merge", [f"a value of {name} overflows {merged.dtype}"])
        return merged

    def _refuse_if_dirty(self) -> None:
        if self._dirty:
            raise DirtyWeightsError("base weights are not restored; restart the process")


def weights_digest(model: nn.Module) -> str:
    """sha256 over every parameter and buffer as it is now: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
