"""Two checkouts measured against each other; here, this one against itself."""

import json
import os
import time

import pytest

from bench import harness, versus
from neuroada_serve.benchmark.peers import PeerProcess
from neuroada_serve.errors import EngineError
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")).path)


def test_two_checkouts_are_measured_in_turn(model, tmp_path, capsys, monkeypatch):
    awake: list[int] = []
    started = []

    def ask(self: PeerProcess, message: object) -> object:
        others = {pid for pid in awake if pid != self._process.pid}
        assert all(map(is_stopped, others)), "both compute at a time"
        awake.append(self._process.pid)
        return asked(self, message)

    asked = PeerProcess.ask
    monkeypatch.setattr(PeerProcess, "ask", ask)
    monkeypatch.setattr(versus, "start_s", lambda *given: started.append(given) or 1.0)
    flags = ["--before", str(harness.ROOT), "--after", str(harness.ROOT), "--model", model]
    flags += ["--rounds", "2", "--repeats", "1", "--limit", "1e9", "--threads", "1"]
    out = tmp_path / "versus.json"
    assert versus.main([*flags, "--output-len", "3", "--prefill-len", "8", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["checkouts"]["before"] == result["checkouts"]["after"]
    cases = ["base", "distinct, k=1", "distinct, k=8", "merged, k=1", "merged, k=8"]
    figures = [f"decode, {case}: tokens_per_s" for case in cases]
    figures += ["prefill, identical, k=8: prefill_tokens_per_s", versus.START]
    figures += ["decode, base: processor_s"]
    for name in figures:
        figure = result["figures"][name]
        assert len(figure["ratios"]) == len(figure["before"]["rounds"]) == 2, name
        assert all(value > 0 for value in figure["after"]["rounds"])
    assert len(set(awake)) == 4  # new ones in the second round
    assert not any(os.path.exists(f"/proc/{pid}") for pid in awake)
    assert started == [(model, harness.ROOT)] * 6  # both, to warm up and in two rounds


def is_stopped(pid: int) -> bool:
    """True once the process has come to a stop, which takes a moment, or has ended."""
    for _ in range(500):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "T":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_start_ends_with_the_first_token(model):
    assert 0 < versus.start_s(model, harness.ROOT) < 300


def test_failed_start_says_why(tmp_path):
    with pytest.raises(SystemExit, match="no-such-model"):
        versus.start_s(str(tmp_path / "no-such-model"), harness.ROOT)


def test_checkout_that_is_not_the_one_imported_ends_the_run(model, tmp_path):
    flags = ["--before", str(tmp_path), "--after", str(harness.ROOT), "--model", model]
    with pytest.raises(EngineError, match="not from|No module named"):
        versus.main([*flags, "--out", str(tmp_path / "versus.json")])


@pytest.mark.parametrize(
    ("name", "after", "worse"),
    [
        ("decode, base: tokens_per_s", [97.0, 194.0], True),
        ("decode, base: tokens_per_s", [99.0, 198.0], False),
        ("decode, base: tokens_per_s", [120.0, 240.0], False),
        ("decode, base: processor_s", [103.0, 206.0], True),
        ("decode, base: processor_s", [80.0, 160.0], False),
        (versus.START, [103.0, 206.0], True),
        (versus.START, [80.0, 160.0], False),
    ],
)
def test_rates_may_not_fall_and_times_not_rise(name, after, worse):
    found = versus.compared(name, {"before": [100.0, 200.0], "after": after}, 0.02)
    assert found["worse"] is worse
    assert found["ratio"] == pytest.approx(after[0] / 100)


def test_rounds_are_interleaved_in_alternating_order():
    order: list[tuple[str, int]] = []
    ways = {name: (lambda n, name=name: order.append((name, n)) or n) for name in "ab"}
    samples = harness.interleaved(ways, 2, versus.Console(stderr=True))
    assert samples == {"a": [0, 1], "b": [0, 1]}
    assert order == [("b", 2), ("a", 2), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
