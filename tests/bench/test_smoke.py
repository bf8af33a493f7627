"""Every script of bench/ that has no test of its own runs, smaller, on a tiny model."""

import json
import shutil

import pytest
import torch

from bench import (
    choices,
    contexts,
    harness,
    memory,
    pool,
    prefix_answers,
    prefix_hits,
    redraw,
    scaling,
    startup,
    stops,
)
from bench.adapters import __main__ as adapters
from bench.merge import __main__ as merge
from bench.merge import modes
from bench.sharing import __main__ as sharing
from bench.sharing import tenants, turns
from neuroada_serve import save_adapter
from tests.support.decoder_sizes import SIZES
from tests.support.tiny import random_adapter, save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 1024, "max_position_embeddings": 1024}
    return str(save_tiny_model(folder, dtype=torch.bfloat16, **sizes).path)


@pytest.fixture
def run(tmp_path, capsys):
    """Run a script's main and return its document, which is its last line and its file, too."""

    def run(script, *flags: object) -> dict:
        out = tmp_path / "found.json"
        script.main([*map(str, flags), "--out", str(out)])
        result = json.loads(out.read_text())
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
        assert {"commit", "modified", "versions", "hardware", "date"} <= result.keys()
        assert result["schema"] == harness.SCHEMA
        assert "out" not in result["settings"]
        return result

    return run


def test_thousands_of_adapters_in_small(model, run, tmp_path):
    flags = ["--counts", "1,20", "--rounds", 1, "--requests", 4, "--probes", 1]
    result = run(adapters, model, *flags)
    assert [row["adapters"] for row in result["start"]] == [1, 20]
    cases = {row["case"]: row for row in result["throughput"]["cases"]}
    assert cases.keys() == {"distinct", "1", "20"}
    assert all(row["tokens_per_s"] > 0 for row in cases.values())
    assert result["memory"]["adapters"] == 20
    assert all(ms > 0 for load in result["cold"].values() for ms in load["ttft_ms"].values())
    assert (tmp_path / "found.png").stat().st_size > 1000


def test_merging_restores_every_bit(model, run, monkeypatch):
    monkeypatch.setattr(merge, "MODE_KS", (2,))
    monkeypatch.setattr(modes, "NUM_REQUESTS", 6)
    result = run(merge, model, "--rounds", 1, "--rotations", 3)
    assert result["rotations"]["bit_exact"]
    assert result["rotations"]["digest_while_merged_differs"]
    assert result["swap"]["times_faster"].keys() == {"k1", "k8"}
    assert result["costs"].keys() == result["modes"].keys() == {"k=2"}


def test_waiting_is_measured(model, run, monkeypatch):
    monkeypatch.setattr(turns, "TURN_REQUESTS", 8)
    monkeypatch.setattr(tenants, "TENANT_SECONDS", 0.5)
    result = run(sharing, model, "--rounds", 1)
    assert result["turns"]["room for three"]["ttft_ms_p50"] > 0
    assert 0 < result["tenants"]["equal shares"]["jain_index"] <= 1
    assert result["prefix"]["cached_tokens"] > 0


def test_choices_time_both_ways(model, run, monkeypatch):
    sizes = {"LANES": (2,), "THREAD_LANES": (2,), "WIDTHS": (32,), "PROMPTS": (16,), "RUNS": (8,)}
    for name, values in sizes.items():
        monkeypatch.setattr(choices, name, values)
    result = run(choices, model, "--rounds", 1, "--steps", 3)
    assert len(result["choices"]) == 2 + 2 + 1 + 2 * 2
    assert all(one["ratio"] > 0 and len(one["rounds"]) == 1 for one in result["choices"])


def test_prompt_without_memory_ends_alone(tmp_path, run):
    sizes = {**SIZES, "vocab_size": 512, "max_position_embeddings": 8192}
    source = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16, **sizes)
    result = run(memory, source.path, "--tries", 1, "--requests", 4)
    for path in result["paths"].values():
        assert path["exit_code"] == 0
        [found] = path["tries"]
        assert found["alone"]
        assert (found["streams_right"], found["right"]) == (3, 4)


def test_scaling_writes_and_draws_its_series(model, run, tmp_path):
    result = run(scaling, model, "--rounds", 2, "--steps", 2, "--max-batch", 4)
    assert result["series"].keys() == scaling.LABELS.keys()
    xs = {name: [entry["x"] for entry in entries] for name, entries in result["series"].items()}
    assert xs["adapters"] == xs["batch"] == [1, 2, 4]
    assert xs["k"] == [1, 2, 4, 8, 16, 32]
    assert len(xs["nnz"]) == 7 * 3 + 6  # seven kinds of modules of three ks, and the series of k
    for name, entries in result["series"].items():
        assert all(entry["step_ms"] > 0 for entry in entries)
        assert (tmp_path / f"found_{name}.png").stat().st_size > 1000
    assert result["nnz_fit"]["r2"] <= 1


def test_one_series_of_scaling_has_a_file_of_its_own(model, run, tmp_path):
    flags = ["--series", "context", "--rounds", 1, "--steps", 2, "--max-batch", 4]
    scaling.main([model, *map(str, flags), "--out", str(tmp_path / "scaling.json")])
    result = json.loads((tmp_path / "scaling_context.json").read_text())
    assert list(result["series"]) == ["context"]
    assert [entry["x"] for entry in result["series"]["context"]] == [16, 64, 256]
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"scaling_context.png"}


def test_contexts_of_two_checkouts_are_timed_in_turn(model, run, tmp_path):
    sides = ["--before", harness.ROOT, "--after", harness.ROOT]
    flags = ["--model", model, "--requests", 1, 3, "--contexts", 8, 100, "--most-tokens", 200]
    result = run(contexts, *sides, *flags, "--rounds", 2, "--steps", 2, "--limit", 1e9)
    cases = result["cases"]
    assert [(case["requests"], case["context"]) for case in cases] == [(1, 8), (1, 100), (3, 8)]
    assert all(len(case["ratios"]) == 2 and case["ratio"] > 0 for case in cases)
    assert str(harness.ROOT) not in json.dumps(result)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_start_is_told_by_phase(model, run):
    result = run(startup, model, "--rounds", 1)
    phases = [result["median_s"][name] for name in startup.PHASES if name != "exit"]
    assert sum(phases) == pytest.approx(result["median_s"]["to first token"])
    assert all(seconds > 0 for seconds in phases)


def test_stop_strings_leave_answers_as_they_are(model, run):
    result = run(stops, model, "--batch", 2, "--tokens", 8, "--rounds", 1)
    assert result["ratio"].keys() == {"never begun", "always begun"}


def test_results_are_drawn_again(tmp_path, capsys):
    for path in harness.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    redraw.main(tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in harness.RESULTS.glob("*.png")}


def test_answers_from_the_prefix_cache_are_counted(tmp_path, run, monkeypatch):
    source = save_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    for name in prefix_answers.ADAPTERS:
        save_adapter(random_adapter(source, seed=1), tmp_path / "adapters" / name)
    shutil.copytree(prefix_answers.EXAMPLES / "data", tmp_path / "data")
    smaller = {"EXAMPLES": tmp_path, "PROMPT_TOKENS": (16,), "DECODES": (2,), "DRAWN": (1, 200)}
    for name, value in smaller.items():
        monkeypatch.setattr(prefix_answers, name, value)
    flags = ["--prompts", 6, "--alone", 2, "--max-tokens", 2, "--rounds", 1]
    result = run(prefix_answers, source.path, *flags)
    for found in result["answers"].values():
        assert found["asked"] == 6
        assert 0 < found["with_cached_tokens"] <= 6
    assert result["answers"]["deterministic"]["changed_by_the_cache"] == 0
    assert result["cost"].keys() == {"prompt of 16", "step of 2 decodes"}


def test_requests_in_a_tenth_of_their_room_are_answered_as_alone(model, run):
    result = run(pool, model, "--requests", 40, "--alone", 20)
    assert all(result["promises"].values()), result["promises"]
    assert result["requests"] == {"asked": 40, "ended_once": 40}
    assert result["preemptions"] > 0
    assert result["alone"]["preempted"] > 0
    assert result["alone"]["logprob_difference"] < 1e-3
    assert 1 <= result["pool"]["cells_to_tokens_median"] < 1.5
    assert 0 < result["recomputed_share"] < 0.5


def test_system_prompt_is_held_once_for_each_adapter_and_tenant(model, run):
    result = run(prefix_hits, model, "--rounds", 1)
    promises = {name: kept for name, kept in result["promises"].items() if "hit" not in name}
    assert len(promises) == 3
    assert all(promises.values()), promises
    assert result["time"]["hit_to_miss"] > 0
    assert (result["adapters"]["requests"], result["adapters"]["groups"]) == (64, 8)
    assert (result["others"]["requests"], result["others"]["groups"]) == (16, 8)
