"""Runs a whole decoder forward over a few tokens as one kernel, `cpu_forward_kernels.py`."""

import ctypes
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.ops import cpu_bypass
from neuroada_serve.ops.cpu_product import forward_kernels
from neuroada_serve.ops.matrix import PackedMatrix

_ALIGNMENT = 64  # bytes
_MOST_PLANS = 64


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
    """What a forward computes.

    ids, positions, slots: [T] int64; no two of one slot and position.
    context_length: beyond every position.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    context_length: int


@dataclass(frozen=True)
class Call:
    """One table's share in a product: rows first_row and on, for the lanes of this number."""

    launch: cpu_bypass.BypassLaunch
    first_row: int
    lanes: int


@dataclass(frozen=True)
class RunAdd:
    """One table's share in the weight that a run is multiplied by: sign times a slot's values."""

    launch: cpu_bypass.BypassLaunch
    first_row: int
    slot: int
    sign: int


@dataclass(frozen=True)
class RunAdditions:
    """Tokens start..stop - 1, which are multiplied by weights that hold their adapter's values.

    adds: site -> what is added to its weight, one after the other.
    """

    start: int
    stop: int
    adds: Callable[[str], Sequence[RunAdd]]


@dataclass(frozen=True)
class Additions:
    """What adapters add in one forward.

    version: changes whenever the memory that calls read does.
    layout: of one version and equal layouts, the calls are equal; what differs from step to step is
        in `lanes`.
    calls: site -> its calls.
    runs: in the order of their tokens, which are in no call.
    """

    version: int
    layout: Hashable
    lanes: Sequence[cpu_bypass.Lanes]
    calls: Callable[[str], Sequence[Call]]
    runs: Sequence[RunAdditions] = ()


@dataclass(frozen=True)
class Caches:
    """Keys and values of every layer, [slots, kv_heads, tokens, head_dim] bf16, contiguous.

    version: changes whenever their memory does.
    """

    version: int
    layer: Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Plan:
    """Calls of one layout as the kernel reads them.

    lanes: the blocks of lanes that they read, filled anew in every step.
    products: per product (number of calls, address of their list).
    kept: what there are addresses of.
    """

    lanes: list[Any]
    products: list[tuple[int, int]]
    largest_k: int
    kept: list[Any]


class CpuForward:
    """The forward of one decoder, set up once for at most max_tokens tokens.

    Args:
        decoder: weights stay where they are, and may change in place between runs.
    """

    def __init__(self, decoder: Decoder, max_tokens: int) -> None:
        self._decoder = decoder
        self.max_tokens = max_tokens
        self._at = forward_kernels()
        self._threads = torch.get_num_threads()
        self._kept: list[Any] = []  # what the blocks hold addresses of
        self._products: list[tuple[Product, Any]] = []
        self._attentions: list[tuple[Attention, Any]] = []
        self._ops: list[tuple[int, Any]] = []
        self._plans: dict[Hashable, _Plan] = {}
        self._version: int | None = None  # of the plans
        self._runs: list[Any] = []  # what the blocks hold addresses of, while there are runs
        self._layout: Hashable = None  # that the blocks are set to
        self._caches_version: int | None = None
        self._hidden, self._normed, self._logits, self._head_block = self._set_up()
        self._largest_d_in = max(product.weight.d_in for product, _ in self._products)
        self._group = max(a.heads // a.kv_heads for a, _ in self._attentions)
        self._step = (ctypes.c_int64 * self._at.NUM_STEP_FIELDS)()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._program = self._new_program()

    def __call__(
        self, tokens: Tokens, kept: Tensor, caches: Caches, additions: Additions
    ) -> Tensor:
        """
        Args:
            tokens: at most max_tokens.
            kept: [n] int64, the tokens whose logits are wanted.
            caches: get the tokens' keys and values.
            additions: of the tokens' adapters.

        Returns:
            [n, vocab] float32, rounded to bf16; valid until the next run.
        """
        at, step, num_tokens = self._at, self._step, len(tokens.ids)
        positions, slots = tokens.positions, tokens.slots
        assert num_tokens <= self.max_tokens
        cos, sin = self._decoder.rotary(positions[None])
        torch.index_select(self._decoder.embedding, 0, tokens.ids, out=self._hidden[:num_tokens])
        step[at.NUM_TOKENS], step[at.NUM_KEPT] = num_tokens, len(kept)
        step[at.POSITIONS], step[at.SLOTS] = positions.data_ptr(), slots.data_ptr()
        step[at.KEPT], step[at.COS], step[at.SIN] = kept.data_ptr(), cos.data_ptr(), sin.data_ptr()
        if caches.version != self._caches_version:
            self._set_caches(caches)
        if len(self._logits) < len(kept):
            self._logits = torch.empty(len(kept), self._decoder.head.weight.d_out)
            self._head_block[at.Y] = self._logits.data_ptr()
        plan = self._plan_for(additions)
        for own, lanes in zip(plan.lanes, additions.lanes, strict=True):
            own[:] = lanes.block
        num_lanes = sum(lanes.num_lanes + at.LANES for lanes in additions.lanes)
        largest_k = step[at.LARGEST_K] = max(plan.largest_k, self._set_runs(additions.runs))
        product_bytes = at.scratch_bytes(num_tokens, num_lanes, self._largest_d_in, largest_k)
        attention_bytes = at.attention_scratch_bytes(self._group, tokens.context_length)
        self._reserve(max(product_bytes, attention_bytes))
        self._run()
        return self._logits[: len(kept)]

    def seen_by_head(self, num_kept: int) -> Tensor:
        """[num_kept, hidden] bf16, of which the last run's logits are; valid until the next run."""
        return self._normed[:num_kept]

    def release(self) -> None:
        """Give back what grows with the tokens of a run and their context."""
        self._logits = torch.empty(0, self._decoder.head.weight.d_out)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def _set_caches(self, caches: Caches) -> None:
        at = self._at
        for attention, block in self._attentions:
            keys, values = caches.layer(attention.layer)
            block[at.KEYS], block[at.VALUES] = keys.data_ptr(), values.data_ptr()
            block[at.MAX_TOKENS] = keys.shape[2]
        self._caches_version = caches.version

    def _plan_for(self, additions: Additions) -> _Plan:
        """Hand every product the calls of a layout."""
        at = self._at
        if additions.version != self._version or len(self._plans) > _MOST_PLANS:
            self._plans, self._version, self._layout = {}, additions.version, None
        plan = self._plans.get(additions.layout)
        if plan is None:
            plan = self._plans[additions.layout] = self._new_plan(additions)
        if additions.layout != self._layout:
            for (_, block), (count, address) in zip(self._products, plan.products, strict=True):
                block[at.NUM_CALLS], block[at.CALLS] = count, address
            self._layout = additions.layout
        return plan

    def _set_runs(self, runs: Sequence[RunAdditions]) -> int:
        """Hand every product the runs of this step; their largest k."""
        at, largest_k = self._at, 0
        if not runs and not self._runs:
            return 0
        kept: list[Any] = []
        lists: list[Any] = []
        for product, _ in self._products:
            entries: list[int] = []
            for run in runs if product.site is not None else ():
                adds: list[int] = []
                for add in run.adds(product.site or ""):
                    adds += [add.launch.address, add.first_row, add.slot, add.sign]
                    largest_k = max(largest_k, add.launch.k)
                    kept.append(add.launch)
                array = (ctypes.c_int64 * len(adds))(*adds)
                kept.append(array)
                entries += [run.start, run.stop, ctypes.addressof(array), len(adds) // 4]
            lists.append((ctypes.c_int64 * len(entries))(*entries))
        # Only now that all is there: until then, the blocks' old addresses hold.
        for (_, block), array in zip(self._products, lists, strict=True):
            block[at.NUM_RUNS], block[at.RUNS] = len(array) // 4, ctypes.addressof(array)
        self._runs = [*kept, *lists] if runs else []
        return largest_k

    def _new_plan(self, additions: Additions) -> _Plan:
        lanes = [own.copy() for own in additions.lanes]
        products: list[tuple[int, int]] = []
        largest_k, kept = 0, list[Any]()
        for product, _ in self._products:
            calls = () if product.site is None else additions.calls(product.site)
            entries: list[int] = []
            for call in calls:
                block = call.launch.arguments(ctypes.addressof(lanes[call.lanes]))
                entries += [ctypes.addressof(block), call.first_row]
                kept += [block, call.launch]
                largest_k = max(largest_k, call.launch.k)
            array = (ctypes.c_int64 * len(entries))(*entries)
            products.append((len(calls), ctypes.addressof(array)))
            kept.append(array)
        return _Plan(lanes, products, largest_k, kept)

    def _set_up(self) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Buffers for the activations, and a block of arguments for every operation.

        Returns:
            The hidden states, the same after a norm, the logits, which have no room yet, and the
            head's block.
        """
        at, decoder = self._at, self._decoder
        rows = self.max_tokens + at.CHUNK  # products read beyond the last token

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
            self._product(layer.qkv, normed, qkv, at.STORE)
            self._attention(layer.attention, qkv, attended)
            self._product(layer.o, attended, x, at.ADD)
            self._norm(layer.mlp_norm, x, normed)
            self._product(layer.gate_up, normed, gated, at.GATE)
            self._product(layer.down, gated, x, at.ADD)
        self._norm(decoder.norm, x, normed, is_last=True)
        self._product(decoder.head, normed, logits, at.LOGITS)
        return x, normed, logits, self._products[-1][1]

    def _block(self, kind: int) -> Any:
        block = (ctypes.c_int64 * self._at.NUM_OP_FIELDS)()
        self._ops.append((kind, block))
        return block

    def _number(self, value: float) -> int:
        """The address of a float32."""
        number = ctypes.c_float(value)
        self._kept.append(number)
        return ctypes.addressof(number)

    def _norm(self, norm: Norm, x: Tensor, y: Tensor, is_last: bool = False) -> None:
        at, block = self._at, self._block(self._at.NORM)
        block[at.NORM_X], block[at.NORM_Y] = x.data_ptr(), y.data_ptr()
        block[at.NORM_WEIGHT], block[at.NORM_WIDTH] = norm.weight.data_ptr(), len(norm.weight)
        block[at.NORM_EPS], block[at.NORM_IS_LAST] = self._number(norm.eps), int(is_last)

    def _product(self, product: Product, x: Tensor, y: Tensor, epilogue: int) -> None:
        at, block = self._at, self._block(self._at.PRODUCT)
        weight, bias = product.weight, product.bias
        assert x.shape[1] == weight.d_in
        block[at.WEIGHT] = weight.entries.data_ptr()
        block[at.BIAS] = 0 if bias is None else bias.data_ptr()
        block[at.NUM_ROWS], block[at.D_IN] = weight.d_out, weight.d_in
        block[at.X], block[at.Y], block[at.Y_STRIDE] = x.data_ptr(), y.data_ptr(), y.shape[1]
        block[at.EPILOGUE] = epilogue
        self._products.append((product, block))

    def _attention(self, attention: Attention, qkv: Tensor, out: Tensor) -> None:
        at = self._at
        rotate, attend = self._block(at.ROTATE), self._block(at.ATTEND)
        for block in (rotate, attend):
            block[at.QKV], block[at.QKV_STRIDE] = qkv.data_ptr(), qkv.shape[1]
            block[at.OUT] = out.data_ptr()
            block[at.HEADS], block[at.KV_HEADS] = attention.heads, attention.kv_heads
            block[at.HEAD_DIM] = attention.head_dim
            block[at.SCALE] = self._number(attention.scaling)
            block[at.WINDOW] = attention.window or 0
            if attention.q_norm is not None and attention.k_norm is not None:
                block[at.Q_NORM] = attention.q_norm.weight.data_ptr()
                block[at.K_NORM] = attention.k_norm.weight.data_ptr()
                block[at.HEAD_EPS] = self._number(attention.q_norm.eps)
            self._attentions.append((attention, block))

    def _new_program(self) -> Any:
        at = self._at
        ops = (ctypes.c_int64 * (2 * len(self._ops)))()
        for i, (kind, block) in enumerate(self._ops):
            ops[2 * i], ops[2 * i + 1] = kind, ctypes.addressof(block)
        program = (ctypes.c_int64 * at.NUM_PROGRAM_FIELDS)()
        program[at.NUM_OPS], program[at.OPS] = len(self._ops), ctypes.addressof(ops)
        program[at.STEP] = ctypes.addressof(self._step)
        self._kept.append(ops)
        return program

    def _reserve(self, size_bytes: int) -> None:
        """Scratch memory for every thread."""
        at, aligned = self._at, -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        needed = aligned * self._threads + _ALIGNMENT
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(2 * needed, dtype=torch.uint8)
        start = -(-self._scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self._program[at.SCRATCH], self._program[at.SCRATCH_BYTES] = start, aligned

    def _run(self) -> None:
        threads = min(self._threads, torch.get_num_threads())
        cpu_bypass.run_team(self._at.run, self._program, self._at.BARRIER, threads)


def prepare() -> None:
    """Compile all CPU kernels, or load them from numba's cache, before they are first needed."""
    forward_kernels()


def available() -> bool:
    """Whether there are kernels, and a team of threads that can wait for each other."""
    return forward_kernels() is not None and (torch.get_num_threads() == 1 or cpu_bypass.has_team())
