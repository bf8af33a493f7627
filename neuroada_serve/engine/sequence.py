"""A sequence: one choice of one request inside the engine. Pure Python, no torch."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from neuroada_serve.request import SamplingParams, TokenLogprob
from neuroada_serve.tasks import GENERATE, Task

if TYPE_CHECKING:
    from neuroada_serve.adapters.store import AdapterVersion, Lease

# Tokens that a sequence answers before it may lose its slot.
LEAST_PROGRESS = 8


class TokenCounts:
    """The different tokens of a sequence, and how often each was answered, 0 for prompt tokens."""

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        self.ids = array("q")
        self.counts = array("q")
        self._at: dict[int, int] = {}  # token id -> position in both
        self.add(prompt_token_ids, 0)

    def add(self, token_ids: Iterable[int], count: int = 1) -> None:
        for token_id in token_ids:
            at = self._at.setdefault(token_id, len(self.ids))
            if at == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(0)
            self.counts[at] += count


@dataclass(eq=False)
class Sequence:
    """The tokens of one choice so far, how many of them are in the KV cache, and where.

    tenant, client: whose share of the engine it counts against; empty where these are not told
        apart.
    cache_salt: only requests with the same one may share what it leaves in the prefix cache.
    lease: the adapter version that it was admitted with; None runs on the base.
    max_tokens: most new tokens, already bounded by the model length.
    end_token_ids: tokens that end the answer.
    task: of its adapter.
    """

    request_id: str
    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    end_token_ids: frozenset[int]
    detokenizer: Any
    task: Task = GENERATE
    biases: Any = None  # logit_bias as the sampler keeps it
    random: Any = None  # the sampler's draws; None where nothing is drawn
    tenant: str = ""
    client: str = ""
    cache_salt: str = ""
    lease: "Lease | None" = None
    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_computed: int = 0
    num_prefill: int = field(init=False)  # tokens to compute before the next one is chosen
    num_preempted: int = 0  # times that it lost its slot to another
    slot: int | None = None  # KV cache slot while running
    has_ended: bool = False  # its final output is made
    has_adapter: bool = False  # running, its adapter held on the device; of the base: running
    parked_at: int = 0  # the step in which it last lost its adapter to another
    blocks: list[int] = field(default_factory=list)  # of the KV cache, while running
    chain: list[bytes] = field(default_factory=list)  # keys of its whole blocks, as far as known
    num_registered: int = 0  # of its blocks that others can find
    num_cached: int = 0  # tokens of the prompt that came from the prefix cache
    num_overtaken: int = 0  # later claims that were given a slot since its adapter was not there
    _counts: TokenCounts | None = None  # of the first _num_counted answered tokens
    _num_counted: int = 0

    def __post_init__(self) -> None:
        self.num_prefill = len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far, prompt and answer."""
        return self.prompt_token_ids + self.output_token_ids

    @property
    def is_decoding(self) -> bool:
        """True once the prompt is computed; from then on, one new token a step."""
        return self.num_computed >= self.num_prefill

    @property
    def may_be_preempted(self) -> bool:
        """True if it has progressed enough since it got its slot, further each time, so that
        recomputing stays a small part; and is not about to end."""
        num_new = self.num_tokens - self.num_prefill
        num_left = self.max_tokens - len(self.output_token_ids)
        return num_new >= LEAST_PROGRESS << self.num_preempted and num_left > LEAST_PROGRESS

    def preempt(self) -> None:
        """Give up the slot and what is computed. Answered tokens are kept, and computed
        again like a prompt; draws, counts, text and lease continue as if nothing had been."""
        self.slot = None
        self.num_computed = 0
        self.num_prefill = self.num_tokens
        self.num_preempted += 1
        if not self.output_token_ids:
            self.prompt_logprobs.clear()  # the prompt is computed, and scored, from its beginning

    @property
    def adapter(self) -> str | None:
        return None if self.lease is None else self.lease.version.name

    @property
    def version(self) -> "AdapterVersion | None":
        return None if self.lease is None else self.lease.version

    def count_tokens(self) -> TokenCounts:
        """Count all tokens so far. The counts are kept: a call adds the tokens since the last."""
        if self._counts is None:
            self._counts = TokenCounts(self.prompt_token_ids)
        self._counts.add(self.output_token_ids[self._num_counted :])
        self._num_counted = len(self.output_token_ids)
        return self._counts

    def next_tokens(self, num: int) -> list[int]:
        """Return the next `num` tokens to compute."""
        assert num == 1 or self.num_computed + num <= self.num_prefill
        start, length = self.num_computed, len(self.prompt_token_ids)
        answered = self.output_token_ids[max(0, start - length) : max(0, start + num - length)]
        return self.prompt_token_ids[start : start + num] + answered
