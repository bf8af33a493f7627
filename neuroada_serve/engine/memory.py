"""Steps that run out of memory: which request ends, and what it is told."""

import torch

from neuroada_serve.engine.scheduler import Schedule
from neuroada_serve.engine.sequence import Sequence

# What torch says, besides its own torch.OutOfMemoryError, where the system gives it no memory.
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "bad_alloc", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that an allocation failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_MEMORY)


def most_demanding(schedule: Schedule) -> Sequence:
    """Return the sequence that asks for most memory in a step: the one with most tokens to compute,
    on the longest context."""

    def demand(work: tuple[Sequence, int]) -> int:
        sequence, num_tokens = work
        return num_tokens * (sequence.num_computed + num_tokens)

    work = [(s, 1) for s in schedule.decodes]
    work += [(chunk.sequence, chunk.num_tokens) for chunk in schedule.prefills]
    return max(work, key=demand)[0]


def describe_need(sequence: Sequence) -> str:
    """Return the message for a client whose request ends for lack of memory."""
    return (
        f"this request of {len(sequence.prompt_token_ids)} prompt tokens and "
        f"{len(sequence.output_token_ids)} answered ones cannot go on: its step found no "
        "memory. Send a shorter one, or try again when fewer requests run"
    )
