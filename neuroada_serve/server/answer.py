"""Replies to clients: OpenAI's completion and chat objects, whole or in chunks, and classes."""

import codecs
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from neuroada_serve.request import Output, TokenLogprob, bytes_of_name
from neuroada_serve.server.protocol import GenerationRequest

LOWEST_LOGPROB = -9999.0  # stands for -inf, which JSON lacks, as in vLLM


@dataclass
class _Choice:
    """One choice so far."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    echoed: "_Echoed | None" = None
    num_output_tokens: int = 0
    started: bool = False


class Answer(ABC):
    """A reply under construction, from the outputs of one request."""

    id_prefix: ClassVar[str]

    def __init__(self, model: str, num_prompt_tokens: int) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._num_prompt_tokens = num_prompt_tokens

    @abstractmethod
    def add(self, index: int, output: Output) -> None:
        """Add an output of choice, or input, `index`; each output once, in order."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The reply as one object, once every choice has finished."""

    @property
    def summary(self) -> str:
        """Model and numbers of tokens, for the request log."""
        return f"model={self._model!r} prompt_tokens={self._num_prompt_tokens}"


class GenerationAnswer(Answer):
    """A reply of generated text. Each output goes once, in order, to `add` or to `chunks`."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(
        self, request: GenerationRequest, model: str, num_prompt_tokens: int, num_choices: int
    ) -> None:
        super().__init__(model, num_prompt_tokens)
        self._request = request
        self._choices = [_Choice() for _ in range(num_choices)]
        self._endings: dict[int, dict[str, Any]] = {}
        self._adapter_digest: str | None = None
        self._num_cached_tokens = [0] * num_choices

    @property
    def is_streamed(self) -> bool:
        """True if the client asked for server-sent events."""
        return bool(self._request.stream)

    @property
    def include_usage(self) -> bool:
        """True if the client asked for `usage_chunk` at the end of a stream."""
        return self._request.include_usage

    def add(self, index: int, output: Output) -> None:
        choice = self._choices[index]
        choice.texts.append(output.text)
        choice.logprobs += self._tokens(choice, output)
        self._count(index, output)

    def whole(self) -> dict[str, Any]:
        choices = [
            {"index": index}
            | self._message("".join(choice.texts))
            | {"logprobs": self._logprobs(choice.logprobs)}
            | self._endings[index]
            for index, choice in enumerate(self._choices)
        ]
        return self._object(self.kind, choices, usage=self._usage())

    def chunks(self, index: int, output: Output) -> Iterator[dict[str, Any]]:
        """Yield the chunks that an output adds to a stream; none while its text is withheld."""
        choice = self._choices[index]
        opening = None if choice.started else self._opening(choice)
        opening_logprobs = None if choice.started else self._logprobs(choice.logprobs)
        logprobs = self._logprobs(self._tokens(choice, output))
        self._count(index, output)
        choice.started = True
        usage: dict[str, Any] = {}
        if self.include_usage:
            usage = {"usage": self._usage() if self._request.continuous_usage else None}

        def chunk(part: dict[str, Any], ending: dict[str, Any]) -> dict[str, Any]:
            return self._object(self.chunk_kind, [{"index": index} | part | ending], **usage)

        if opening is not None:
            yield chunk(opening | {"logprobs": opening_logprobs}, _NO_ENDING)
        if output.text or output.finished or logprobs:
            yield chunk(self._delta(output.text) | {"logprobs": logprobs}, _ending(output))

    @property
    def summary(self) -> str:
        return f"{super().summary} completion_tokens={self._num_output_tokens}"

    @property
    def _num_output_tokens(self) -> int:
        return sum(choice.num_output_tokens for choice in self._choices)

    def _count(self, index: int, output: Output) -> None:
        self._choices[index].num_output_tokens = output.num_output_tokens
        self._adapter_digest = output.adapter_digest
        self._num_cached_tokens[index] = output.num_cached_tokens
        self._endings[index] = _ending(output)

    def usage_chunk(self) -> dict[str, Any]:
        """Return the extra last chunk of stream_options.include_usage."""
        return self._object(self.chunk_kind, [], usage=self._usage())

    @abstractmethod
    def _message(self, text: str) -> dict[str, Any]:
        """Shape the text of a finished choice."""

    @abstractmethod
    def _opening(self, choice: _Choice) -> dict[str, Any] | None:
        """Shape what a stream sends of a choice before its first text, if anything."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """Shape new text in a stream."""

    @abstractmethod
    def _shape_logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Shape log probabilities of tokens."""

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._request.num_logprobs is None or not tokens:
            return None
        return self._shape_logprobs(tokens)

    def _tokens(self, choice: _Choice, output: Output) -> list[TokenLogprob]:
        """Return the tokens of prompt and answer, with their offsets in the text."""
        echoed = choice.echoed
        prompt = [] if echoed is None else [echoed.place(token) for token in output.prompt_logprobs]
        num_before = 0 if echoed is None else len(echoed.text)
        return [
            *prompt,
            *(replace(t, text_offset=num_before + t.text_offset) for t in output.logprobs),
        ]

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            # The version of the adapter that answers; null for the base.
            "system_fingerprint": self._adapter_digest,
            "choices": choices,
            **more,
        }

    def _usage(self) -> dict[str, Any]:
        # Each prompt counts once, as in prompt_tokens: by its first choice.
        num_cached_tokens = sum(self._num_cached_tokens[:: self._request.n or 1])
        return _usage(self._num_prompt_tokens, self._num_output_tokens, num_cached_tokens)


@dataclass(frozen=True)
class Echo:
    """A prompt to repeat in front of its answer, and the name of its first token."""

    text: str
    first_token: str


class _Echoed:
    """Finds the offsets of a prompt's tokens, one after the other, in the prompt's text."""

    def __init__(self, echo: Echo) -> None:
        self.text = echo.text
        self._data = echo.text.encode()
        self._num_bytes = self._num_chars = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def place(self, token: TokenLogprob) -> TokenLogprob:
        """Return the next token with its offset in the text. A token that the tokenizer put in
        front takes up no text; that of a first word may have a space which the text lacks."""
        offset = self._num_chars
        for written in (token.bytes, token.bytes.removeprefix(b" ")):
            if self._data.startswith(written, self._num_bytes):
                self._num_bytes += len(written)
                self._num_chars += len(self._decoder.decode(written))
                break
        return replace(token, text_offset=offset)


class CompletionAnswer(GenerationAnswer):
    """The reply of /v1/completions; `echoes` is empty, or has one for each choice."""

    id_prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        request: GenerationRequest,
        model: str,
        num_prompt_tokens: int,
        num_choices: int,
        echoes: Sequence[Echo] = (),
    ) -> None:
        super().__init__(request, model, num_prompt_tokens, num_choices)
        for choice, echo in zip(self._choices, echoes, strict=bool(echoes)):
            choice.texts, choice.echoed = [echo.text], _Echoed(echo)
            # The first token has no log probability, as nothing precedes it; nan becomes null.
            first = TokenLogprob(-1, echo.first_token, math.nan)
            choice.logprobs = [choice.echoed.place(first)]

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _opening(self, choice: _Choice) -> dict[str, Any] | None:
        return {"text": choice.echoed.text} if choice.echoed and choice.echoed.text else None

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _shape_logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "text_offset": [token.text_offset for token in tokens],
            "tokens": [token.token for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [_top_logprobs(token) for token in tokens],
        }


class ChatAnswer(GenerationAnswer):
    """The reply of /v1/chat/completions."""

    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _opening(self, choice: _Choice) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _shape_logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "content": [
                _chat_logprob(token.token, token.logprob)
                | {"top_logprobs": [_chat_logprob(text, logprob) for _, text, logprob in token.top]}
                for token in tokens
            ]
        }


class PooledAnswer(Answer):
    """A reply of one entry per input, whose form is the task's."""

    def __init__(self, model: str, num_prompt_tokens: int, num_inputs: int) -> None:
        super().__init__(model, num_prompt_tokens)
        self._outputs: list[Output | None] = [None] * num_inputs

    def add(self, index: int, output: Output) -> None:
        self._outputs[index] = output

    def whole(self) -> dict[str, Any]:
        found = [output for output in self._outputs if output is not None]
        data = [
            {"index": index} | output.task.reply(output.values)
            for index, output in enumerate(found)
        ]
        return {
            "id": self.id,
            "object": "list",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": found[0].adapter_digest,
            **found[0].task.heading(),
            "data": data,
            "usage": _usage(
                self._num_prompt_tokens, 0, sum(output.num_cached_tokens for output in found)
            ),
        }


class ClassifyAnswer(PooledAnswer):
    """The reply of /v1/classify: vLLM's object, with the labels beside it."""

    id_prefix = "classify"


def _usage(
    num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int
) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


_NO_ENDING = {"finish_reason": None, "stop_reason": None}


def _ending(output: Output) -> dict[str, Any]:
    reason = output.finish_reason
    return {
        "finish_reason": None if reason is None else reason.value,
        "stop_reason": output.stop_reason,
    }


def _top_logprobs(token: TokenLogprob) -> dict[str, float | None] | None:
    """Return log probabilities by token name. If several tokens share a name, the generated one
    gets it, else the likeliest; the others are named token_id:N, as in vLLM."""
    if math.isnan(token.logprob):
        return None
    top: dict[str, float | None] = {}
    for token_id, name, logprob in token.top:
        is_taken = name in top or (name == token.token and token_id != token.token_id)
        top[f"token_id:{token_id}" if is_taken else name] = _number(logprob)
    return top | {token.token: _number(token.logprob)}  # OpenAI promises that it is among them


def _chat_logprob(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": _number(logprob), "bytes": list(bytes_of_name(token))}


def _number(logprob: float) -> float | None:
    return None if math.isnan(logprob) else max(logprob, LOWEST_LOGPROB)
