"""One choice of one request inside the engine. Pure Python, no torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from neuroada_serve.request import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from neuroada_serve.adapters.store import Lease


@dataclass(eq=False)
class Sequence:
    """Tokens so far, how many of them are in the KV cache, and where.

    lease: the adapter version that it was admitted with; None runs on the base.
    max_tokens: most new tokens, already bounded by the model length.
    end_token_ids: tokens that end the answer.
    """

    request_id: str
    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    end_token_ids: tuple[int, ...]
    lease: "Lease | None"
    detokenizer: Any
    random: Any = None  # the sampler's generator; None where nothing is drawn
    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_computed: int = 0
    slot: int | None = None  # KV cache slot while running

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_decoding(self) -> bool:
        """The prompt is computed; one new token a step."""
        return self.num_computed >= len(self.prompt_token_ids)

    @property
    def adapter(self) -> str | None:
        return None if self.lease is None else self.lease.version.name

    def next_tokens(self, num: int) -> list[int]:
        """The next `num` tokens to compute."""
        if self.is_decoding:
            assert num == 1
            return self.output_token_ids[-1:]
        return self.prompt_token_ids[self.num_computed : self.num_computed + num]
