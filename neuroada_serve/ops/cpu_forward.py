"""Runs a whole decoder forward over a few tokens as one kernel, `cpu_forward_kernels.py`."""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.ops import cpu_blocks as blocks
from neuroada_serve.ops import cpu_team
from neuroada_serve.ops.bypass import BypassTable
from neuroada_serve.ops.cpu_team import forward_kernels
from neuroada_serve.ops.matrix import PackedMatrix
from neuroada_serve.ops.step_plan import StepPlan, TokenRun

_ALIGNMENT = 64  # bytes
_MOST_LAYOUTS = 64


@dataclass(frozen=True)
class Norm:
    """y = weight * x / sqrt(mean(x * x) + eps); weight [width] bf16."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Product:
    """y = W x + b; bias [d_out] bf16.

    site: where its adapters are found.
    """

    weight: PackedMatrix
    bias: Tensor | None = None
    site: str | None = None


@dataclass(frozen=True)
class Attention:
    """Rotary attention.

    layer: its number in the KV cache.
    window: a token sees this many, itself included; None for all.
    q_norm, k_norm: over head_dim, before the rotation; both or none.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    window: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class Layer:
    """x += o(attend(qkv(norm(x)))), then x += down(silu(gate(n)) * up(n)) for n = norm(x)."""

    attention_norm: Norm
    qkv: Product
    attention: Attention
    o: Product
    mlp_norm: Norm
    gate_up: Product
    down: Product

    @property
    def products(self) -> tuple[Product, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class Decoder:
    """A Llama-like model in bf16.

    embedding: [vocab, hidden].
    rotary: positions [1, T] -> (cos, sin), each [1, T, head_dim] bf16.
    """

    embedding: Tensor
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]]
    layers: Sequence[Layer]
    norm: Norm
    head: Product


@dataclass(frozen=True)
class Tokens:
    """The tokens of a forward.

    ids, positions, slots: [T] int64; no two of one slot and position. A slot is a row of the block
        tables.
    context_length: beyond every position.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    context_length: int


@dataclass(frozen=True)
class Caches:
    """Keys and values of every layer, in blocks. Their memory and that of the tables stays.

    tables: [slots, blocks of a slot] int32, contiguous: where a sequence's positions are.
    block_tokens: positions in a block; a power of two, at least 16.
    layer: number -> (keys, values), each [blocks, kv_heads, block_tokens, head_dim] bf16, blocks a
        common stride apart and contiguous in themselves.
    """

    tables: Tensor
    block_tokens: int
    layer: Callable[[int], tuple[Tensor, Tensor]]


class CpuForward:
    """The forward of one decoder, set up once for at most max_tokens tokens.

    Args:
        decoder: weights stay where they are, and may change in place between runs.
    """

    def __init__(self, decoder: Decoder, max_tokens: int) -> None:
        self._decoder = decoder
        self.max_tokens = max_tokens
        self._threads = torch.get_num_threads()
        self._kept: list[Any] = []  # what the blocks hold addresses of
        self._products: list[tuple[Product, blocks.ProductBlock]] = []
        self._attentions: list[tuple[Attention, blocks.AttentionBlock]] = []
        self._ops: list[tuple[int, ctypes.Structure]] = []
        # By the layout of a plan: for every product its tables and what the kernel reads of them.
        self._calls: dict[tuple[int, ...], list[tuple[list[BypassTable], Any]]] = {}
        self._lanes: list[blocks.LanesBlock] = []  # by group of the plan, filled in every step
        self._layout: tuple[int, ...] = ()  # that the blocks are set to
        self._runs: list[Any] = []  # what the blocks hold addresses of, while there are runs
        self._caches: Caches | None = None  # that the blocks are set to
        self._hidden, self._normed, self._logits = self._set_up()
        self._largest_d_in = max(product.weight.d_in for product, _ in self._products)
        self._group = max(a.heads // a.kv_heads for a, _ in self._attentions)
        self._step = blocks.StepBlock()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._nothing = self._logits, self._scratch
        self._program = self._new_program()

    def __call__(self, tokens: Tokens, kept: Tensor, caches: Caches, plan: StepPlan) -> Tensor:
        """
        Args:
            tokens: at most max_tokens.
            kept: [n] int64, the tokens whose logits are wanted.
            caches: get the tokens' keys and values; the same in every run.
            plan: of the tokens' adapters; without biases.

        Returns:
            [n, vocab] float32, rounded to bf16; valid until the next run.
        """
        step, kernels, num_tokens = self._step, forward_kernels(), len(tokens.ids)
        positions, slots = tokens.positions, tokens.slots
        assert num_tokens <= self.max_tokens
        cos, sin = self._decoder.rotary(positions[None])
        torch.index_select(self._decoder.embedding, 0, tokens.ids, out=self._hidden[:num_tokens])
        step.num_tokens, step.num_kept = num_tokens, len(kept)
        step.positions, step.slots = positions.data_ptr(), slots.data_ptr()
        step.kept, step.cos, step.sin = kept.data_ptr(), cos.data_ptr(), sin.data_ptr()
        if caches is not self._caches:
            self._set_caches(caches)
        if len(self._logits) < len(kept):
            self._logits = torch.empty(len(kept), self._decoder.head.weight.d_out)
            self._products[-1][1].y = self._logits.data_ptr()
        self._set_calls(plan)
        self._set_runs(plan.runs)
        lanes = [token_slots.cpu_block for token_slots in plan.token_slots]
        for own, block in zip(self._lanes, lanes, strict=False):
            ctypes.memmove(ctypes.byref(own), ctypes.byref(block), ctypes.sizeof(block))
        num_lanes = sum(block.num_lanes + blocks.LANES for block in lanes)
        largest_k = step.largest_k = plan.largest_k
        product_bytes = kernels.scratch_bytes(num_tokens, num_lanes, self._largest_d_in, largest_k)
        attention_bytes = blocks.attention_scratch_bytes(self._group, tokens.context_length)
        self._reserve(max(product_bytes, attention_bytes))
        self._run()
        return self._logits[: len(kept)]

    def seen_by_head(self, num_kept: int) -> Tensor:
        """[num_kept, hidden] bf16, of which the last run's logits are; valid until the next run."""
        return self._normed[:num_kept]

    def release(self) -> None:
        """Release memory that grows with the tokens of a run and their context."""
        self._logits, self._scratch = self._nothing  # made before: there may be no memory now

    def _set_caches(self, caches: Caches) -> None:
        for attention, block in self._attentions:
            keys, values = caches.layer(attention.layer)
            assert keys.shape[2] == caches.block_tokens
            blocks.set_cache(block, keys, values, caches.tables)
        self._caches = caches

    def _set_calls(self, plan: StepPlan) -> None:
        """Hand every product the calls of the plan's layout."""
        if plan.layout == self._layout:
            return
        if plan.layout[:1] != self._layout[:1] or len(self._calls) > _MOST_LAYOUTS:
            self._calls, self._layout = {}, ()  # of memory as it was, or too many
        self._lanes += [blocks.LanesBlock() for _ in plan.groups[len(self._lanes) :]]
        if plan.layout not in self._calls:
            self._calls[plan.layout] = [self._calls_of(p.site, plan) for p, _ in self._products]
        for (_, block), (tables, array) in zip(
            self._products, self._calls[plan.layout], strict=True
        ):
            block.num_calls, block.calls = len(tables), ctypes.addressof(array)
        self._layout = plan.layout

    def _calls_of(self, site: str | None, plan: StepPlan) -> tuple[list[BypassTable], Any]:
        tables: list[BypassTable] = []
        addresses: list[int] = []
        for lanes, (by_site, _) in zip(self._lanes, plan.groups, strict=False):
            for table in () if site is None else by_site.get(site, ()):
                tables.append(table)
                addresses += [_address(table), ctypes.addressof(lanes)]
        return tables, _array(addresses)

    def _set_runs(self, runs: Sequence[TokenRun]) -> None:
        """Hand every product the runs of this step."""
        if not runs and not self._runs:
            return
        kept: list[Any] = [runs]
        arrays: list[Any] = []
        for product, _ in self._products:
            entries: list[int] = []
            for run in runs if product.site is not None else ():
                added = run.added(product.site or "")
                adds = _array(n for t, slot, sign in added for n in (_address(t), slot, sign))
                entries += [run.start, run.stop, ctypes.addressof(adds), len(added)]
                kept.append(adds)
            arrays.append(_array(entries))
        # Only now that all is there: until then, the blocks' old addresses hold.
        for (_, block), array in zip(self._products, arrays, strict=True):
            block.num_runs, block.runs = len(array) // 4, ctypes.addressof(array)
        self._runs = [kept, arrays] if runs else []

    def _set_up(self) -> tuple[Tensor, Tensor, Tensor]:
        """Make buffers for the activations, and a block of arguments for every operation.

        Returns:
            The hidden states, the same after a norm, and the logits, which have no room yet.
        """
        decoder = self._decoder
        rows = self.max_tokens + forward_kernels().CHUNK  # products read beyond the last token

        def buffer(width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype)

        hidden = decoder.embedding.shape[1]
        x, normed = buffer(hidden), buffer(hidden)
        qkv = buffer(max(layer.qkv.weight.d_out for layer in decoder.layers))
        attended = buffer(max(layer.o.weight.d_in for layer in decoder.layers))
        gated = buffer(max(layer.down.weight.d_in for layer in decoder.layers))
        logits = torch.empty(0, decoder.head.weight.d_out)
        self._kept += [qkv, attended, gated]

        for layer in decoder.layers:
            self._norm(layer.attention_norm, x, normed)
            self._product(layer.qkv, normed, qkv, blocks.STORE)
            self._attention(layer.attention, qkv, attended)
            self._product(layer.o, attended, x, blocks.ADD)
            self._norm(layer.mlp_norm, x, normed)
            self._product(layer.gate_up, normed, gated, blocks.GATE)
            self._product(layer.down, gated, x, blocks.ADD)
        self._norm(decoder.norm, x, normed, is_last=True)
        self._product(decoder.head, normed, logits, blocks.LOGITS)
        return x, normed, logits

    def _norm(self, norm: Norm, x: Tensor, y: Tensor, is_last: bool = False) -> None:
        block = blocks.NormBlock(
            x=x.data_ptr(),
            y=y.data_ptr(),
            width=len(norm.weight),
            weight=norm.weight.data_ptr(),
            is_last=is_last,
            eps=norm.eps,
        )
        self._ops.append((blocks.NORM, block))

    def _product(self, product: Product, x: Tensor, y: Tensor, epilogue: int) -> None:
        weight, bias = product.weight, product.bias
        assert x.shape[1] == weight.d_in
        block = blocks.ProductBlock(
            weight=weight.entries.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            num_rows=weight.d_out,
            d_in=weight.d_in,
            x=x.data_ptr(),
            y=y.data_ptr(),
            y_stride=y.shape[1],
            epilogue=epilogue,
        )
        self._ops.append((blocks.PRODUCT, block))
        self._products.append((product, block))

    def _attention(self, attention: Attention, qkv: Tensor, out: Tensor) -> None:
        for operation in (blocks.ROTATE, blocks.ATTEND):
            block = blocks.AttentionBlock(
                kind=blocks.KINDS[qkv.dtype],
                query=qkv.data_ptr(),
                query_stride=qkv.shape[1],
                head_stride=attention.head_dim,
                out=out.data_ptr(),
                heads=attention.heads,
                kv_heads=attention.kv_heads,
                head_dim=attention.head_dim,
                window=attention.window or 0,
                scale=attention.scaling,
            )
            if attention.q_norm is not None and attention.k_norm is not None:
                block.q_norm = attention.q_norm.weight.data_ptr()
                block.k_norm = attention.k_norm.weight.data_ptr()
                block.head_eps = attention.q_norm.eps
            self._ops.append((operation, block))
            self._attentions.append((attention, block))

    def _new_program(self) -> blocks.ProgramBlock:
        ops = _array(n for kind, block in self._ops for n in (kind, ctypes.addressof(block)))
        self._kept.append(ops)
        step = ctypes.addressof(self._step)
        return blocks.ProgramBlock(num_ops=len(self._ops), ops=ctypes.addressof(ops), step=step)

    def _reserve(self, size_bytes: int) -> None:
        """Scratch memory for every thread."""
        aligned = -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        needed = aligned * self._threads + _ALIGNMENT
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(2 * needed, dtype=torch.uint8)
        start = -(-self._scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self._program.scratch, self._program.scratch_bytes = start, aligned

    def _run(self) -> None:
        threads = min(self._threads, torch.get_num_threads())
        cpu_team.run_program(self._program, threads)


def _array(numbers: Iterable[int]) -> Any:
    """Numbers as kernels read them."""
    values = list(numbers)
    return (ctypes.c_int64 * len(values))(*values)


def _address(table: BypassTable) -> int:
    block = table.cpu_block
    assert block is not None, "values are kept in the weights' dtype, which the kernels have"
    return ctypes.addressof(block)


def prepare() -> None:
    """Compile all CPU kernels, or load them from numba's cache, before they are first needed."""
    forward_kernels()


def available() -> bool:
    """Tell if there are kernels, and a team of threads that can wait for each other."""
    return forward_kernels() is not None and (torch.get_num_threads() == 1 or cpu_team.has_team())
