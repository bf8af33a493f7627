"""Tokenize prompts and conversations off the event loop, in fair turns, and stop early at a text
that cannot fit."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from neuroada_serve.engine.token_names import TokenNames
from neuroada_serve.errors import RequestError
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.prompt import Message, encode_chat, encode_text
from neuroada_serve.server.caller import Caller
from neuroada_serve.server.turns import Job, Turns

T = TypeVar("T")

# Longer texts are first counted in pieces of this size, some 20 ms each.
PIECE_CHARS = 16_384
# Texts up to this have a queue of their own, so that none waits for a long one.
_SHORT_CHARS = 16_384
# Pieces of a text have a few tokens more than the whole.
_SLACK = 1.25


class Prompts:
    """Turns prompts and conversations into token ids.

    Args:
        max_model_len: tokens; longer texts are refused as soon as that is certain.
    """

    def __init__(self, base: BaseModel, max_model_len: int) -> None:
        self._max_model_len = max_model_len
        self._tokenizer = _BoundedTokenizer(base.tokenizer, max_model_len)
        self._base = replace(base, tokenizer=self._tokenizer)
        self._names = TokenNames(base.tokenizer)
        self._short, self._long = Turns("tokenize"), Turns("tokenize long")

    async def encode(
        self, given: Sequence[str | list[int]], caller: Caller, with_texts: bool = False
    ) -> tuple[list[list[int]], list[tuple[str, str]]]:
        """Return the token ids of every prompt; and, `with_texts`, its text and the name of its
        first token.

        Raises:
            RequestError: a prompt is too long, or has ids that are not tokens.
        """

        def work() -> tuple[list[list[int]], list[tuple[str, str]]]:
            prompts = [encode_text(self._base, p) if isinstance(p, str) else p for p in given]
            if not with_texts:
                return prompts, []
            texts = [
                (p if isinstance(p, str) else self._decode(p), self._names(ids[0]))
                for p, ids in zip(given, prompts, strict=True)
            ]
            return prompts, texts

        num_chars = sum(len(one) for one in given if isinstance(one, str))
        return await self._run(caller, num_chars, work)

    async def encode_chat(self, messages: Sequence[Message], caller: Caller) -> list[int]:
        """Return the token ids of a conversation.

        Raises:
            RequestError: it is too long, or the chat template refuses it.
        """
        num_chars = sum(len(str(message.get("content", ""))) for message in messages)
        # Templates take as long for an empty message as for a short one.
        cost = num_chars + 64 * len(messages)
        return await self._run(caller, cost, lambda: encode_chat(self._base, messages))

    async def _run(self, caller: Caller, cost: int, work: Callable[[], T]) -> T:
        def in_turn(job: Job) -> T:
            with self._tokenizer.working_for(job):
                return work()

        turns = self._short if cost <= _SHORT_CHARS else self._long
        return await turns.run(caller, cost, in_turn)

    def _decode(self, ids: list[int]) -> str:
        if len(ids) >= self._max_model_len:
            raise _too_long(self._max_model_len, str(len(ids)))
        try:
            return str(self._base.tokenizer.decode(ids))
        except (OverflowError, TypeError, ValueError, IndexError):
            raise RequestError("prompt has ids that are no tokens", "prompt") from None


class _BoundedTokenizer:
    """A tokenizer that stops at a text that cannot fit, and when its job is cancelled.

    A long text is counted in pieces first. So any text costs at most twice as much as the longest
    one that fits, whatever its characters are. A bound from the vocabulary's longest token (81
    bytes for the demo base) would let ten times as much through.
    """

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._local = threading.local()

    @contextmanager
    def working_for(self, job: Job) -> Iterator[None]:
        """Stop this thread's calls inside the block once the job is cancelled."""
        self._local.job = job
        try:
            yield
        finally:
            del self._local.job

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        self._local.job.check()
        if isinstance(text, str) and len(text) > PIECE_CHARS:
            self._check_length(text)
        return self._tokenizer(text, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def _check_length(self, text: str) -> None:
        num_tokens = 0
        for start in range(0, len(text), PIECE_CHARS):
            self._local.job.check()
            piece = text[start : start + PIECE_CHARS]
            num_tokens += len(self._tokenizer(piece, add_special_tokens=False).input_ids)
            if num_tokens > _SLACK * self._max_model_len + 64:
                raise _too_long(self._max_model_len, f"more than {self._max_model_len}")


def _too_long(max_model_len: int, num_tokens: str) -> RequestError:
    return RequestError(
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
        f"contains {num_tokens} input tokens. Please reduce its length.",
        "prompt",
    )
