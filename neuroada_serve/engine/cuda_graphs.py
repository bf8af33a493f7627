"""Decode steps as CUDA graphs: one launch replays a whole forward.

A decode step of a small batch is thousands of launches of a few microseconds each; a graph takes
them all at once. Graphs have fixed shapes, so a step is padded to the next bucket; everything that
changes between steps (ids, positions, KV slots, adapter slots) is read from one static tensor that
is filled before the replay. Padding rows have KV slot -1, which reads and writes nothing. Where a
graph cannot be captured, its steps run without, and it is tried again later.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.engine.faults import raise_device_fault
from neuroada_serve.engine.memory import is_out_of_memory
from neuroada_serve.engine.retry import Retry
from neuroada_serve.ops.bypass import NO_SLOT
from neuroada_serve.ops.step_plan import StepPlan

logger = logging.getLogger(__name__)

# (ids, positions, slots, plan) -> logits [bucket, vocab]; the first three are [bucket] int32
Forward = Callable[[Tensor, Tensor, Tensor, StepPlan], Tensor]
# Records what a function launches; calling the result launches it all again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

_MAX_GRAPHS = 96
_WARM_UPS = 2
_FIRST_PAUSE, _LONGEST_PAUSE = 64, 4096  # steps without a new graph after a failure


def buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes that have graphs: 1, 2, 4, then every multiple of 8, and the largest."""
    sizes = {1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))


def cuda_capture() -> Capture:
    """Captures on a side stream, all graphs in one memory pool."""

    def new_place() -> tuple[Any, Any]:
        return torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    stream, pool = new_place()

    def capture(launch: Callable[[], None]) -> Callable[[], None]:
        nonlocal stream, pool
        before = torch.cuda.current_stream()
        try:
            # Kernels are compiled, and libraries take their workspaces, before it is recorded.
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    launch()
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                launch()
        except BaseException:
            # A recording that fails need not end: torch may leave its stream the current one, and
            # its pool in the middle of a capture.
            torch.cuda.set_stream(before)
            stream, pool = new_place()
            raise
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
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()  # the least used first
        self._memory_version = -1  # of the adapters' memory that the graphs read
        self._logits: Tensor | None = None  # [largest bucket, vocab] float32, shared by all graphs
        self._retry = Retry(_FIRST_PAUSE, _LONGEST_PAUSE)

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def num_failed_captures(self) -> int:
        """Times that no graph could be captured where one was wanted."""
        return self._retry.num_failed

    def clear(self) -> None:
        """Discard all graphs; needed when the model's own code changes."""
        self._graphs.clear()

    def bucket(self, num_seqs: int) -> int:
        """The smallest batch size with a graph that holds num_seqs sequences."""
        return next(size for size in self._buckets if size >= num_seqs)

    def run(self, rows: DecodeRows, plan: StepPlan) -> Tensor | None:
        """Replay one decode step.

        Args:
            rows: at most max_num_seqs.
            plan: of `bucket(len(rows))` tokens.

        Returns:
            [len(rows), vocab] float32, valid until the next step; None where this step must run
            without a graph.

        Raises:
            DeviceError: the capture has shown that the device works no more.
        """
        if plan.runs:  # a run changes the weights, by its length
            return None
        self._retry.pass_turn()
        bucket = self.bucket(len(rows))
        key = self._key(plan, bucket)
        host = self._host_inputs(rows, plan, bucket)
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            graph.inputs.copy_(host, non_blocking=True)
        elif self._retry.is_due:
            graph = self._captured(key, host, plan, bucket)
        if graph is None:
            return None
        graph.replay()
        assert self._logits is not None
        return self._logits[: len(rows)]

    def capture_all(
        self,
        plan_of: Callable[[int], StepPlan],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> int:
        """Capture a graph of every bucket, the largest first: smaller ones fit into its memory.

        The first failure ends it; what is missing is captured when a step needs it.

        Args:
            plan_of: a bucket -> the plan of as many tokens, of the base alone.
            progress: called after each bucket with how many are done, and of how many.

        Returns:
            The number of buckets that have such a graph now.

        Raises:
            DeviceError: as `run`.
        """
        for done, bucket in enumerate(reversed(self._buckets)):
            plan = plan_of(bucket)
            key = self._key(plan, bucket)
            if key not in self._graphs:
                host = self._host_inputs(DecodeRows((), (), ()), plan, bucket)
                if self._captured(key, host, plan, bucket, makes_room=False) is None:
                    return done
            progress(done + 1, len(self._buckets))
        return len(self._buckets)

    def _key(self, plan: StepPlan, bucket: int) -> Hashable:
        """The key of a step's graph; all graphs go if the adapters' memory has moved."""
        version, *groups = plan.layout
        if version != self._memory_version:
            self._graphs.clear()
            self._memory_version = version
        return (bucket, *groups)

    def _captured(
        self, key: Hashable, host: Tensor, plan: StepPlan, bucket: int, makes_room: bool = True
    ) -> _Graph | None:
        """A new graph; None if it cannot be captured now.

        Args:
            makes_room: without memory for it, the less used half of the others goes.
        """
        try:
            try:
                graph = self._new_graph(host, plan, bucket)
            except Exception as error:
                if not (makes_room and self._graphs and is_out_of_memory(error)):
                    raise
                self._evict((len(self._graphs) + 1) // 2)
                graph = self._new_graph(host, plan, bucket)
        except Exception as error:
            raise_device_fault(error, self._device)
            self._retry.fail()
            logger.warning(
                "a CUDA graph of %d rows cannot be captured; such steps run without, and it is "
                "tried again %s",
                *(bucket, self._retry),
                exc_info=True,
            )
            return None
        self._graphs[key] = graph
        self._evict(len(self._graphs) - self._max_graphs)
        return graph

    def _evict(self, number: int) -> None:
        for _ in range(number):
            self._graphs.popitem(last=False)

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
