"""Signals before and while it serves."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from neuroada_serve.server.signals import EarlySignals
from tests.support.fake_engine import FakeEngine
from tests.support.serving import serve_while, wait_for

pytestmark = pytest.mark.timeout(300)

CODE = """
import os, signal, sys
from neuroada_serve.server.signals import EarlySignals
with EarlySignals(lambda message: print(message, file=sys.stderr)) as early:
    os.kill(os.getpid(), signal.{name})
    print("went on", early.hung_up)
"""


def run_with(name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE.format(name=name)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_sighup_before_it_serves_is_kept() -> None:
    done = run_with("SIGHUP")
    assert (done.returncode, done.stdout) == (0, "went on True\n")


def test_sigterm_before_it_serves_ends_it_with_a_word() -> None:
    done = run_with("SIGTERM")
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == "Stopped before the server was ready.\n"


def test_kept_sighup_is_seen_to_once_it_serves(caplog: pytest.LogCaptureFixture) -> None:
    early = EarlySignals()
    early.hung_up = True
    engine = FakeEngine()

    def visit(url: str) -> None:
        wait_for(lambda: caplog.messages)

    assert serve_while(engine, visit, early=early) == 0
    found = caplog.messages[0]
    assert found.startswith(
        "adapter directory not rescanned by SIGHUP: there is no adapter directory"
    )


def test_storm_of_sighup_makes_few_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    most = 0

    def slow_rescan():
        nonlocal most
        most = max(most, sum(t.name == "rescan" for t in threading.enumerate()))
        return rescan()

    rescan = engine.adapters.rescan
    monkeypatch.setattr(engine.adapters, "rescan", slow_rescan)

    def visit(url: str) -> None:
        for _ in range(500):
            os.kill(os.getpid(), signal.SIGHUP)
        wait_for(lambda: caplog.messages)

    assert serve_while(engine, visit) == 0
    assert most == 1
