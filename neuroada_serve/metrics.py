"""Counters of the engine and of its adapters, by name."""

from dataclasses import dataclass, field

from neuroada_serve.request import FinishReason


@dataclass(frozen=True)
class KVUsage:
    """Blocks of the KV cache.

    used: by running sequences; shared of them by several.
    cached: held by no sequence, but known to begin some prompt; given up where room is needed.
    """

    block_tokens: int
    blocks: int
    used: int = 0
    shared: int = 0
    cached: int = 0

    @property
    def free(self) -> int:
        return self.blocks - self.used - self.cached


@dataclass
class EngineMetrics:
    """Totals since the engine started, and blocks now. num_finished counts choices by finish
    reason."""

    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed in prefill, once the prompt is complete
    num_cached_tokens: int = 0  # of these prompts, taken from the prefix cache
    num_output_tokens: int = 0
    num_preemptions: int = 0  # times that a sequence lost its slot or blocks to another
    kv: KVUsage = KVUsage(0, 0)
    num_finished: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(FinishReason, 0)
    )
    num_failed_compilations: int = 0  # of CUDA graphs and elementwise parts; tried again later
    num_merges: int = 0
    num_unmerges: int = 0


@dataclass
class TierMetrics:
    """Totals since the start. num_hits: adapters found on the device when a request needed them."""

    num_hits: int = 0
    num_uploads: int = 0
    num_disk_reads: int = 0
    num_device_evictions: int = 0
    num_host_evictions: int = 0
    num_failures: int = 0
    num_compactions: int = 0
