"""The request log: what it says of requests and of changes, and what it leaves out."""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.fake_engine import digest_of
from tests.support.serving import ENDLESS, serving

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


Lines = Callable[[], list[str]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Lines]:
    with caplog.at_level(logging.INFO, "neuroada_serve"):
        yield lambda: caplog.messages


async def test_requests_are_logged_only_where_asked(lines: Lines) -> None:
    async with serving() as client:
        await client.complete(model="sql")
    assert lines() == []


async def test_line_has_client_status_time_model_and_tokens(lines: Lines) -> None:
    async with serving(enable_log_requests=True) as client:
        await client.complete("a secret prompt", model="sql")
        await client.chat(stream=True, max_tokens=2)
        await client.complete(model="nobody\n")
        await client.post("/v1/classify", json={"model": "sql", "input": 1})
        await client.get("/health")
    patterns = [
        r"\S+:\d+ POST /v1/completions 200 0\.\d{3} s model='sql' prompt_tokens=15 "
        r"completion_tokens=3",
        r"\S+ POST /v1/chat/completions 200 0\.\d{3} s model='tiny/base' prompt_tokens=\d+ "
        r"completion_tokens=2",
        r"\S+ POST /v1/completions 404 0\.\d{3} s",
        r"\S+ POST /v1/classify 400 0\.\d{3} s",
    ]
    assert len(lines()) == len(patterns)
    for line, pattern in zip(lines(), patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert "secret" not in "".join(lines())


async def test_every_change_of_adapters_is_a_line(lines: Lines, tmp_path) -> None:
    def write(text: str) -> None:
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new" / "adapter_config.json").write_text(text)

    settings = {"adapter_dir": tmp_path, "allow_runtime_adapters": True}
    async with serving(**settings) as client:
        client.engine.adapters.directory = tmp_path
        write("good 1")
        await client.load("fr", "new")
        await client.load("fr", "new")  # the same again is no change
        write("good 2")
        await client.load("fr", "new", load_inplace=True)
        await client.post("/v1/adapters/fr/pin", json={})
        await client.post("/v1/adapters/fr/unpin", json={})
        await client.post("/v1/adapters/merge", json={"mode": "fr"})
        await client.post("/v1/adapters/rescan", json={})
        await client.unload("fr")
        await client.unload("fr")  # which is gone
    one, two = digest_of("good 1")[:12], digest_of("good 2")[:12]
    by = "by 127.0.0.1:123"
    assert lines() == [
        f"adapter 'fr' loaded from 'new' {by}, digest {one}",
        f"adapter 'fr' replaced (digest {one} before) from 'new' {by}, digest {two}",
        f"adapter 'fr' pinned {by}, digest {two}",
        f"adapter 'fr' unpinned {by}, digest {two}",
        f"merge mode 'fr' set {by}",
        f"adapter directory rescanned {by}: added new",
        f"adapter 'fr' unloaded {by}, digest {two}",
    ]


async def test_unload_with_abort_does_not_wait_unless_told_to() -> None:
    async with serving(allow_runtime_adapters=True) as client:
        whole = asyncio.create_task(client.complete(model="sql", **ENDLESS))
        while not client.engine.num_running:
            await asyncio.sleep(0.005)
        started = time.monotonic()
        assert (await client.unload("sql", abort=True)).status_code == 200
        assert time.monotonic() - started < 3  # not 10
        assert (await whole).status_code == 503
