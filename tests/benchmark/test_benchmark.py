"""`neuroada bench`: the workload, the arithmetic, the check, and whole runs on a tiny model."""

import io
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.main import get_command
from typer.testing import CliRunner

from neuroada_serve.adapters.format import BaseSpec
from neuroada_serve.benchmark import offline
from neuroada_serve.benchmark.adapters import save_random_lora
from neuroada_serve.benchmark.cases import Case, Work, latency_cases, throughput_cases
from neuroada_serve.benchmark.check import Checker
from neuroada_serve.benchmark.measure import OurEngine, Timeline, percentile
from neuroada_serve.benchmark.offline import plan, run_rounds, summary
from neuroada_serve.benchmark.peers import Peer, PeerProcess, peer_command, peer_environment
from neuroada_serve.benchmark.report import plain, progress_bar
from neuroada_serve.benchmark.serving import Sent, figures
from neuroada_serve.benchmark.settings import OfflineConfig, ServingConfig, parse_goodput
from neuroada_serve.benchmark.workload import (
    MERGED,
    arrivals,
    assign,
    random_prompts,
    text_prompts,
)
from neuroada_serve.cli.main import app
from neuroada_serve.errors import EngineError, UsageError
from neuroada_serve.model import bypass_linear
from neuroada_serve.ops.bypass import bypass_add_
from neuroada_serve.ops.step_plan import StepPlan
from tests.support.tiny import save_tiny_model

SMALL = ["--output-len", "3", "--prompt-len", "5", "--rounds", "2", "--k", "1,2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


def run(*args: object):
    return CliRunner().invoke(app, ["bench", *(str(a) for a in args), "--json"])


def document(result) -> dict:
    """The last line of stdout."""
    return json.loads(result.stdout.splitlines()[-1])


# --- workload --------------------------------------------------------------------------------


def test_popularity_assigns_as_named():
    assert assign("base", 3, 8) == [None] * 3
    assert assign("identical", 3, 8) == assign("merged", 3, 8) == [0, 0, 0]
    assert assign("distinct", 3, 8) == [0, 1, 2]
    assert assign("distinct", 3, 2) == [0, 1, 0]
    assert assign("half-merged", 3, 8) == [0, None, 0]


def test_uniform_draws_all_alike():
    counts = Counter(assign("uniform", 8000, 8, seed=1))
    assert set(counts) == set(range(8))
    assert all(850 < n < 1150 for n in counts.values())


def test_zipf_follows_its_exponent():
    counts = Counter(assign("zipf:1.5", 20000, 50, seed=1))
    assert counts[0] / counts[1] == pytest.approx(2**1.5, rel=0.1)
    assert counts[0] / counts[3] == pytest.approx(4**1.5, rel=0.15)


def test_same_seed_same_workload():
    for popularity in ("uniform", "zipf:1"):
        assert assign(popularity, 20, 9, "a") == assign(popularity, 20, 9, "a")
        assert assign(popularity, 20, 9, "a") != assign(popularity, 20, 9, "b")
    assert arrivals(9, 2, 1, 3) == arrivals(9, 2, 1, 3) != arrivals(9, 2, 1, 4)
    assert random_prompts(2, 5, range(99), 1) == random_prompts(2, 5, range(99), 1)


@pytest.mark.parametrize("popularity", ["", "zipf", "zipf:", "zipf:0", "zipf:-1", "zipf:inf", "x"])
def test_unknown_popularity_is_refused(popularity):
    with pytest.raises(UsageError, match="zipf:A"):
        OfflineConfig(popularity=(popularity,))


def test_arrivals_keep_the_rate_whatever_was_drawn():
    times = arrivals(50, request_rate=4, burstiness=1, seed=2)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(50 / 4)
    assert arrivals(3, math.inf, 1) == [0, 0, 0]


@pytest.mark.parametrize("burstiness", [0.25, 1, 4])
def test_gaps_have_the_variation_of_their_burstiness(burstiness):
    times = arrivals(20000, 10, burstiness, seed=5)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    variation = statistics.stdev(gaps) / statistics.mean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)


def test_infinite_burstiness_is_a_clock():
    assert arrivals(4, 2, math.inf) == pytest.approx([0.5, 1, 1.5, 2])


def test_text_prompts_go_round_the_text():
    prompts = text_prompts(20, 7, [10, 11, 12], seed=1)
    assert {len(prompt) for prompt in prompts} == {7}
    assert {prompt[0] for prompt in prompts} == {10, 11, 12}
    assert all((b - a) % 3 == 1 for prompt in prompts for a, b in zip(prompt, prompt[1:], strict=0))


# --- arithmetic ------------------------------------------------------------------------------


def test_timeline_figures():
    # Two requests; the second starts a step later, so decode counts from 2 s on: 2 tokens in 2 s.
    line = Timeline(((1.0, 2.0, 3.0), (2.0, 4.0)), wall_s=5.0, num_prompt_tokens=8)
    assert line.tokens_per_s == 1
    assert line.decode_tokens_per_s == 1
    assert line.prefill_tokens_per_s == 4
    assert line.step_ms == [1000, 1000]
    assert line.ttft_ms == [1000, 2000]
    assert line.tpot_ms == [1000, 2000]


def test_percentile_is_linear_between_values():
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([7], 99) == 7
    assert percentile(range(101), 99) == 99


def test_goodput_counts_requests_within_every_limit():
    def sent(ttft_ms: float, e2el_ms: float, error: str | None = None) -> Sent:
        return Sent(0, "m", ttft_ms=ttft_ms, e2el_ms=e2el_ms, output_tokens=11, error=error)

    requests = [sent(100, 600), sent(100, 601), sent(101, 500), sent(1, 2, "HTTP 500"), Sent(0, "")]
    found = figures(requests[:4], 2.0, {"ttft": 100, "tpot": 50})
    assert found["request_goodput"] == 0.5
    assert found["request_throughput"] == 1.5
    assert found["output_throughput"] == 16.5
    assert found["failed"] == 1
    assert found["ttft_ms_p50"] == 100
    assert figures(requests[:4], 2.0, {})["request_goodput"] == 1.5
    assert not requests[4].keeps({"ttft": 1e9})


def test_no_answer_at_all_is_an_error():
    with pytest.raises(EngineError, match="HTTP 500"):
        figures([Sent(0, "m", error="HTTP 500")], 1.0, {})


def test_goodput_is_read_as_vllm_writes_it():
    assert parse_goodput(["ttft:500 tpot:50"]) == (("ttft", 500), ("tpot", 50))
    assert parse_goodput(["ttft:500", "e2el:9,tpot:1"]) == (("ttft", 500), ("e2el", 9), ("tpot", 1))
    for wrong in ("ttft", "ttft:x", "ttft:0", "itl:5"):
        with pytest.raises(UsageError, match="ttft, tpot, e2el"):
            parse_goodput([wrong])


def test_cases_and_their_base():
    config = OfflineConfig(concurrency=(1, 4), k=(1, 8), popularity=("distinct",))
    cases = throughput_cases(config)
    assert len(cases) == 2 * 3 + 3
    assert {case.base for case in cases} == {
        Case("decode", 1, "base"),
        Case("decode", 4, "base"),
        Case("prefill", 1, "base"),
    }
    assert {case.phase for case in latency_cases(config)} == {"latency"}


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


# --- peers -----------------------------------------------------------------------------------

FAKE_PEER = """
import json, os, sys
setup = json.loads(sys.stdin.readline())
print("noise", file=sys.stderr)
print(json.dumps({"ready": True, "versions": {}, "loras": setup["loras"]}), flush=True)
for line in sys.stdin:
    work = json.loads(line)
    if work["output_len"] == 13:
        print(json.dumps({"error": "unlucky"}), flush=True)
        continue
    times = [0.5 * (i + 1) for i in range(work["output_len"])]
    print(json.dumps({"token_s": [times for _ in work["prompts"]], "wall_s": 9.0}), flush=True)
"""


@pytest.fixture
def fake_peer(tmp_path):
    """Command of a peer without an engine."""
    script = tmp_path / "peer.py"
    script.write_text(FAKE_PEER)
    return [sys.executable, str(script)]


def is_stopped(process: PeerProcess) -> bool:
    """Return whether the process has stopped; the signal takes a moment."""
    stat = Path(f"/proc/{process._process.pid}/stat")
    for _ in range(500):
        if stat.read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.01)
    return False


def test_peer_does_the_work_and_sleeps_between(fake_peer, tmp_path):
    peer = Peer("vllm", fake_peer, {"model": "m"}, [tmp_path / "lora"], os.environ)
    try:
        line = peer.run(Work(((1, 2), (3, 4)), (None, 0), output_len=3))
        assert line == Timeline(((0.5, 1.0, 1.5),) * 2, 9.0, num_prompt_tokens=4)
        assert peer.facts["base"]["loras"] == []
        assert peer.facts["with_adapters"]["loras"] == [str(tmp_path / "lora")]
        assert is_stopped(peer._base)
        assert is_stopped(peer._adapted)
    finally:
        peer.close()
    assert peer._base._process.returncode == 0


def test_peer_error_ends_the_run_with_its_log(fake_peer):
    process = PeerProcess(fake_peer, {"loras": []}, os.environ)
    try:
        with pytest.raises(EngineError, match="unlucky\nnoise"):
            process.ask({"prompts": [[1]], "adapters": [None], "merged": False, "output_len": 13})
    finally:
        process.close()


def test_peer_that_cannot_start_is_an_engine_error():
    with pytest.raises(EngineError, match="no such module"):
        PeerProcess([sys.executable, "-c", "raise SystemExit('no such module')"], {}, os.environ)


def test_peers_get_our_threads(tmp_path):
    python = tmp_path / "python"
    assert peer_command("vllm", python)[0] == str(python)
    assert peer_command("peft", python)[0] == sys.executable
    assert all(Path(peer_command(name, None)[1]).is_file() for name in ("peft", "vllm"))
    environment = peer_environment("vllm", 1, {"VLLM_CPU_KVCACHE_SPACE": "7"})
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"].isdigit()


def test_peers_do_not_merge_what_they_cannot(fake_peer):
    can = {}
    for name in ("peft", "vllm"):
        peer = Peer(name, fake_peer, {}, [], os.environ)
        can[name] = [p for p in ("distinct", "merged", "half-merged") if peer.can(Case("", 1, p))]
        peer.close()
    assert can == {"peft": ["distinct", "merged"], "vllm": ["distinct"]}


def test_lora_for_peers_has_both_factors(tmp_path):
    spec = BaseSpec("base", "0" * 64, {"model.layers.0.mlp.up_proj": (6, 4)})
    save_random_lora(spec, 2, 0, tmp_path / "lora")
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
        assert all(file.get_tensor(name).abs().sum() > 0 for name in shapes)
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    assert shapes == {f"{prefix}.lora_A.weight": (2, 4), f"{prefix}.lora_B.weight": (6, 2)}


# --- the check -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(model):
    config = OfflineConfig(concurrency=(3,), k=(1, 2), prompt_len=5, output_len=4, prefill_len=9)
    return OurEngine(model, config, "float32", 3)


def works(popularity: str, k: int | None = 2) -> list[Work]:
    prompts = random_prompts(3, 5, range(256), 1)
    adapters = tuple(assign(popularity, 3, 3))
    return [Work(tuple(map(tuple, prompts)), adapters, 4, k, merged=popularity in MERGED)]


@pytest.mark.parametrize("popularity", ["identical", "distinct", "merged", "half-merged"])
def test_right_cases_pass_the_check(engine, popularity):
    found = Checker(engine, 4).check(Case("decode", 3, popularity, 2), works(popularity))
    assert found.ok
    assert found.num_tokens + found.num_ties >= 12
    assert bypass_linear.bypass_add_ is bypass_add_


def halves_the_values(y, x, table, token_slots):
    whole = torch.zeros_like(y)
    bypass_add_(whole, x, table, token_slots)
    y += whole / 2


def test_broken_op_fails_the_check(engine, monkeypatch):
    monkeypatch.setattr(bypass_linear, "bypass_add_", halves_the_values)
    found = Checker(engine, 4).check(Case("decode", 3, "distinct", 2), works("distinct"))
    assert not found.ok
    assert found.num_wrong >= 1
    assert found.largest_difference > found.tolerance


def test_op_that_is_never_called_voids_the_check(engine, monkeypatch):
    monkeypatch.setattr(StepPlan, "calls", lambda self, site: [])
    with pytest.raises(EngineError, match="void"):
        Checker(engine, 4).check(Case("decode", 3, "distinct", 2), works("distinct"))


# --- whole runs ------------------------------------------------------------------------------


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


def test_peer_runs_beside_ours(model, fake_peer, monkeypatch):
    monkeypatch.setattr(offline, "peer_command", lambda name, python: fake_peer)
    flags = ["--concurrency", 2, "--prefill-len", 0, "--popularity", "distinct", "--no-check"]
    result = run("throughput", model.path, *SMALL, *flags, "--peer", "vllm")
    assert result.exit_code == 0, result.output
    found = document(result)
    assert [c["engine"] for c in found["cases"]] == [
        "neuroada",
        "vllm",
        "neuroada",
        "neuroada",
        "vllm",
    ]
    assert found["cases"][1]["median"]["tokens_per_s"] == pytest.approx(6 / 9)
    assert set(found["cases"][2]["ratio_to_peer"]) == {"vllm"}
    assert found["peers"]["vllm"]["base"]["ready"]


@pytest.mark.timeout(300)
def test_serving_starts_our_server_and_loads_it(model, tmp_path):
    out = tmp_path / "serving.json"
    result = run(
        *["serving", "--model", model.path, "--num-adapters", 3, "--num-prompts", 6],
        *["--input-len", 5, "--output-len", 4, "--vocab", 250, "--request-rate", 200],
        *["--goodput", "ttft:60000 tpot:60000", "--popularity", "base,distinct", "--out", out],
    )
    assert result.exit_code == 0, result.output
    found = document(result)
    assert found["settings"]["adapters"] == ["bench-0", "bench-1", "bench-2"]
    assert [case["popularity"] for case in found["cases"]] == ["base", "distinct"]
    (one,) = found["cases"][1]["rounds"]
    assert {r["model"] for r in one["requests"]} == {"bench-0", "bench-1", "bench-2"}
    assert [r["output_tokens"] for r in one["requests"]] == [4] * 6
    assert one["completed"] == 6
    assert one["request_goodput"] == one["request_throughput"]
    assert out.with_suffix(".png").is_file()


class FakeServer(BaseHTTPRequestHandler):
    """A base and an adapter; answers two chunks, and refuses every prompt that has an even id
    first."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        cards = [{"id": "base"}, {"id": "fr", "parent": "base"}]
        self._answer(200, json.dumps({"data": cards}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["stream_options"] == {"include_usage": True}
        if body["prompt"][0] % 2 == 0 and body["max_tokens"] == 8:
            return self._answer(400, "no even ids")
        chunks = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}]
        chunks.append({"choices": [], "usage": {"completion_tokens": 8}})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return self._answer(200, "".join(lines) + "data: [DONE]\n\n")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def fake_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.timeout(300)
def test_serving_drives_any_server_and_counts_failures(fake_server, monkeypatch):
    monkeypatch.setattr("neuroada_serve.benchmark.serving._warm_up", no_warm_up)
    flags = ["--num-prompts", 20, "--max-concurrency", 2, "--output-len", 8, "--rounds", 2]
    result = run("serving", "--base-url", f"{fake_server}/v1", *flags, "--popularity", "identical")
    assert result.exit_code == 0, result.output
    (case,) = document(result)["cases"]
    for one in case["rounds"]:
        assert one["completed"] + one["failed"] == 20
        assert one["failed"] > 0
        answered = [r for r in one["requests"] if r["error"] is None]
        assert {(r["model"], r["output_tokens"], len(r["itl_ms"])) for r in answered} == {
            ("fr", 8, 1)
        }


async def no_warm_up(*args: object) -> None:
    pass


@pytest.mark.timeout(300)
def test_scaling_writes_its_series_and_plots(model, tmp_path):
    script = Path(__file__).resolve().parent.parent.parent / "bench" / "scaling.py"
    flags = ["--rounds", "2", "--steps", "2", "--max-batch", "4", "--out", str(tmp_path)]
    command = [sys.executable, str(script), str(model.path), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "scaling.json").read_text())
    xs = {name: [entry["x"] for entry in entries] for name, entries in found["series"].items()}
    assert xs["adapters"] == xs["batch"] == [1, 2, 4]
    assert xs["k"] == [1, 2, 4, 8, 16, 32]
    assert len(xs["nnz"]) == 7 * 3 + 6  # seven kinds of modules of three ks, and the series of k
    assert len(list(tmp_path.glob("scaling_*.png"))) == 5
    assert found["nnz_fit"]["r2"] <= 1


# --- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["throughput", "/no/such"], "/no/such"),
        (["throughput", "MODEL", "--concurrency", "0"], "concurrency"),
        (["throughput", "MODEL", "--concurrency", "many"], "--concurrency"),
        (["throughput", "MODEL", "--popularity", "zipf"], "zipf:A"),
        (["throughput", "MODEL", "--output-len", "1"], "--output-len"),
        (["throughput", "MODEL", "--peer", "hal"], "peft, vllm"),
        (["throughput", "MODEL", "--peer-python", "/no/python"], "/no/python"),
        (["latency", "MODEL", "--k", ""], "k must name"),
        (["latency", "MODEL", "--text-file", "/no/text"], "/no/text"),
        (["serving"], "--base-url"),
        (["serving", "--model", "MODEL", "--popularity", "merged"], "merged"),
        (["serving", "--model", "MODEL", "--goodput", "itl:5"], "ttft, tpot, e2el"),
        (["serving", "--model", "MODEL", "--lora-modules", "fr"], "--base-url"),
        (["serving", "--base-url", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_mistake_ends_with_one_sentence_and_code_2(model, args, word):
    result = run(*[arg.replace("MODEL", str(model.path)) for arg in args])
    assert result.exit_code == 2, result.output
    assert word in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.count("Error: ") == 1


def test_every_flag_has_help():
    commands = get_command(app).commands["bench"].commands
    assert set(commands) == {"throughput", "latency", "serving"}
    for name, command in commands.items():
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)


def test_document_is_plain_json():
    assert plain({"a": (math.inf, math.nan, Path("x"))}) == {"a": ["inf", None, "x"]}
    assert ServingConfig(model="demo").request_rate == math.inf


def test_progress_is_drawn_in_a_terminal_alone():
    terminal = offline.Console(file=io.StringIO(), force_terminal=True)
    log = offline.Console(file=io.StringIO(), force_terminal=False)
    for console in (terminal, log):
        with progress_bar(console) as progress:
            progress.update(progress.add_task("reading", total=2), completed=2, refresh=True)
    assert "reading" in terminal.file.getvalue()
    assert log.file.getvalue() == ""
