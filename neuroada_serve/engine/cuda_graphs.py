"""Decode steps as CUDA graphs: one launch replays a whole forward.

A decode step of a small batch is thousands of launches of a few microseconds each; a graph takes
them all at once. Graphs have fixed shapes, so a step is padded to the next bucket; everything that
changes between steps (ids, positions, KV slots, adapter slots) is read from one static tensor that
is filled before the replay. Padding rows have KV slot -1, which reads and writes nothing.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.ops.bypass import NO_SLOT
from neuroada_serve.ops.step_plan import StepPlan

logger = logging.getLogger(__name__)

# (ids, positions, slots, plan) -> logits [bucket, vocab]; the first three are [bucket] int32
Forward = Callable[[Tensor, Tensor, Tensor, StepPlan], Tensor]
# Records what a function launches; calling the result launches it all again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

_MAX_GRAPHS = 96
_WARM_UPS = 2


def buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes that have graphs: 1, 2, 4, then every multiple of 8, and the largest."""
    sizes = {1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))


def cuda_capture() -> Capture:
    """Captures on a side stream, all graphs in one memory pool."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    pool = torch.cuda.graph_pool_handle()

    def capture(launch: Callable[[], None]) -> Callable[[], None]:
        # Kernels are compiled, and libraries take their workspaces, before anything is recorded.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                launch()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            launch()
        return graph.replay

    return capture


@dataclass(frozen=True)
class DecodeRows:
    """One token of each decoding sequence."""

    ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]  # KV cache slots

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.positions) == len(self.slots)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Graph:
    inputs: Tensor  # [rows, width] int32: ids, positions, slots, two rows per group
    replay: Callable[[], None]


class DecodeGraphs:
    """The graphs of one model, captured when first needed; the least used are evicted.

    Args:
        forward: what is captured.
        device: of the static tensors.
        max_num_seqs: the largest bucket.
        capture: `cuda_capture()`; a test may give its own.
    """

    def __init__(
        self,
        forward: Forward,
        device: torch.device,
        max_num_seqs: int,
        capture: Capture,
        max_graphs: int = _MAX_GRAPHS,
    ) -> None:
        self._forward = forward
        self._device = device
        self._buckets = buckets(max_num_seqs)
        self._capture = capture
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._memory: Hashable = None  # which allocations the graphs read
        self._logits: Tensor | None = None  # [largest bucket, vocab] float32, shared by all graphs
        self._failed = False

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Discard all graphs; needed when the model's own code changes."""
        self._graphs.clear()

    def bucket(self, num_seqs: int) -> int:
        """The smallest batch size with a graph that holds num_seqs sequences."""
        return next(size for size in self._buckets if size >= num_seqs)

    def run(self, rows: DecodeRows, plan: StepPlan, cache_version: int) -> Tensor | None:
        """Replay one decode step.

        Args:
            rows: at most max_num_seqs.
            plan: of `bucket(len(rows))` tokens.
            cache_version: changes whenever the KV cache moves.

        Returns:
            [len(rows), vocab] float32, valid until the next step; None where this step, or since
            a failed capture every step, must run without a graph.
        """
        if self._failed or plan.runs:  # a run changes the weights, by its length
            return None
        bucket = self.bucket(len(rows))
        version, *groups = plan.layout
        if (version, cache_version) != self._memory:
            self._graphs.clear()
            self._memory = (version, cache_version)

        host = self._host_inputs(rows, plan, bucket)
        graph = self._graphs.get((bucket, *groups))
        if graph is None:
            try:
                graph = self._new_graph(host, plan, bucket)
            except Exception:
                logger.warning("no CUDA graph can be captured; steps run without", exc_info=True)
                self._failed = True
                self._graphs.clear()
                return None
            self._graphs[(bucket, *groups)] = graph
            while len(self._graphs) > self._max_graphs:
                self._graphs.popitem(last=False)
        else:
            self._graphs.move_to_end((bucket, *groups))
            graph.inputs.copy_(host, non_blocking=True)
        graph.replay()
        assert self._logits is not None
        return self._logits[: len(rows)]

    def _host_inputs(self, rows: DecodeRows, plan: StepPlan, bucket: int) -> Tensor:
        """[rows, width] int32, pinned where the device is a GPU, so that the copy need not wait."""
        width, pad = max(4, bucket), bucket - len(rows)
        lines: list[list[int]] = [
            [*rows.ids, *[0] * pad],
            [*rows.positions, *[0] * pad],
            [*rows.slots, *[-1] * pad],
        ]
        for token_slots in plan.token_slots:
            assert len(token_slots.slots) == bucket
            merged = token_slots.merged_slot
            lines += [list(token_slots.slots), [NO_SLOT if merged is None else merged] * bucket]
        padded = [line + [0] * (width - bucket) for line in lines]
        return torch.tensor(padded, dtype=torch.int32, pin_memory=self._device.type == "cuda")

    def _new_graph(self, host: Tensor, plan: StepPlan, bucket: int) -> _Graph:
        inputs = host.to(self._device)
        ids, positions, slots, *planes = inputs[:, :bucket]
        pairs = [(planes[i], planes[i + 1][:1]) for i in range(0, len(planes), 2)]
        static = plan.with_static(pairs)

        def launch() -> None:
            logits = self._forward(ids, positions, slots, static)
            if self._logits is None:  # in the first warm-up, so outside the graphs' memory
                shape = (self._buckets[-1], logits.shape[-1])
                self._logits = torch.empty(shape, dtype=torch.float32, device=logits.device)
            self._logits[:bucket] = logits

        return _Graph(inputs, self._capture(launch))
