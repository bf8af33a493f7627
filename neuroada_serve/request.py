"""Data of a request: its parameters, and the outputs that come back.

Standard library only: the scheduler and the server reason about requests without torch.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import get_args

from neuroada_serve.errors import RequestError
from neuroada_serve.tasks import GENERATE, AskedAs, Task

MAX_CHOICES = 128
MAX_LOGPROBS = 20
# OpenAI accepts 4 stop strings; vLLM any number, 128 stop token ids and 1,024 biases. Text that may
# begin a stop string is withheld, so longer ones are of no use.
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024  # of each
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024


class FinishReason(Enum):
    """Reasons for a sequence to end; every one ends with exactly one of them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling and of stopping. Fields and defaults are vLLM's.

    temperature: 0 takes the most likely token; otherwise logits are divided by it.
    top_p, top_k, min_p: keep the smallest set of tokens with this probability, the k most
        likely (-1 or 0: all), those at least min_p times as likely as the best.
    presence_penalty, frequency_penalty: subtracted from logits of tokens already answered,
        once, and once per occurrence; repetition_penalty divides positive and multiplies
        negative logits of tokens seen in prompt or answer.
    logit_bias: token id -> addition to its logit, for at most MAX_LOGIT_BIASES.
    max_tokens: maximum number of new tokens; None: as many as the model length leaves.
    min_tokens: number of new tokens before which no end token or stop string counts.
    stop: strings that end the answer and are cut from it (kept with
        include_stop_str_in_output), at most MAX_STOP_STRINGS of MAX_STOP_CHARS characters;
        stop_token_ids likewise for at most MAX_STOP_TOKEN_IDS ids.
    seed: makes draws repeatable, whatever else is in the batch; choice i of n uses seed + i.
    n: choices per prompt.
    logprobs: None, or how many alternatives to report per answered token; prompt_logprobs likewise
        for every prompt token but the first.
    ignore_eos: go on past the model's end token.
    task: "generate" answers with tokens; any other must be what the adapter is for, see
        `tasks.Task.asked_as`, and gives no token.

    Raises:
        RequestError: names the field and its allowed range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    task: AskedAs = "generate"

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RequestError(f"{name} must be a number, got {value!r}", name)
            if not low <= value <= high or value == math.inf:  # isfinite fails on huge integers
                limit = f"at least {low:g}" if high == math.inf else f"within [{low:g}, {high:g}]"
                raise RequestError(f"{name} must be {limit}, got {value}", name)
        for name in _INTEGERS:
            if (value := getattr(self, name)) is not None and not isinstance(value, int):
                raise RequestError(f"{name} must be an integer, got {value!r}", name)
        if self.task not in get_args(AskedAs):
            known = ", ".join(get_args(AskedAs))
            raise RequestError(f"task must be one of {known}, got {self.task!r}", "task")
        if self.task != "generate" and (self.n, self.max_tokens) != (1, 1):
            raise RequestError(f"{self.task} goes with n=1 and max_tokens=1", "task")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}", "min_tokens"
            )
        if self.top_p <= 0:
            raise RequestError("top_p must be above 0; use temperature=0 for greedy", "top_p")
        if self.repetition_penalty <= 0:
            raise RequestError("repetition_penalty must be above 0", "repetition_penalty")
        self._check_stops()
        self._check_biases()

    def _check_stops(self) -> None:
        if not isinstance(self.stop, str | Sequence | None):
            raise RequestError(f"stop must be a string or strings, got {self.stop!r}", "stop")
        # Sizes first: a list that is too long is not scanned.
        if not isinstance(self.stop, str | None) and len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}", "stop"
            )
        if not all(isinstance(s, str) and s for s in self.stop_strings):
            raise RequestError("stop must be a string or strings, none empty", "stop")
        longest = max(map(len, self.stop_strings), default=0)
        if longest > MAX_STOP_CHARS:
            raise RequestError(
                f"a stop string may have {MAX_STOP_CHARS} characters, got one of {longest}", "stop"
            )
        if not isinstance(self.stop_token_ids, Sequence):
            raise RequestError("stop_token_ids must be a sequence of integers", "stop_token_ids")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids, got {len(self.stop_token_ids)}",
                "stop_token_ids",
            )
        if not all(isinstance(token_id, int) for token_id in self.stop_token_ids):
            raise RequestError("stop_token_ids must be a sequence of integers", "stop_token_ids")

    def _check_biases(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias must map token ids, integers, to numbers", "logit_bias")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise RequestError(
                f"at most {MAX_LOGIT_BIASES} tokens in logit_bias, got {len(self.logit_bias)}",
                "logit_bias",
            )
        if not all(isinstance(token_id, int) for token_id in self.logit_bias):
            raise RequestError("logit_bias must map token ids, integers, to numbers", "logit_bias")
        if not all(
            isinstance(bias, int | float) and abs(bias) <= sys.float_info.max
            for bias in self.logit_bias.values()
        ):
            raise RequestError("logit_bias values must be finite", "logit_bias")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty if it is None."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, MAX_CHOICES),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", -1, math.inf),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0, 100),
    ("max_tokens", 1, math.inf),
    ("min_tokens", 0, math.inf),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)
_INTEGERS = ("n", "top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs")


CLASSIFY = SamplingParams(task="classify", max_tokens=1, temperature=0.0)


def name_of_bytes(data: bytes) -> str:
    """Return the name of a token of these bytes: their text, or bytes:\\xf0\\x9f if not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def bytes_of_name(name: str) -> bytes:
    """Return the bytes of a token of this name."""
    if re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", name):
        return bytes.fromhex(name[6:].replace("\\x", ""))
    return name.encode()


@dataclass(frozen=True)
class TokenLogprob:
    """One token: its log probability (natural, before penalties and temperature) and the most
    likely alternatives, as (token_id, token, logprob), best first.

    token: its text; if its bytes are not text, such as a piece of a character, these bytes as
        bytes:\\xf0\\x9f.
    text_offset: number of characters of the answer before it; a piece of a character has the
        offset of the character.
    """

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    text_offset: int = 0

    @property
    def bytes(self) -> bytes:
        """Bytes that the token adds to the text; of a special token, its name."""
        return bytes_of_name(self.token)


@dataclass(frozen=True)
class Output:
    """The result of one step for one choice of one request.

    A choice gets outputs in order; exactly one of them, the last, has a finish_reason.
    text holds only what can no longer change: a possible start of a stop string is withheld.
    """

    request_id: str
    index: int  # which of the n choices
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # once, with the first output
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that matched
    error: str | None = None  # set with FinishReason.ERROR
    may_retry: bool = False  # the error may pass: the adapter could not be used now
    adapter: str | None = None
    adapter_digest: str | None = None  # of the version that answers
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0  # so far, this choice
    task: Task = GENERATE
    values: tuple[float, ...] = ()  # decoded by `task`; empty if it generates

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class Completion:
    """One finished choice."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class ClassifyOutput:
    """A classifier's answer to one prompt: probs of its labels, in their order. A regression has
    one label, and probs is the number itself."""

    prompt_token_ids: tuple[int, ...]
    adapter: str
    labels: tuple[str, ...]
    probs: tuple[float, ...]
    adapter_digest: str | None = None

    @property
    def label(self) -> str:
        """The label with the highest probability."""
        return self.labels[self.probs.index(max(self.probs))]


@dataclass(frozen=True)
class RequestOutput:
    """One finished request: its prompt, its adapter (None: the base) and its n choices.

    text, token_ids and finish_reason are the first choice's. prompt_logprobs, if requested, has one
    entry for every prompt token but the first. adapter_digest identifies the version of the adapter
    that answered. num_cached_tokens is the part of the prompt that the first choice found in the
    prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    adapter: str | None
    outputs: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    adapter_digest: str | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason.value
