"""Request bodies: those of OpenAI's API with vLLM's extra sampling fields, and of adapter routes.

A field is either honoured or refused by name; the exceptions are WITHOUT_EFFECT. null means that a
field is not given. The cost of a faulty body is bounded: sizes are checked before entries, and a
list only up to its first fault.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from neuroada_serve.errors import RequestError
from neuroada_serve.request import (
    MAX_CHOICES,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

# Bookkeeping of OpenAI's own service that many clients send: accepted, but changes no answer.
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)

MAX_INPUTS = 256
DEFAULT_UNLOAD_TIMEOUT_S = 10.0
MAX_FIELDS = 128  # of an object
MAX_MESSAGES = 2048
MAX_METADATA = 64  # OpenAI takes 16
MAX_PARTS = 1024  # of a message
MAX_MODEL_CHARS = 1024  # a mix names up to 8 adapters
MAX_REPORTED_FAULTS = 10


def _expect(expected: str) -> WrapValidator:
    """Report one message for a field, instead of one for each type that it may have."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {expected}") from None

    return WrapValidator(validate)


def _at_most(most: int) -> BeforeValidator:
    """Check the size before the entries, as pydantic collects a fault for each of them."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > most:
            raise ValueError(f"has {len(value)} entries, at most {most} are taken")
        return value

    return BeforeValidator(check)


# Validation stops at a list's first fault: a request may have some hundred thousand.
_FailFast = Field(fail_fast=True)
_Strings = Annotated[list[str], _FailFast]
_TokenIds = Annotated[list[int], _FailFast]

Prompt = Annotated[
    str | _Strings | _TokenIds | Annotated[list[_TokenIds], _FailFast],
    _expect("a string, a list of strings, a list of token ids, or a list of such lists"),
]
Stop = Annotated[
    str | _Strings, _expect("a string or a list of strings"), _at_most(MAX_STOP_STRINGS)
]
Unsupported = Annotated[None, _expect("left out: this server does not support it")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"an object with {len(value)} fields, at most {MAX_FIELDS} are taken")
        return value


class StreamOptions(_Strict):
    """include_usage: end with a chunk that has the usage; continuous_usage_stats: in all chunks."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats needs include_usage")
        return self


class GenerationRequest(_Strict):
    """The fields that completions and chat share."""

    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None  # None: the base

    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], _at_most(MAX_LOGIT_BIASES)] | None = None
    stop: Stop | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[_TokenIds, _at_most(MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

    # WITHOUT_EFFECT
    user: str | None = None
    metadata: Annotated[dict[str, str], _at_most(MAX_METADATA)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report per generated token; None: no logprobs at all."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to report per prompt token; None: no logprobs at all."""
        return None

    @property
    @abstractmethod
    def most_tokens(self) -> int | None:
        """Limit on generated tokens; None: as many as fit."""

    def sampling_params(self) -> SamplingParams:
        """Return the parameters for the engine.

        Raises:
            RequestError: names the field at fault.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", "stream_options")
        given = {
            name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None
        }
        return SamplingParams(
            max_tokens=self.most_tokens,
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            logit_bias=_logit_bias(self.logit_bias or {}),
            **given,
        )


_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "seed",
    "skip_special_tokens",
)


def _logit_bias(biases: dict[str, float]) -> dict[int, float]:
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise RequestError(f"logit_bias has {token[:20]!r}, which is no token id", "logit_bias")
        if not -100 <= bias <= 100:
            raise RequestError("logit_bias values must be within [-100, 100]", "logit_bias")
    return {int(token): bias for token, bias in biases.items()}


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Unsupported = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None

    @property
    def most_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    def sampling_params(self) -> SamplingParams:
        params = super().sampling_params()
        if self.best_of not in (None, params.n):
            raise RequestError(
                f"best_of must equal n={params.n} or be left out; all choices are returned",
                "best_of",
            )
        if len(self.prompts) * params.n > MAX_CHOICES:
            raise RequestError(
                f"{len(self.prompts)} prompts with n={params.n} make "
                f"{len(self.prompts) * params.n} choices, at most {MAX_CHOICES} per request",
                "prompt",
            )
        return params

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Every prompt, as text or token ids.

        Raises:
            RequestError: there is none, or an empty one.
        """
        return _one_each(self.prompt, "prompt")


def _one_each(given: Any, field: str) -> Sequence[str | list[int]]:
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given or not all(given):
        raise RequestError(f"{field} must not be empty", field)
    return list(given)


class PooledRequest(_Strict):
    """Body of requests that are answered with one entry for each input."""

    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)]
    input: Prompt
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    user: str | None = None  # without effect

    @property
    def inputs(self) -> Sequence[str | list[int]]:
        """Every input, as text or token ids.

        Raises:
            RequestError: there is none, an empty one, or too many.
        """
        inputs = _one_each(self.input, "input")
        if len(inputs) > MAX_INPUTS:
            raise RequestError(f"{len(inputs)} inputs, at most {MAX_INPUTS} per request", "input")
        return inputs


class ClassifyRequest(PooledRequest):
    """Body of POST /v1/classify, vLLM's /classify. model: an adapter that is a classifier."""


class TextPart(_Strict):
    type: Literal["text"]
    text: str


Content = Annotated[
    str | Annotated[list[TextPart], _FailFast] | None,
    _at_most(MAX_PARTS),
    _expect('a string or a list of {"type": "text", "text": ...} parts; others are not supported'),
]


class ChatMessage(_Strict):
    """One message, which `model.prompt.normalized` prepares for the chat template."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    # null in other servers' replies, which clients send back as messages
    refusal: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None


class TextFormat(_Strict):
    type: Literal["text"]


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, fail_fast=True), _at_most(MAX_MESSAGES)
    ]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Annotated[TextFormat, _expect('{"type": "text"}')] | None = None
    tools: Unsupported = None
    tool_choice: Annotated[Literal["none"], _expect('"none"')] | None = None
    functions: Unsupported = None
    function_call: Annotated[Literal["none"], _expect('"none"')] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling_params(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise RequestError(f"top_logprobs must be within [0, {MAX_LOGPROBS}]", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise RequestError(
                "max_tokens is the older name of max_completion_tokens; they differ", "max_tokens"
            )
        return super().sampling_params()


class LoadAdapterRequest(_Strict):
    """Body of POST /v1/load_lora_adapter; the names are vLLM's.

    lora_path: the adapter's folder, absolute or relative to --adapter-dir, and under it.
    load_inplace: replace a loaded adapter of this name; new requests use the new one.
    """

    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    lora_path: Annotated[str, Field(max_length=4096)]
    load_inplace: bool = False


class UnloadAdapterRequest(_Strict):
    """Body of POST /v1/unload_lora_adapter; lora_name is vLLM's.

    timeout_s: seconds to wait for the adapter's requests to finish, 10 by default; if some remain
        then, the reply is 409 and the adapter stays.
    abort: abort those that remain; at once, unless timeout_s is given.
    """

    lora_name: str
    timeout_s: Annotated[float, Field(ge=0, le=600)] | None = None
    abort: bool = False

    @property
    def patience_s(self) -> float:
        """Seconds to wait before the adapter's requests are aborted, or it stays."""
        if self.timeout_s is not None:
            return self.timeout_s
        return 0.0 if self.abort else DEFAULT_UNLOAD_TIMEOUT_S


class MergeRequest(_Strict):
    """Body of POST /v1/adapters/merge. mode: never, auto, or an adapter to keep merged."""

    mode: str


def describe_faults(faults: Sequence[Any]) -> tuple[str, str | None]:
    """Return a message for pydantic's error list about a request body, and the field at fault."""
    lines = []
    for fault in faults[:MAX_REPORTED_FAULTS]:
        kind, where = fault["type"], _where(fault["loc"])
        if kind == "json_invalid":
            lines.append(f"the body is not valid JSON: {fault['ctx']['error']}")
        elif kind == "value_error" and not where:
            lines.append(f"the body is {fault['msg'].removeprefix('Value error, ')}")
        elif kind == "extra_forbidden":
            lines.append(f"{where} is unknown or not supported")
        elif not where:
            lines.append("the body must be a JSON object")
        else:
            lines.append(f"{where}: {fault['msg'].removeprefix('Value error, ')}")
    first = faults[0]["loc"]
    param = first[1] if len(first) > 1 and isinstance(first[1], str) else None
    return "; ".join(lines), param


def _where(loc: Sequence[str | int]) -> str:
    """Write ('body', 'messages', 0, 'content') as messages[0].content."""
    path = ""
    for part in loc[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:80]}"
    return path.removeprefix(".")
