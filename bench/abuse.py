"""What one client can do to all others: bodies that are bombs, prompts too long to fit, connections
that send nothing.

Starts a server of its own on loopback and abuses it for a few minutes, with bounded numbers:

- body bombs: 2 MiB of small parts in each place that takes some; meanwhile /health is asked for all
  the time, so its slowest answer shows how long the event loop was held;
- 60 clients send the largest prompt and leave at once; then another asks for one token;
- 900 clients send half of their headers; when the server closes them, and what another client sees;
- 1,200 silent connections where a process may have 1,024 descriptors; what another client sees, and
  how many lines the log gets.

Prints a table; the last line of stdout is JSON, which --out keeps. `--code DIR` serves another
checkout, for a comparison. Client and server share the processor, so times are upper bounds. Not
measured: a network, a GPU, several attackers at once.

    python -m bench.abuse [MODEL] [--rounds 3] [--only PART,PART] [--code DIR] [--out FILE]
"""

import argparse
import json
import os
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from neuroada_serve.benchmark.report import environment

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = (2 << 20) - 200
NUM_LARGE = 60
NUM_HALF_OPEN = 900
NUM_SILENT = 1200
DESCRIPTORS = 1024
ANSWER_TIMEOUT_S = 60.0


def filled(begin: bytes, item: bytes, end: bytes) -> bytes:
    num = (MOST_BYTES - len(begin) - len(end)) // (len(item) + 1)
    return begin + b",".join([item] * num) + end


def bombs() -> dict[str, tuple[str, bytes]]:
    fields = json.dumps({f"f{i}": 1 for i in range(150_000)}).encode()
    return {
        "messages: {}": ("chat/completions", filled(b'{"messages":[', b"{}", b"]}")),
        "[1, 1, ...]": ("completions", filled(b"[", b"1", b"]")),
        "stop_token_ids: texts": (
            "completions",
            filled(b'{"prompt":"x","stop_token_ids":[', b'"x"', b"]}"),
        ),
        "prompt: lists": ("completions", filled(b'{"prompt":[', b"[]", b"]}")),
        "unknown fields": ("completions", fields),
        "logit_bias": ("completions", b'{"prompt":"x","logit_bias":' + fields[:-1] + b"}}"),
        "deep lists": ("completions", b'{"prompt":' + b"[" * MOST_BYTES),
        "2,048 messages: {}": (
            "chat/completions",
            b'{"messages":[' + b",".join([b"{}"] * 2048) + b"]}",
        ),
        "200,000 token ids": ("completions", json.dumps({"prompt": [7] * 200_000}).encode()),
    }


# --- the server ------------------------------------------------------------------------------


class Server:
    """One that runs, its address and how many lines it has logged."""

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
        return socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_TIMEOUT_S)

    def forget_peak(self) -> None:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def memory(self, what: str) -> int:
        """VmRSS or VmHWM, the peak, in bytes."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) << 10

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._counting.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def server(model: str, code: Path, descriptors: int | None = None) -> Iterator[Server]:
    running = Server(model, code, descriptors)
    try:
        yield running
    finally:
        running.stop()


# --- clients ---------------------------------------------------------------------------------


def post(route: str, body: bytes) -> bytes:
    head = f"POST /v1/{route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
ONE_TOKEN = post("completions", b'{"prompt":"Say hi","max_tokens":1,"temperature":0}')


def answer_s(running: Server, request: bytes, connection: socket.socket | None = None) -> float:
    """Seconds to the answer's first bytes; the limit where none came."""
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
    """Times of a request that is sent again and again, each on a connection of its own."""
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


# --- the abuse -------------------------------------------------------------------------------


def measure_bombs(running: Server, rounds: int) -> dict[str, Any]:
    found = {}
    with sampled(running, HEALTH) as quiet:
        time.sleep(2)
    found["nothing"] = {"answer_s": [], "held_ms": [max(quiet) * 1e3], "memory_mib": 0.0}
    for name, (route, body) in bombs().items():
        answers, held = [], []
        before = running.memory("VmRSS")
        running.forget_peak()
        for _ in range(rounds):
            with sampled(running, HEALTH) as samples:
                time.sleep(0.1)
                answers.append(answer_s(running, post(route, body)))
            held.append(max(samples) * 1e3)
        extra = max(0, running.memory("VmHWM") - before)
        found[name] = {"answer_s": answers, "held_ms": held, "memory_mib": extra / 2**20}
    return found


def measure_large_prompts(running: Server, rounds: int) -> dict[str, Any]:
    words = "the largest prompt that a body of two megabytes can hold is all of these words "
    prompt = (words * (MOST_BYTES // len(words)))[: MOST_BYTES - 100]
    request = post("completions", json.dumps({"prompt": prompt, "max_tokens": 1}).encode())
    answer_s(running, ONE_TOKEN)
    alone = [answer_s(running, ONE_TOKEN) for _ in range(10)]
    first, second = [], []
    for _ in range(rounds):
        with ExitStack() as stack:
            connections = [stack.enter_context(running.connect()) for _ in range(NUM_LARGE)]
            senders = [threading.Thread(target=c.sendall, args=(request,)) for c in connections]
            for sender in senders:
                sender.start()
            for sender in senders:
                sender.join()
        first.append(answer_s(running, ONE_TOKEN))
        second.append(answer_s(running, ONE_TOKEN))
        time.sleep(1)
    return {"alone_s": alone, "after_60_left_s": first, "the_next_s": second}


def measure_half_open(running: Server, wait_s: float) -> dict[str, Any]:
    alone = [answer_s(running, ONE_TOKEN) for _ in range(10)]
    selector = selectors.DefaultSelector()
    with ExitStack() as stack:
        opened = time.perf_counter()
        for _ in range(NUM_HALF_OPEN):
            connection = stack.enter_context(running.connect())
            connection.sendall(b"GET /health HTTP/1.1\r\nHos")
            selector.register(connection, selectors.EVENT_READ)
        num_open, last_s = NUM_HALF_OPEN, 0.0
        with sampled(running, ONE_TOKEN, every_s=0.1) as samples:
            while num_open and (since := time.perf_counter() - opened) < wait_s:
                for key, _ in selector.select(timeout=0.2):
                    if has_ended(key.fileobj):  # type: ignore[arg-type]
                        selector.unregister(key.fileobj)
                        num_open -= 1
                        last_s = since
    return {
        "gone": NUM_HALF_OPEN - num_open,
        "last_gone_after_s": last_s,
        "alone_s": alone,
        "beside_them_s": samples,
    }


def has_ended(connection: socket.socket) -> bool:
    try:
        return not connection.recv(65536)
    except ConnectionError:
        return True


def measure_descriptors(running: Server) -> dict[str, Any]:
    lines_before = running.num_lines
    with ExitStack() as stack:
        for _ in range(NUM_SILENT):
            stack.enter_context(running.connect())
        time.sleep(1)
        beside = answer_s(running, HEALTH)
    time.sleep(1)
    return {
        "log_lines": running.num_lines - lines_before,
        "beside_them_s": beside,
        "afterwards_s": answer_s(running, HEALTH),
    }


# --- report ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--code", type=Path, default=ROOT, help="checkout to serve")
    parser.add_argument("--wait", type=float, default=20.0, help="seconds for half-open clients")
    parser.add_argument("--only", default="bombs,large_prompts,half_open,descriptors")
    parser.add_argument("--out", type=Path, help="parts that it has of an earlier run stay")
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    code = args.code.resolve()
    parts: dict[str, Callable[[Server], dict[str, Any]]] = {
        "bombs": lambda running: measure_bombs(running, args.rounds),
        "large_prompts": lambda running: measure_large_prompts(running, args.rounds),
        "half_open": lambda running: measure_half_open(running, args.wait),
        "descriptors": measure_descriptors,
    }
    results: dict[str, Any] = {}
    if args.out is not None and args.out.is_file():
        results = json.loads(args.out.read_text())
    results |= {"benchmark": "abuse", "model": args.model, "rounds": args.rounds}
    for name in args.only.split(","):
        measure = parts[name]
        with server(args.model, code, DESCRIPTORS if name == "descriptors" else None) as running:
            results[name] = measure(running)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=code, capture_output=True, text=True, check=True
    )
    results |= environment() | {"commit": commit.stdout.strip()}
    print_table(results)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


def print_table(results: dict[str, Any]) -> None:
    table = Table("abuse", "what others see", "median", "worst")

    def row(abuse: str, what: str, values: list[float], unit: str) -> None:
        if values:
            median, worst = statistics.median(values), max(values)
            table.add_row(abuse, what, f"{median:.3g} {unit}", f"{worst:.3g} {unit}")

    for name, found in results.get("bombs", {}).items():
        row(f"bomb, {name}", "event loop held", found["held_ms"], "ms")
        row("", f"refused after, {found['memory_mib']:.0f} MiB", found["answer_s"], "s")
    if large := results.get("large_prompts"):
        row("none", "one token", large["alone_s"], "s")
        row(f"{NUM_LARGE} largest prompts, left", "one token", large["after_60_left_s"], "s")
        row("", "the next", large["the_next_s"], "s")
    if half := results.get("half_open"):
        row("none", "one token", half["alone_s"], "s")
        row(f"{NUM_HALF_OPEN} half-open", "one token", half["beside_them_s"], "s")
        row("", f"{half['gone']} gone, the last after", [half["last_gone_after_s"]], "s")
    if few := results.get("descriptors"):
        row(f"{NUM_SILENT} silent", "health", [few["beside_them_s"]], "s")
        row("", f"health afterwards; {few['log_lines']} log lines", [few["afterwards_s"]], "s")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
