"""Tokenizing for requests: bounded, by turns, ended with its client."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from neuroada_serve.errors import RequestError
from neuroada_serve.server.caller import Caller
from neuroada_serve.server.prompts import PIECE_CHARS, Prompts
from tests.support.fake_engine import BASE, ByteTokenizer, FakeEngine
from tests.support.serving import error_of, serving
from tests.support.tiny import tiny_tokenizer

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


class SlowTokenizer(ByteTokenizer):
    """Takes a millisecond for a thousand characters, and counts them."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.num_chars = 0
        self.gate = gate
        self.began = threading.Event()

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        self.began.set()
        self.num_chars += len(text)
        if self.gate is not None and len(text) >= PIECE_CHARS:
            assert self.gate.wait(120)
        time.sleep(len(text) / 1e6)
        encoding = ByteTokenizer()
        encoding.input_ids = [1] * (len(text) // 4)
        return encoding


def prompts_with(tokenizer: Any, max_model_len: int = 8192) -> Prompts:
    return Prompts(replace(FakeEngine().base, tokenizer=tokenizer), max_model_len)


async def test_text_that_cannot_fit_is_refused_before_it_is_all_tokenized() -> None:
    tokenizer = SlowTokenizer()
    with pytest.raises(RequestError, match="maximum context length is 8192 tokens"):
        await prompts_with(tokenizer).encode(["x" * (2 << 20)], Caller())
    assert tokenizer.num_chars < 2 * 4 * 8192  # of two million


async def test_conversation_that_cannot_fit_is_refused_likewise() -> None:
    class Templated(SlowTokenizer):
        def apply_chat_template(self, messages: Any, **options: Any) -> Any:
            text = "".join(message["content"] for message in messages)
            return self(text).input_ids if options.get("tokenize", True) else text

    tokenizer = Templated()
    prompts = prompts_with(tokenizer)
    messages = [{"role": "user", "content": "x" * 20_000}] * 100
    with pytest.raises(RequestError, match="maximum context length"):
        await prompts.encode_chat(messages, Caller())
    assert tokenizer.num_chars < 2 * 4 * 8192


@pytest.mark.parametrize("length", [PIECE_CHARS - 1, PIECE_CHARS + 1, 32_700])
async def test_text_that_fits_is_tokenized_whole(length: int) -> None:
    text = "héllo wörld "[:12] * (length // 12)
    ids, texts = await prompts_with(ByteTokenizer(), 100_000).encode([text], Caller())
    assert ids == [list(text.encode())]
    assert texts == []


async def test_length_is_that_of_the_whole_text_not_of_its_pieces() -> None:
    """A text just under the limit is not refused for what cutting adds."""
    tokenizer = tiny_tokenizer()
    text = "the cat sat on the mat " * 2000
    wanted = tokenizer(text).input_ids
    ids, _ = await prompts_with(tokenizer, len(wanted) + 1).encode([text], Caller())
    assert ids == [wanted]


async def test_client_that_leaves_ends_its_tokenizing() -> None:
    gate = threading.Event()
    tokenizer = SlowTokenizer(gate)
    prompts = prompts_with(tokenizer, 10**9)
    leaving = [asyncio.create_task(prompts.encode(["x" * 2_000_000], Caller())) for _ in range(60)]
    while not tokenizer.began.is_set():
        await asyncio.sleep(0.001)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    gate.set()
    await prompts.encode(["y" * (PIECE_CHARS + 1)], Caller())
    assert tokenizer.num_chars <= 4 * PIECE_CHARS  # of 120 million


async def test_short_prompt_does_not_wait_for_a_long_one() -> None:
    gate = threading.Event()
    prompts = prompts_with(SlowTokenizer(gate), 10**9)
    long = [asyncio.create_task(prompts.encode(["x" * 20_000], Caller())) for _ in range(20)]
    await asyncio.sleep(0.01)
    assert (await asyncio.wait_for(prompts.encode(["hi there"], Caller()), 5))[0] == [[1, 1]]
    gate.set()
    await asyncio.gather(*long)


async def test_disconnect_while_it_is_tokenized_reaches_no_engine() -> None:
    engine, gate = FakeEngine(), threading.Event()
    tokenizer = SlowTokenizer(gate)
    engine.base = replace(engine.base, tokenizer=tokenizer)
    async with serving(engine) as client:
        prompt = "x" * (3 * PIECE_CHARS)
        request = asyncio.create_task(client.complete(prompt, model=BASE))
        while not tokenizer.began.is_set():
            await asyncio.sleep(0.001)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        gate.set()
        assert (await client.complete("hi there")).status_code == 200
        assert [len(sequence.prompt) for sequence in engine.requests] == [2]
        assert tokenizer.num_chars < len(prompt)


async def test_echo_of_ids_that_cannot_fit_is_not_decoded() -> None:
    engine = FakeEngine()
    engine.max_model_len = 50
    async with serving(engine) as client:
        ids = [97] * 60
        error_of(await client.complete(ids, echo=True), 400)


def test_a_fast_tokenizer_takes_two_threads() -> None:
    """ "Already borrowed" is what one says whose settings change beside its work; ours do not."""
    tokenizer = tiny_tokenizer()
    text = "the cat sat on the mat " * 300
    wanted = tokenizer(text).input_ids

    def encode(_: int) -> bool:
        ids = tokenizer(text).input_ids
        tokenizer(text[:9], add_special_tokens=False)
        return ids == wanted and bool(tokenizer.decode(ids[:9]))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(encode, range(100)))
