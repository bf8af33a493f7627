"""What the engine counts, by name."""

from dataclasses import dataclass, field

from neuroada_serve.request import FinishReason


@dataclass
class EngineMetrics:
    """Totals since the engine started. num_finished counts choices, by how they ended."""

    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed in prefill
    num_cached_tokens: int = 0  # of prompts, taken from the prefix cache
    num_output_tokens: int = 0
    num_preemptions: int = 0  # times that a sequence lost its slot to another
    num_finished: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(FinishReason, 0)
    )
    num_merges: int = 0
    num_unmerges: int = 0
