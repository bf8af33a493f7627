"""Memory of the engine: the prefix cache's share, and which request ends when a step runs out."""

import torch

from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.kv_cache import CacheMemoryError, KVCache
from neuroada_serve.engine.scheduler import Schedule
from neuroada_serve.engine.sequence import Sequence

# What torch says, besides its own torch.OutOfMemoryError, where the system gives it no memory.
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "bad_alloc", "can't allocate memory")
_GPU_SHARE = 0.05  # of its memory, for the prefix cache
_PREFIX_BYTES_CPU = 512 << 20


def prefix_cache_bytes(config: EngineConfig, device: torch.device) -> int:
    """Return the prefix cache's bytes: the configured number, or the device's default."""
    if config.prefix_cache_memory is not None:
        return config.prefix_cache_memory
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * _GPU_SHARE)
    return _PREFIX_BYTES_CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that an allocation failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_MEMORY)


def most_demanding(schedule: Schedule, cache: KVCache) -> Sequence:
    """Return the sequence that asks for most memory in a step: the longest of those for whom the
    cache must grow, or, if it need not, the one with most tokens to compute, on the longest
    context."""

    def demand(work: tuple[Sequence, int]) -> tuple[bool, int]:
        sequence, num_tokens = work
        assert sequence.slot is not None
        length = sequence.num_computed + num_tokens
        if cache.holds(sequence.slot, length):
            return False, num_tokens * length
        return True, length

    work = [(s, 1) for s in schedule.decodes]
    work += [(chunk.sequence, chunk.num_tokens) for chunk in schedule.prefills]
    return max(work, key=demand)[0]


def describe_need(sequence: Sequence, error: BaseException) -> str:
    """Return the message for a client whose request ends for lack of memory."""
    reason = str(error) if isinstance(error, CacheMemoryError) else "its step found no memory"
    return (
        f"this request of {len(sequence.prompt_token_ids)} prompt tokens and "
        f"{len(sequence.output_token_ids)} answered ones cannot go on: {reason}. Send a shorter "
        "one, or try again when fewer requests run"
    )
