"""Other engines beside ours."""

import os
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from neuroada_serve.adapters.format import BaseSpec
from neuroada_serve.benchmark import offline
from neuroada_serve.benchmark.adapters import save_random_lora
from neuroada_serve.benchmark.cases import Case, Work
from neuroada_serve.benchmark.measure import Timeline
from neuroada_serve.benchmark.peers import Peer, PeerProcess, peer_command, peer_environment
from neuroada_serve.errors import EngineError
from tests.support.benchmark import SMALL, document, run

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


# --- peers ----------------------------------------------------------------------------------------


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


# --- whole runs -----------------------------------------------------------------------------------


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
