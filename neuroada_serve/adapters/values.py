"""Adapters as two flat vectors, columns and values, in the order of the base's layers.

Layers that read the same input (q, k and v, say) are one site, their rows numbered through. An
adapter's entries lie site by site and row by row, so one copy brings them to a device, one pass
computes what they change, and adapters on one index table differ in one vector alone. Columns are
checked once per distinct table and shared by all adapters that have it. Behind the entries, in the
same order, come the values of an adapter's biases.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from neuroada_serve.adapters.format import (
    HEAD,
    Adapter,
    BaseSpec,
    index_faults,
    value_faults,
)
from neuroada_serve.adapters.reader import AdapterHeader, AdapterReader
from neuroada_serve.errors import AdapterFormatError

# A value of at most half the dtype's range cannot make a weight of at most half of it overflow.
_RANGE_SHARE = 0.5
_COLUMN_TYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "I32": np.dtype("<i4")}
_VALUE_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Columns = np.ndarray[Any, np.dtype[Any]]  # of one module, flat
Sites = Mapping[str, Mapping[str, int]]  # site -> its modules in order of rows -> d_out


@dataclass(frozen=True)
class Stretch:
    """Adjacent rows of a site: those of its modules `modules`, from row `first` on.

    offset: values of the adapter that lie before theirs.
    """

    site: str
    first: int
    rows: int
    modules: tuple[str, ...]
    offset: int

    @property
    def stop(self) -> int:
        return self.first + self.rows


@dataclass(frozen=True)
class Layout:
    """The order of an adapter's values: its entries, k a row, then its biases.

    d_outs: rows of every module, in that order.
    biases: where there are any: stretches of one value a row.
    """

    k: int
    stretches: tuple[Stretch, ...]
    d_outs: Mapping[str, int]
    biases: tuple[Stretch, ...] = ()

    @property
    def num_entries(self) -> int:
        return self.k * sum(self.d_outs.values())

    @property
    def nnz(self) -> int:
        return self.num_entries + sum(stretch.rows for stretch in self.biases)

    def of_module(self) -> dict[str, slice]:
        """Return module -> its entries."""
        return self._slices(self.d_outs, self.k, 0)

    def of_bias(self) -> dict[str, slice]:
        """Return module -> its bias's values, for modules that have them."""
        biased = [module for stretch in self.biases for module in stretch.modules]
        return self._slices(biased, 1, self.num_entries)

    def of_tensor(self) -> dict[str, slice]:
        """Return the name of a tensor in a file -> its values."""
        entries = {f"{module}.bypass": part for module, part in self.of_module().items()}
        return entries | {f"{module}.bias": part for module, part in self.of_bias().items()}

    def _slices(self, modules: Iterable[str], each: int, start: int) -> dict[str, slice]:
        slices = {}
        for module in modules:
            slices[module] = slice(start, start + self.d_outs[module] * each)
            start = slices[module].stop
        return slices


class FlatOrder:
    """Puts the modules of adapters in the order of a model's sites.

    Args:
        sites: a module that is in none is a site of its own.
        d_outs: rows of such modules.
    """

    def __init__(self, sites: Sites, d_outs: Mapping[str, int]) -> None:
        self._sites = dict(sites)
        self._site_of = {m: site for site, modules in sites.items() for m in modules}
        self._d_outs = d_outs
        self._layouts: dict[tuple[frozenset[str], int, frozenset[str]], Layout] = {}

    def layout(self, modules: Iterable[str], k: int, biased: Iterable[str] = ()) -> Layout:
        """Return the layout of an adapter of these modules, with biases of some of them."""
        key = (frozenset(modules), k, frozenset(biased))
        if key not in self._layouts:
            self._layouts[key] = self._new_layout(*key)
        return self._layouts[key]

    def _new_layout(self, wanted: frozenset[str], k: int, biased: frozenset[str]) -> Layout:
        stretches = self._stretches(wanted, k, 0)
        names = [name for stretch in stretches for name in stretch.modules]
        d_outs = {name: self._rows_of(name) for name in names}
        biases = self._stretches(biased, 1, k * sum(d_outs.values()))
        return Layout(k, stretches, d_outs, biases)

    def _rows_of(self, module: str) -> int:
        site = self._sites.get(self._site_of.get(module, module))
        return self._d_outs[module] if site is None else site[module]

    def _stretches(self, wanted: frozenset[str], each: int, offset: int) -> tuple[Stretch, ...]:
        """Return the stretches of what has `each` values a row, from `offset` on."""
        stretches = []
        for site in sorted({self._site_of.get(module, module) for module in wanted}):
            row = 0
            members = self._sites.get(site) or {site: self._d_outs[site]}
            for is_wanted, group in groupby(members, wanted.__contains__):
                names = tuple(group)
                rows = sum(members[name] for name in names)
                if is_wanted:
                    stretches.append(Stretch(site, row, rows, names, offset))
                    offset += rows * each
                row += rows
        return tuple(stretches)


@dataclass(frozen=True, eq=False)
class IndexTable:
    """The columns that an adapter keeps; one object for all adapters with the same columns and
    biases.

    index: [num_entries] int32 on the CPU, in the order of the layout.
    """

    layout: Layout
    index: Tensor

    @property
    def size_bytes(self) -> int:
        return self.index.numel() * self.index.element_size()


@dataclass(frozen=True, eq=False)
class AdapterValues:
    """The values of an adapter, as in its file.

    values: [nnz] on the CPU, in the order of the table's layout.
    head: [labels, hidden_size] float32 on the CPU, of a classifier.
    """

    table: IndexTable
    values: Tensor
    head: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes without the table, which is shared."""
        head_bytes = 0 if self.head is None else self.head.nbytes
        return self.values.nbytes + head_bytes


class ValuesReader:
    """Read adapters as flat vectors. Safe in any thread.

    Args:
        order: of the model's sites.
        base: gives the widths that columns must stay within.
        dtype: of the weights; values so large that a weight could overflow it are refused.
        pin: keep values in page-locked memory, which a GPU reads while it computes.
    """

    def __init__(
        self, order: FlatOrder, base: BaseSpec, dtype: torch.dtype, pin: bool = False
    ) -> None:
        self.order = order
        self._base = base
        self._largest = torch.finfo(dtype).max * _RANGE_SHARE
        self._dtype = dtype
        self._pin = pin
        self._tables = WeakValueDictionary[bytes, IndexTable]()
        self._lock = Lock()

    def read(self, header: AdapterHeader, reader: AdapterReader) -> AdapterValues:
        """Read and check the values of an adapter.

        Raises:
            AdapterNotFoundError, AdapterFormatError: as `AdapterReader.data`, or its columns or
                values break a rule.
        """
        data, damage = reader.data(header)
        spans = header.tensors
        biased = [module for module in header.modules if f"{module}.bias" in spans]
        layout = self.order.layout(header.modules, header.config.k, biased)
        columns: list[Columns] = []
        for module, d_out in layout.d_outs.items():
            span = spans[f"{module}.index"]
            kind = _COLUMN_TYPES[span.dtype]
            columns.append(np.frombuffer(data, kind, d_out * layout.k, span.start))
        kinds = {spans[name].dtype for name in layout.of_tensor()}
        dtype = _VALUE_TYPES[kinds.pop()] if len(kinds) == 1 else torch.float32
        values = self._empty(layout.nnz, dtype)
        for name, part in layout.of_tensor().items():
            span = spans[name]
            own = torch.frombuffer(
                bytearray(data[span.start : span.stop]), dtype=_VALUE_TYPES[span.dtype]
            )
            values[part] = own
        head = None
        if (of_head := spans.get(HEAD)) is not None:
            stored = bytearray(data[of_head.start : of_head.stop])
            head = torch.frombuffer(stored, dtype=_VALUE_TYPES[of_head.dtype])
            head = head.view(of_head.shape).float()
        return self._checked(layout, columns, values, head, header.source, damage)

    def of(self, adapter: Adapter) -> AdapterValues:
        """Return the values of an adapter in memory that fits the base.

        Raises:
            AdapterFormatError: a value is so large that a weight could overflow.
        """
        biases = {m: part.bias for m, part in adapter.modules.items() if part.bias is not None}
        layout = self.order.layout(adapter.modules, adapter.config.k, biases)
        parts = [adapter.modules[module] for module in layout.d_outs]
        columns = [part.index.int().reshape(-1).numpy() for part in parts]
        tensors = [part.bypass.reshape(-1) for part in parts]
        tensors += [biases[module] for module in layout.of_bias()]
        dtypes = {tensor.dtype for tensor in tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        values = self._empty(layout.nnz, dtype)
        torch.cat([tensor.to(dtype) for tensor in tensors], out=values)
        head = None if adapter.head is None else adapter.head.float()
        return self._checked(layout, columns, values, head, repr(adapter.digest[:12]), [])

    def mix(self, parts: Sequence[tuple[AdapterValues, float]]) -> AdapterValues:
        """Return the weighted sum of adapters, float32, whatever tables and modules they have.

        Raises:
            AdapterFormatError: a value is so large that a weight could overflow.
        """
        tables = {id(values.table): values.table for values, _ in parts}
        if len(tables) == 1:
            table = next(iter(tables.values()))
            total = self._empty(table.layout.nnz, torch.float32).zero_()
            for values, weight in parts:
                total.add_(values.values.float(), alpha=weight)
            self._refuse_large(table.layout, total, "mixed")
            return AdapterValues(table, total)
        index, bypass = _union(parts, self._base)
        biases = _bias_sums(parts)
        k = next(iter(index.values())).shape[1]
        layout = self.order.layout(index, k, biases)
        columns = [index[module].reshape(-1).numpy() for module in layout.d_outs]
        total = self._empty(layout.nnz, torch.float32)
        tensors = [bypass[module].reshape(-1) for module in layout.d_outs]
        torch.cat(tensors + [biases[module] for module in layout.of_bias()], out=total)
        return self._checked(layout, columns, total, None, "mixed", [])

    def _empty(self, nnz: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(nnz, dtype=dtype, pin_memory=self._pin)

    def _checked(
        self,
        layout: Layout,
        columns: Sequence[Columns],
        values: Tensor,
        head: Tensor | None,
        source: str,
        damage: list[str],
    ) -> AdapterValues:
        table, faults = self._table(layout, columns)
        if not bool((values.abs().max() <= self._largest).item()):  # false for NaN too
            faults += value_faults({n: values[part] for n, part in layout.of_tensor().items()})
        if head is not None:
            faults += value_faults({HEAD: head})
        if faults or damage:  # which value is wrong says more than that some are
            raise AdapterFormatError(source, faults or damage)
        self._refuse_large(layout, values, source)
        assert table is not None
        return AdapterValues(table, values, head)

    def _refuse_large(self, layout: Layout, values: Tensor, source: str) -> None:
        if bool((values.abs().max() <= self._largest).item()):
            return
        raise AdapterFormatError(
            source,
            [
                f"a value of {name} is so large that a weight overflows {self._dtype}"
                for name, part in layout.of_tensor().items()
                if not bool((values[part].abs().max() <= self._largest).item())
            ],
        )

    def _table(
        self, layout: Layout, columns: Sequence[Columns]
    ) -> tuple[IndexTable | None, list[str]]:
        """Return the table of these columns, checked; None with its faults."""
        said = f"{layout.k} {tuple(layout.d_outs)} {tuple(layout.of_bias())}"
        digest = hashlib.sha256(said.encode())
        for part in columns:
            narrow = _narrowed(part)
            digest.update(narrow.dtype.str.encode())
            digest.update(narrow.tobytes())
        key = digest.digest()
        with self._lock:
            known = self._tables.get(key)
        if known is not None:
            return known, []
        index = torch.empty(layout.num_entries, dtype=torch.int32)
        faults: list[str] = []
        for (module, place), own in zip(layout.of_module().items(), columns, strict=True):
            index[place] = torch.from_numpy(own.astype(np.int32))
            rows = index[place].view(-1, layout.k)
            faults += index_faults(module, rows, self._base.shapes[module][1])
        if faults:
            return None, faults
        with self._lock:
            return self._tables.setdefault(key, IndexTable(layout, index)), []


def _narrowed(columns: Columns) -> Columns:
    """Return the index as 16-bit numbers if they fit: equal columns have equal bytes."""
    narrow = _COLUMN_TYPES["U16"]
    if columns.dtype == narrow or columns.min() < 0 or columns.max() > np.iinfo(narrow).max:
        return columns
    return columns.astype(narrow)


def realise(originals: Tensor, values: Tensor) -> Tensor:
    """Return what merging changes: float(round(W0 + v)) - float(W0), in the weights' dtype.

    Serving this instead of v makes a merged and an unmerged adapter one model. It is exact in the
    dtype wherever |v| <= |W0| / 2 (Sterbenz).

    Args:
        originals: [nnz] W0, the base's weights at the adapter's index, and its biases.
        values: [nnz] v, any float dtype, same device.
    """
    merged = merged_weights(originals, values)
    return (merged.float() - originals.float()).to(originals.dtype)


def merged_weights(originals: Tensor, values: Tensor) -> Tensor:
    """Return [nnz] round(W0 + v) in the weights' dtype; arguments as in `realise`."""
    return (originals.float() + values.float()).to(originals.dtype)


def _union(
    parts: Sequence[tuple[AdapterValues, float]], base: BaseSpec
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return module -> index and module -> values [d_out, k] of a weighted sum, one k for all
    modules.

    A row keeps the columns that any adapter keeps, the first adapter's first; what several keep is
    added up. Rows with fewer are padded with unused columns and zeros.
    """
    by_module: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for values, weight in parts:
        layout = values.table.layout
        for module, own in layout.of_module().items():
            index = values.table.index[own].view(-1, layout.k)
            scaled = values.values[own].view(-1, layout.k).float() * weight
            by_module.setdefault(module, []).append((index, scaled))
    joined = {module: _joined(pairs) for module, pairs in by_module.items()}
    k = max(int(kept.sum(1).max()) for _, _, kept in joined.values())
    every_index, every_bypass = dict[str, Tensor](), dict[str, Tensor]()
    for module, (columns, sums, kept) in joined.items():
        index, bypass = _padded(columns, sums, kept, k, base.shapes[module][1])
        every_index[module], every_bypass[module] = index, bypass
    return every_index, every_bypass


def _bias_sums(parts: Sequence[tuple[AdapterValues, float]]) -> dict[str, Tensor]:
    """Return module -> [d_out] the weighted sum of what adapters add to its bias."""
    sums: dict[str, Tensor] = {}
    for values, weight in parts:
        for module, own in values.table.layout.of_bias().items():
            scaled = values.values[own].float() * weight
            sums[module] = sums[module] + scaled if module in sums else scaled
    return sums


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Join columns and values side by side [d_out, sum of k], and mark the first of each column,
    which has the sum of all its values."""
    columns = torch.cat([index for index, _ in parts], 1)
    values = torch.cat([own for _, own in parts], 1)
    kept = torch.ones_like(columns, dtype=torch.bool)
    sums = torch.zeros_like(values)
    for j in range(columns.shape[1]):
        same = columns == columns[:, j : j + 1]
        sums[:, j] = (values * same).sum(1)
        kept[:, j] = ~same[:, :j].any(1)
    return columns, sums, kept


def _padded(
    columns: Tensor, sums: Tensor, kept: Tensor, k: int, d_in: int
) -> tuple[Tensor, Tensor]:
    """Put the kept columns of every row first, then the lowest unused ones with the value 0: [_,
    k].

    Raises:
        AdapterFormatError: a row has no k columns.
    """
    if k > d_in:
        raise AdapterFormatError(
            "mixed", [f"it keeps {k} inputs of some neuron, and another module has only {d_in}"]
        )
    d_out, wide = columns.shape
    spare = torch.arange(min(d_in, k + wide), dtype=torch.int32).expand(d_out, -1)
    unused = torch.ones(spare.shape, dtype=torch.bool)
    for j in range(wide):  # a column that is kept is no spare one
        unused &= spare != columns[:, j : j + 1]
    every = torch.cat([columns, spare], 1)
    first = torch.cat([torch.where(kept, 0, 2), torch.where(unused, 1, 2)], 1)
    order = first.sort(dim=1, stable=True).indices[:, :k]
    padded = torch.cat([sums, torch.zeros(spare.shape)], 1)
    return every.gather(1, order), padded.gather(1, order)
