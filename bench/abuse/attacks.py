"""Attacks of one client, and their effect on all others."""

import json
import selectors
import threading
import time
from contextlib import ExitStack
from typing import Any

from bench.abuse.server import HEALTH, ONE_TOKEN, Server, answer_s, has_ended, post, sampled

MOST_BYTES = (2 << 20) - 200
NUM_LARGE = 60
NUM_HALF_OPEN = 900
NUM_SILENT = 1200
DESCRIPTORS = 1024


def filled(begin: bytes, item: bytes, end: bytes) -> bytes:
    """Body of the greatest size that is allowed, full of one item."""
    num = (MOST_BYTES - len(begin) - len(end)) // (len(item) + 1)
    return begin + b",".join([item] * num) + end


def bombs() -> dict[str, tuple[str, bytes]]:
    """Bodies of many small parts: name -> (route, body)."""
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


def measure_bombs(running: Server, rounds: int) -> dict[str, Any]:
    """Send each bomb; meanwhile the slowest answer of /health shows how long the loop was held."""
    found = {}
    with sampled(running, HEALTH) as quiet:
        time.sleep(2)
    found["nothing"] = {"answer_s": [], "held_ms": [max(quiet) * 1e3], "memory_mib": 0.0}
    for name, (route, body) in bombs().items():
        answers, held = [], []
        before = running.memory("VmRSS")
        running.reset_peak()
        for _ in range(rounds):
            with sampled(running, HEALTH) as samples:
                time.sleep(0.1)
                answers.append(answer_s(running, post(route, body)))
            held.append(max(samples) * 1e3)
        extra = max(0, running.memory("VmHWM") - before)
        found[name] = {"answer_s": answers, "held_ms": held, "memory_mib": extra / 2**20}
    return found


def measure_large_prompts(running: Server, rounds: int) -> dict[str, Any]:
    """Time one token after many clients sent the largest prompt and left."""
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
    """Time one token beside clients that send half of their headers, until they are closed."""
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


def measure_descriptors(running: Server) -> dict[str, Any]:
    """Ask /health beside more silent connections than the process may have descriptors."""
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
