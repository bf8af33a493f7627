"""Memory of bench/load.py: before the streams and the prompt come, at its peak, and 5 s after they
have left."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from rich.console import Console

from bench.abuse.server import post
from bench.harness import ROOT, interleaved
from bench.load_engine import Load, greedy

AFTER_S = 5.0
_START_S, _ANSWER_S = 300.0, 600.0


def rss(process: int, what: str = "VmRSS") -> int:
    """Resident bytes of a process; VmHWM: their peak."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) << 10


@contextmanager
def watched(process: int, found: dict[str, int]) -> Iterator[None]:
    """Note the memory of a process before the block, its peak in it, and the memory 5 s later."""
    found["before_rss"] = rss(process)
    Path(f"/proc/{process}/clear_refs").write_text("5")  # the peak begins here
    yield
    found["peak_rss"] = rss(process, "VmHWM")
    time.sleep(AFTER_S)
    found["after_rss"] = rss(process)


# --- this process ----------------------------------------------------------------------------


def left_in_process(load: Load, rounds: int, console: Console) -> dict[str, list[dict[str, int]]]:
    """Memory of this process where requests end, and where they are aborted, by round."""

    def end(number: int) -> dict[str, int]:
        found: dict[str, int] = {}
        with watched(os.getpid(), found):
            _until_prompt(load, number)
            load.finish()
        return found | {"after_kv_blocks": load.engine.metrics.kv.used}

    def abort(number: int) -> dict[str, int]:
        found: dict[str, int] = {}
        with watched(os.getpid(), found):
            _until_prompt(load, number)
            load.abort()
        return found | {"after_kv_blocks": load.engine.metrics.kv.used}

    ways = {"end": end, "abort": abort}
    return interleaved(ways, rounds, console, "memory", warm_up=False)


def _until_prompt(load: Load, number: int) -> None:
    """Start everything, and step until the prompt has a token."""
    load.add_streams(number, max_tokens=2 * load.steps)
    load.add_prompt(number)
    while not any(output.request_id == "prompt" for output in load.engine.step()):
        pass


# --- a server --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: int
    port: int

    def ask(self, stack: ExitStack, prompt: Sequence[int], max_tokens: int) -> socket.socket:
        """Send a streaming request on a connection of its own, which the stack closes."""
        params = greedy(max_tokens)
        body = {
            "prompt": list(prompt),
            "stream": True,
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
            "ignore_eos": params.ignore_eos,
        }
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=_ANSWER_S)
        stack.enter_context(connection)
        connection.sendall(post("completions", json.dumps(body).encode()))
        return connection

    def kv_blocks_used(self) -> int:
        """Blocks of the KV cache that sequences use."""
        request = b"GET /v1/adapters HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=_ANSWER_S) as connection:
            connection.sendall(request)
            with connection.makefile("rb") as answer:
                body = answer.read().partition(b"\r\n\r\n")[2]
        used: int = json.loads(body)["kv_cache"]["used"]
        return used


@contextmanager
def serving(command: Sequence[str]) -> Iterator[Server]:
    """Run a server for the block."""
    with (
        TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", "neuroada_serve", *command, "--port", "0"],
            stderr=log,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ) as process,
    ):
        try:
            yield Server(process.pid, _port(process, log))
        finally:
            process.kill()


def _port(process: "subprocess.Popen[bytes]", log: IO[str]) -> int:
    """Wait for the line that names the port."""
    until = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < until:
        log.seek(0)
        for line in log.read().splitlines():
            if line.startswith("Serving"):
                return int(line.split("://")[1].split("/")[0].rpartition(":")[2])
        time.sleep(0.1)
    log.seek(0)
    raise SystemExit(f"the server did not start: {log.read()}")


def disconnected(
    load: Load, command: Sequence[str], rounds: int, console: Console
) -> list[dict[str, int]]:
    """Memory of a server whose clients disconnect once the prompt has a token, by round."""
    with ExitStack() as stack:
        with console.status("starting the server"):
            server = stack.enter_context(serving(command))
        with ExitStack() as connection:
            _wait_for_token(server.ask(connection, load.stream_prompts(0)[0], 2))

        def leave(number: int) -> dict[str, int]:
            found: dict[str, int] = {}
            prompts = load.stream_prompts(number)
            with watched(server.process, found), ExitStack() as connections:
                streams = [server.ask(connections, p, load.most_stream_tokens) for p in prompts]
                for stream in streams:
                    _wait_for_token(stream)
                _wait_for_token(server.ask(connections, load.long_prompt(number), 64))
            return found | {"after_kv_blocks": server.kv_blocks_used()}

        ways = {"disconnect": leave}
        return interleaved(ways, rounds, console, "disconnecting", warm_up=False)["disconnect"]


def _wait_for_token(connection: socket.socket) -> None:
    """Read until the first event of an answer."""
    read = b""
    while b"data:" not in read:
        part = connection.recv(65536)
        if not part or b" 200 " not in (read + part).partition(b"\r\n")[0]:
            raise SystemExit(f"the server answered {read + part!r}")
        read += part
