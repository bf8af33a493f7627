"""`neuroada bench throughput` and `latency`: whole runs."""

import json
import statistics

import torch
from typer.testing import CliRunner

from neuroada_serve.benchmark import offline
from neuroada_serve.benchmark.cases import Case, Work, throughput_cases
from neuroada_serve.benchmark.measure import Timeline
from neuroada_serve.benchmark.offline import plan, run_rounds, summary
from neuroada_serve.benchmark.settings import OfflineConfig
from neuroada_serve.cli.main import app
from neuroada_serve.model import bypass_linear
from tests.support.benchmark import SMALL, document, halves_the_values, run


class FakeRunner:
    """Takes a fixed time per token, twice that with adapters."""

    def __init__(self, name: str, token_s: float) -> None:
        self.name = name
        self.token_s = token_s
        self.calls: list[Work] = []

    def can(self, case: Case) -> bool:
        return case.popularity != "merged"

    def run(self, work: Work) -> Timeline:
        self.calls.append(work)
        token_s = self.token_s * (2 if any(a is not None for a in work.adapters) else 1)
        times = tuple(token_s * (i + 1) for i in range(work.output_len))
        return Timeline((times,) * len(work.prompts), times[-1], 1)


# --- arithmetic -----------------------------------------------------------------------------------


def test_rounds_take_turns_and_ratios_stay_within_a_round():
    ours, peer = FakeRunner("neuroada", 1.0), FakeRunner("vllm", 2.0)
    config = OfflineConfig(concurrency=(2,), popularity=("distinct", "merged"), prefill_len=0)
    series = plan(ours, [peer], throughput_cases(config))
    labels = [(one.runner.name, one.case.label) for one in series]
    assert labels[:3] == [("neuroada", "base"), ("vllm", "base"), ("neuroada", "distinct, k=1")]
    assert labels[3:5] == [("neuroada", "distinct, k=8"), ("vllm", "distinct")]
    assert ("vllm", "merged") not in labels

    def works(case: Case, number: int) -> list[Work]:
        ours.token_s, peer.token_s = 1.0 + number, 2.0 + 2 * number  # the machine slows down
        adapter = None if case.popularity == "base" else 0
        return [Work(((1,), (2,)), (adapter, adapter), 4, case.k)]

    run_rounds(series, works, 5, offline.Console(quiet=True))
    assert len(ours.calls) == 6 * 5  # a round to warm up
    entry = summary(series[2], series)
    assert entry["samples"]["tokens_per_s"] == [2 / (2 * (1 + n)) for n in range(5)]
    assert entry["ratio_to_base"] == {"decode_tokens_per_s": 0.5, "tokens_per_s": 0.5}
    assert entry["ratio_to_peer"] == {"vllm": {"decode_tokens_per_s": 2.0, "tokens_per_s": 2.0}}
    assert len(entry["distributions"]["step_ms"]["rounds"]) == 5
    assert summary(series[1], series)["ratio_to_peer"] == {}


# --- whole runs -----------------------------------------------------------------------------------


def test_tables_come_alone_unless_json_is_asked_for(model, capsys):
    flags = [*SMALL, "--concurrency", "1", "--popularity", "identical", "--k", "1", "--no-check"]
    flags = ["bench", "throughput", str(model.path), *flags, "--prefill-len", "9"]
    plain = CliRunner().invoke(app, flags)
    assert plain.exit_code == 0, plain.output
    assert "call tok/s" in plain.stdout
    assert "{" not in plain.stdout
    both = CliRunner().invoke(app, [*flags, "--json"])
    assert both.stdout.count("\n") == 1
    assert "call tok/s" in both.stderr
    assert document(both)["schema"] == "neuroada-bench/1"


def test_throughput_runs_checked(model, tmp_path):
    out = tmp_path / "deep" / "throughput.json"
    flags = ["--concurrency", "1,3", "--prefill-len", 40, "--out", out]
    result = run("throughput", model.path, *SMALL, *flags)
    assert result.exit_code == 0, result.output
    found = document(result)
    assert found == json.loads(out.read_text())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert found["schema"] == "neuroada-bench/1"
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] >= 1
    assert found["settings"]["dtype"] == "bfloat16"
    assert found["settings"]["threads"] == torch.get_num_threads()
    cases = found["cases"]
    assert [c["phase"] for c in cases] == ["decode"] * 14 + ["prefill"] * 3
    assert len(found["check"]) == 2 * len(cases)  # float32, then bfloat16
    assert all(check["ok"] for check in found["check"])
    for case in cases:
        for figure, samples in case["samples"].items():
            assert len(samples) == 2
            assert all(sample > 0 for sample in samples)
            assert case["median"][figure] == statistics.median(samples)
        if case["popularity"] == "base":
            assert set(case["ratio_to_base"].values()) == {1.0}
    assert [len(times) for times in found["switch_ms"]["k=2"].values()] == [20] * 3
    steps = cases[0]["distributions"]["step_ms"]
    assert [len(samples) for samples in steps["rounds"]] == [2, 2]
    assert steps["p50"] <= steps["p99"]


def test_latency_runs(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April.")
    flags = ["--num-prompts", 3, "--text-file", text, "--popularity", "zipf:1", "--no-check"]
    result = run("latency", model.path, *SMALL, *flags)
    assert result.exit_code == 0, result.output
    found = document(result)
    assert found["check"] is None
    assert [(c["popularity"], c["k"]) for c in found["cases"]] == [
        ("base", None),
        ("zipf:1", 1),
        ("zipf:1", 2),
    ]
    ttft = found["cases"][0]["distributions"]["ttft_ms"]
    assert [len(samples) for samples in ttft["rounds"]] == [3, 3]
    assert ttft["p50"] <= ttft["p90"] <= ttft["p99"]


def test_broken_op_is_not_timed(model, monkeypatch):
    monkeypatch.setattr(bypass_linear, "bypass_add_", halves_the_values)
    result = run("throughput", model.path, *SMALL, "--concurrency", 2, "--prefill-len", 0)
    assert result.exit_code == 1
    found = document(result)
    assert not all(check["ok"] for check in found["check"])
    assert found["cases"] == []
    assert "check failed" in result.stderr
