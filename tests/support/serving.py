"""A server over a fake engine: in process, or on a real socket."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from neuroada_serve.config import ServerConfig
from neuroada_serve.server.app import create_app
from neuroada_serve.server.serve import serve
from neuroada_serve.server.signals import EarlySignals
from neuroada_serve.server.timeouts import ConnectionLimits
from neuroada_serve.server.worker import Worker
from tests.support.fake_engine import FakeEngine

ENDLESS = {"ignore_eos": True, "max_tokens": 5000}
HELLO = [{"role": "user", "content": "hello"}]


async def keep_secrets(response: httpx.Response) -> None:
    """Paths, and texts of exceptions that are not ours, have "secret" in them here."""
    await response.aread()
    assert "secret" not in response.text


class Client(httpx.AsyncClient):
    """A client, and what is behind it."""

    def __init__(
        self, engine: FakeEngine, worker: Worker, died: asyncio.Event, **options: Any
    ) -> None:
        super().__init__(**options, event_hooks={"response": [keep_secrets]})
        self.engine = engine
        self.worker = worker
        self.died = died  # the engine

    async def complete(self, prompt: Any = "hi", **more: Any) -> httpx.Response:
        return await self.post("/v1/completions", json={"prompt": prompt, **more})

    async def chat(self, messages: Any = HELLO, **more: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", json={"messages": messages, **more})

    async def load(self, name: str, path: str, **more: Any) -> httpx.Response:
        body = {"lora_name": name, "lora_path": path, **more}
        return await self.post("/v1/load_lora_adapter", json=body)

    async def unload(self, name: str, **more: Any) -> httpx.Response:
        return await self.post("/v1/unload_lora_adapter", json={"lora_name": name, **more})


@asynccontextmanager
async def serving(engine: FakeEngine | None = None, **config: Any) -> AsyncIterator[Client]:
    engine = engine or FakeEngine()
    settings = ServerConfig(**config)
    died = asyncio.Event()
    limit_s = settings.step_timeout_s
    async with Worker(engine, settings.max_waiting, died.set, limit_s) as worker:
        app = create_app(worker, settings)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with Client(
            engine, worker, died, transport=transport, base_url="http://127.0.0.1"
        ) as client:
            yield client


async def until(condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def busy(client: Client, num: int = 1, **request: Any) -> AsyncIterator[None]:
    """So many more requests wait or run, until the end."""
    before = len(client.engine.present)
    tasks = [asyncio.create_task(client.complete(**ENDLESS, **request)) for _ in range(num)]
    await until(lambda: len(client.engine.present) == before + num)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; [DONE] is checked and left out."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == (
        "model_not_found" if error["param"] == "model" and status == 404 else status
    )
    assert ("retry-after" in response.headers) == (status == 503)
    return error


def serve_while(
    engine: FakeEngine,
    visit: Callable[[str], None],
    notify: Callable[[str], None] = lambda message: None,
    limits: ConnectionLimits | None = None,
    early: EarlySignals | None = None,
    **config: Any,
) -> int:
    """serve()'s exit code; `visit` gets the URL in a thread, SIGTERM follows unless it came."""
    failures: list[BaseException] = []
    threads = []

    def run(url: str) -> None:
        try:
            visit(url)
        except BaseException as error:
            failures.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    def on_ready(host: str, port: int) -> None:
        threads.append(threading.Thread(target=run, args=(f"http://{host}:{port}",)))
        threads[0].start()

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for one that comes late
    try:
        settings = ServerConfig(port=0, **config)
        code = serve(engine, settings, on_ready, notify, limits=limits, early=early)
        threads[0].join()
    finally:
        signal.signal(signal.SIGTERM, before)
    for failure in failures:
        raise failure
    return code


def is_listening(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=120)
    except httpx.ConnectError:
        return False
    except httpx.TransportError:
        return True  # taken, and let go by a server that is ending: asked again
    return True


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
