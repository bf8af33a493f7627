"""Run one training run in several processes, each with a device of its own.

`torchrun` or `accelerate launch` starts them and gives each its rank in the environment. Each holds
the whole base. A step's batches are dealt out among them, and the gradients of the values, some
megabytes, are summed before the optimizer's step, so all processes always hold the same values. The
first process makes every decision (a selection, a score) and shares it; it alone writes files and
messages.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(hours=6)  # the others wait while the first scores; a launcher ends the dead
_RANK, _SIZE, _LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of the run. rank: from 0. size: number of processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes; all pass as many tensors, of equal
        shapes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def share_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the first process's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def of_first(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """Return the first process's numbers; the others pass as many, of any value."""
        if self.size == 1:
            return list(numbers)
        shared = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.broadcast(shared, 0)
        return [float(number) for number in shared]

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()


def current() -> Processes:
    """Return the processes of torch's process group; this one alone without a group."""
    if not dist.is_available() or not dist.is_initialized():
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined() -> Iterator[Processes]:
    """Take part in what a launcher has started; this process alone where there was none.

    Each process sees its own GPU only, so this comes before anything uses CUDA.
    """
    if int(os.environ.get(_SIZE, "1")) == 1:
        yield Processes()
        return
    local = int(os.environ[_LOCAL_RANK])
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[local] if local < len(visible) else str(local)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield current()
    finally:
        dist.destroy_process_group()


@contextmanager
def unlaunched() -> Iterator[None]:
    """Hide the launcher, so that a library that would spread its own work sees one process."""
    hidden = {n: os.environ.pop(n) for n in (_RANK, _SIZE, _LOCAL_RANK) if n in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
