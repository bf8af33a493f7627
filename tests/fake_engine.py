"""An engine without a model: every adapter answers with its own name, one byte a step."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neuroada_serve.adapters.format import CONFIG_FILE, Adapter, AdapterConfig, BaseSpec
from neuroada_serve.config import EngineConfig
from neuroada_serve.errors import (
    AdapterConflictError,
    AdapterFormatError,
    AdapterNotFoundError,
    RequestError,
)
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.request import FinishReason, Output, SamplingParams, TokenLogprob

BASE = "tiny/base"  # served names may hold a slash


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    chat_template = "yes"

    def __call__(self, text: str) -> "ByteTokenizer":
        encoding = ByteTokenizer()
        encoding.input_ids = list(text.encode())
        return encoding

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> list[int]:
        return list("".join(f"<{m['role']}>{m['content']}" for m in messages).encode())


@dataclass
class FakeSequence:
    request_id: str
    index: int
    prompt: bytes
    params: SamplingParams
    adapter: str | None
    answer: bytes
    num_sent: int = 0


class FakeEngine:
    """Answers with the adapter's name, then stops; with ignore_eos it repeats the name until
    max_tokens. The prompt "poison" fails its request; `dies` makes the next step raise."""

    def __init__(self, adapters: Sequence[str] = ("sql", "pirate"), max_num_seqs: int = 4) -> None:
        self.base = BaseModel(
            model=None,
            tokenizer=ByteTokenizer(),
            spec=BaseSpec(BASE, "0" * 64, {}),
            path=Path("/secret/base"),
            dtype=torch.float32,
            device=torch.device("cpu"),
            eos_token_ids=frozenset({0}),
            max_model_len=1_000_000,
        )
        self.config = EngineConfig(max_num_seqs=max_num_seqs)
        self.max_model_len = self.base.max_model_len
        self.adapters = tuple(adapters)
        self.dies = False
        self.running: list[FakeSequence] = []
        self.waiting: list[FakeSequence] = []
        self.ended: list[Output] = []
        self.requests: list[FakeSequence] = []
        self.readers: list[str] = []
        self.num_polls = 0

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def has_unfinished(self) -> bool:
        self.num_polls += 1
        return bool(self.running or self.waiting or self.ended)

    def read_adapter(self, path: str | Path, root: Path | None = None) -> Adapter:
        self.readers.append(threading.current_thread().name)
        config = Path(path) / CONFIG_FILE
        if not config.is_file():
            raise AdapterNotFoundError(f"no adapter directory {str(path)!r}")
        if config.read_text() == "crash":
            raise RuntimeError("a secret of the server")
        if config.read_text() != "good":
            raise AdapterFormatError(repr(config.parent.name), ["k is 0", "values are NaN"])
        return Adapter(AdapterConfig("tiny", "0" * 64, 1, ("q_proj",)), {}, "d" * 64)

    def add_adapter(self, name: str, adapter: Adapter, replace: bool = False) -> None:
        self._on_own_thread()
        if name == BASE or (name in self.adapters and not replace):
            raise AdapterConflictError(f"{name!r} is taken")
        self.adapters = tuple(dict.fromkeys((*self.adapters, name)))

    def remove_adapter(self, name: str) -> None:
        self._on_own_thread()
        if name not in self.adapters:
            raise AdapterNotFoundError(f"no adapter {name!r}")
        self.adapters = tuple(a for a in self.adapters if a != name)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        adapter: str | None,
    ) -> None:
        self._on_own_thread()
        if len(prompt_token_ids) > 100:
            raise RequestError("your prompt contains over 100 tokens", "prompt")
        answer = (adapter or "base").encode()
        if params.ignore_eos:
            answer = answer * 1000
        if params.max_tokens is not None:
            answer = answer[: params.max_tokens]
        for index in range(params.n):
            prompt = bytes(prompt_token_ids)
            sequence = FakeSequence(request_id, index, prompt, params, adapter, answer)
            self.waiting.append(sequence)
            self.requests.append(sequence)

    def abort(self, request_id: str) -> None:
        self._on_own_thread()
        for sequences in (self.running, self.waiting):
            for sequence in [s for s in sequences if s.request_id == request_id]:
                sequences.remove(sequence)
                self.ended.append(self._output(sequence, "", FinishReason.ABORT))

    def step(self) -> list[Output]:
        self._on_own_thread()
        time.sleep(0.001)
        if self.dies:
            raise RuntimeError("a secret of the engine")
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            self.running.append(self.waiting.pop(0))
        outputs, self.ended = self.ended, []
        for sequence in list(self.running):
            if b"poison" in sequence.prompt:
                output = self._output(sequence, "", FinishReason.ERROR, error="non-finite logits")
            else:
                output = self._next(sequence)
            if output.finished:
                self.running.remove(sequence)
            outputs.append(output)
        return outputs

    def _next(self, sequence: FakeSequence) -> Output:
        token = chr(sequence.answer[sequence.num_sent])
        sequence.num_sent += 1
        if token in sequence.params.stop_strings:
            return self._output(sequence, "", FinishReason.STOP, stop_reason=token)
        if sequence.num_sent < len(sequence.answer):
            return self._output(sequence, token)
        limit = sequence.params.max_tokens
        at_limit = limit is not None and sequence.num_sent >= limit
        return self._output(sequence, token, FinishReason.LENGTH if at_limit else FinishReason.STOP)

    def _output(
        self,
        sequence: FakeSequence,
        text: str,
        reason: FinishReason | None = None,
        stop_reason: str | None = None,
        error: str | None = None,
    ) -> Output:
        params = sequence.params

        def score(token: str, num_top: int) -> TokenLogprob:
            top = ((ord(token), token, -0.5), (0, "?", float("-inf")))[:num_top]
            return TokenLogprob(ord(token), token, -0.5, top)

        logprobs: list[TokenLogprob] = []
        if text and params.logprobs is not None:
            logprobs = [score(text, params.logprobs)]
        prompt_logprobs: list[TokenLogprob] = []
        if sequence.num_sent == 1 and params.prompt_logprobs is not None:
            prompt_logprobs = [score(chr(b), params.prompt_logprobs) for b in sequence.prompt[1:]]
        return Output(
            sequence.request_id,
            sequence.index,
            text,
            tuple(text.encode()),
            tuple(logprobs),
            prompt_logprobs=tuple(prompt_logprobs),
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            adapter=sequence.adapter,
            num_prompt_tokens=len(sequence.prompt),
            num_output_tokens=sequence.num_sent,
        )

    def _on_own_thread(self) -> None:
        assert threading.current_thread().name == "engine"
