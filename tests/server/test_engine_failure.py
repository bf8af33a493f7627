"""A server whose engine fails for good: every request ends, and so does the process."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.python import ROOT
from tests.support.serving import is_listening, wait_for
from tests.support.tiny import save_tiny_model

pytestmark = pytest.mark.timeout(300)

ENDLESS = {"prompt": "hello", "ignore_eos": True, "max_tokens": 200}
# `neuroada serve`, whose step number N fails, and every one after it.
FAILING = """
import itertools, sys, time, torch
from concurrent.futures import ThreadPoolExecutor
from neuroada_serve.cli.main import app
from neuroada_serve.engine.runner import ModelRunner

first, kind = int(sys.argv.pop(1)), sys.argv.pop(1)
run, numbers = ModelRunner.run, itertools.count()

def fail(self, *args):
    if next(numbers) < first:
        return run(self, *args)
    if kind == "stuck":
        ThreadPoolExecutor(1).submit(time.sleep, 600)
    if kind in ("device", "stuck"):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return 1 / 0

ModelRunner.run = fail
app()
"""


@contextmanager
def failing(tmp_path: Path, first: int, kind: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Address of such a server, and what to call to wait for its end: exit code and log."""
    model = save_tiny_model(tmp_path, "llama").path
    command = [sys.executable, "-c", FAILING, str(first), kind, "serve", str(model)]
    command += ["--port", "0", "--max-num-seqs", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"Serving \S+ on (http://\S+)/v1", line):
                break
        else:
            raise AssertionError("the server did not start: " + "".join(said))
        reading = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
        reading.start()

        def ended() -> tuple[int, str]:
            code = process.wait(60)
            reading.join(60)
            return code, "".join(said)

        try:
            yield found[1], ended
        finally:
            process.kill()


def ask(url: str, stream: bool) -> tuple[int, str]:
    body = {**ENDLESS, "stream": stream}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    return reply.status_code, reply.text


def test_fault_of_the_device_ends_every_request_and_the_process(tmp_path: Path) -> None:
    # So many steps that all four have come; the answers are longer.
    with failing(tmp_path, 150, "device") as (url, ended), ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, url, stream) for stream in (False, True, False, True)]
        for reply in asked:  # two of them run, two wait
            status, text = reply.result(60)
            assert status == 500 or (status == 200 and '"code": 500' in text), text
        wait_for(lambda: not is_listening(url))
        code, log = ended()
    assert code == 70
    assert re.search(r"CRITICAL .*the server stops: DeviceError: .*illegal memory access", log)


def test_thread_that_is_stuck_in_the_device_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    with failing(tmp_path, 2, "stuck") as (url, ended):
        assert ask(url, stream=False)[0] == 500
        code, log = ended()
    assert code == 70
    assert "the server stops: DeviceError" in log


def test_steps_that_fail_again_and_again_end_the_process(tmp_path: Path) -> None:
    with failing(tmp_path, 2, "bug") as (url, ended):
        for _ in range(8):
            assert httpx.get(f"{url}/health", timeout=60).status_code == 200
            assert ask(url, stream=False)[0] == 500
        code, log = ended()
    assert code == 70
    assert "the server stops: EngineError: 8 steps in a row failed" in log
