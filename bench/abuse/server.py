"""A server to abuse, in a process of its own, and requests to it with their times."""

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ANSWER_TIMEOUT_S = 60.0


class Server:
    """Running server: its port and the number of lines it has logged."""

    def __init__(self, model: str, code: Path, descriptors: int | None) -> None:
        def limit() -> None:
            if descriptors is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        self.num_lines = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "neuroada_serve", "serve", model, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=code,
            env=os.environ | {"PYTHONPATH": str(code)},
            preexec_fn=limit,
        )
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if line.startswith("Serving"):
                self.port = int(line.split("://")[1].split("/")[0].rpartition(":")[2])
                break
        else:
            raise SystemExit("".join(said))
        self._counting = threading.Thread(target=self._count_lines, daemon=True)
        self._counting.start()

    def _count_lines(self) -> None:
        assert self._process.stderr is not None
        for _ in self._process.stderr:
            self.num_lines += 1

    def connect(self) -> socket.socket:
        """Open a connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_TIMEOUT_S)

    def reset_peak(self) -> None:
        """Let the peak of its memory start from here."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def memory(self, what: str) -> int:
        """Resident bytes (VmRSS) or their peak (VmHWM)."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) << 10

    def stop(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.wait()
        self._counting.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def server(model: str, code: Path, descriptors: int | None = None) -> Iterator[Server]:
    """Serve a model with a checkout's code; `descriptors` limits its open files."""
    running = Server(model, code, descriptors)
    try:
        yield running
    finally:
        running.stop()


def post(route: str, body: bytes) -> bytes:
    """Bytes of a POST request."""
    head = f"POST /v1/{route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
ONE_TOKEN = post("completions", b'{"prompt":"Say hi","max_tokens":1,"temperature":0}')


def answer_s(running: Server, request: bytes, connection: socket.socket | None = None) -> float:
    """Seconds to the answer's first bytes; ANSWER_TIMEOUT_S where none came."""
    started = time.perf_counter()
    try:
        with ExitStack() as stack:
            connection = connection or stack.enter_context(running.connect())
            connection.sendall(request)
            if not connection.recv(65536):
                return ANSWER_TIMEOUT_S
    except OSError:
        return ANSWER_TIMEOUT_S
    return time.perf_counter() - started


@contextmanager
def sampled(running: Server, request: bytes, every_s: float = 0.002) -> Iterator[list[float]]:
    """Send a request again and again meanwhile, each on a new connection; yield their seconds."""
    samples: list[float] = []
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            samples.append(answer_s(running, request))
            ends.wait(every_s)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield samples
    finally:
        ends.set()
        asking.join()


def has_ended(connection: socket.socket) -> bool:
    """True where the server has closed a connection that has something to read."""
    try:
        return not connection.recv(65536)
    except ConnectionError:
        return True
