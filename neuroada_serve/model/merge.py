"""Hot merge: write one adapter into the weights, swap it for another, take it out bit for bit.

Merging touches nnz values. The originals at the index are kept and unmerging writes them back;
subtracting would leave some of the touched weights off by a rounding. Two adapters on one index
swap with a single write, since the kept originals serve both.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuroada_serve.adapters.values import AdapterValues, FlatOrder, IndexTable, merged_weights
from neuroada_serve.errors import AdapterFormatError, DirtyWeightsError
from neuroada_serve.model.bypass_linear import BypassLinear
from neuroada_serve.ops.weights import WeightEntries


@dataclass(frozen=True)
class _Merged:
    """A merged adapter, and the weights to put back."""

    table: IndexTable
    entries: WeightEntries
    originals: Tensor  # [nnz] W0, and biases
    weights: Tensor  # [nnz] round(W0 + v)


class WeightMerger:
    """Owns every change to the adaptable weights of one model. For one thread, between steps."""

    def __init__(self, layers: Mapping[str, BypassLinear]) -> None:
        self._layers = layers
        self._merged: _Merged | None = None
        self._last: tuple[IndexTable, WeightEntries] | None = None
        self._dirty = False

    @property
    def order(self) -> FlatOrder:
        """The order of adapters' entries that suits these layers."""
        sites = {layer.site.name: layer.site.d_outs for layer in self._layers.values()}
        return FlatOrder(sites, {})

    @property
    def is_merged(self) -> bool:
        return self._merged is not None

    def originals(self, table: IndexTable) -> Tensor:
        """Return the base's weights at an index, and its biases, [nnz], whatever is merged at
        present.

        Raises:
            DirtyWeightsError: the weights are not usable any more.
        """
        self._refuse_if_dirty()
        merged = self._merged
        if merged is None:
            return self._entries(table).read()
        if merged.table is table:
            return merged.originals
        entries = self._entries(table)
        try:
            merged.entries.write_(merged.originals)
            originals = entries.read()
            merged.entries.write_(merged.weights)
        except BaseException:
            self.unmerge()
            raise
        return originals

    def merge(self, adapter: AdapterValues, originals: Tensor | None = None) -> None:
        """Make the weights those of `adapter`, swapping out a merged one. All or nothing.

        Args:
            originals: the result of `originals` for the adapter's table, if it is at hand.

        Raises:
            AdapterFormatError: a merged weight overflows the dtype; nothing has changed.
            DirtyWeightsError: the weights could not be restored after an error.
        """
        self._refuse_if_dirty()
        table, before = adapter.table, self._merged
        if originals is None:
            originals = self.originals(table)
        values = adapter.values.to(originals.device, non_blocking=True)
        weights = merged_weights(originals, values)
        if not bool(weights.isfinite().all()):
            raise AdapterFormatError("to merge", [f"a merged weight overflows {weights.dtype}"])
        merged = _Merged(table, self._entries(table), originals, weights)
        try:
            if before is not None and before.table is not table:
                before.entries.write_(before.originals)
            self._merged = merged  # before the write, so that any error can undo it
            merged.entries.write_(weights)
        except BaseException:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Restore the base weights, bit for bit; without a merged adapter, do nothing.

        Raises:
            DirtyWeightsError: that failed; the weights are no longer usable.
        """
        self._refuse_if_dirty()
        if self._merged is None:
            return
        try:
            self._merged.entries.write_(self._merged.originals)
        except BaseException as error:
            self._dirty = True
            raise DirtyWeightsError(
                "base weights could not be restored; restart the process"
            ) from error
        self._merged = None

    def _entries(self, table: IndexTable) -> WeightEntries:
        """Find a table's entries. The last one is kept, as swaps ask for it again and again,
        and no more, as it takes 8 bytes an entry."""
        if self._merged is not None and self._merged.table is table:
            return self._merged.entries
        if self._last is not None and self._last[0] is table:
            return self._last[1]
        parts = []
        for stretch in table.layout.stretches:
            k = table.layout.k
            columns = table.index[stretch.offset :][: stretch.rows * k].view(-1, k)
            matrix = self._layers[stretch.modules[0]].site.matrix
            index = columns.to(matrix.entries.device)
            parts.append((matrix.entries, matrix.positions(index, stretch.first)))
        for stretch in table.layout.biases:
            bias = self._layers[stretch.modules[0]].site.bias
            assert bias is not None, "checked when it was read"
            parts.append((bias, torch.arange(stretch.first, stretch.stop, device=bias.device)))
        self._last = table, WeightEntries(parts)
        return self._last[1]

    def _refuse_if_dirty(self) -> None:
        if self._dirty:
            raise DirtyWeightsError("base weights are not restored; restart the process")


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 over every parameter and buffer as it is now: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
