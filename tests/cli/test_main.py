"""The command line on tiny models: what it prints, and exit code 2 on mistakes."""

import json
import os
import shutil
import signal
import socket

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.main import get_command

from neuroada_serve import save_adapter
from neuroada_serve.adapters.format import CONFIG_FILE
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.cli.main import app
from neuroada_serve.config import ServerConfig
from neuroada_serve.options import k_by_module
from tests.support.command import run
from tests.support.tiny import (
    plain_generate,
    plain_merged,
    random_adapter,
    save_tiny_model,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "fr"
    save_adapter(random_adapter(model, seed=1), folder)
    return folder


def test_generate_answers_with_the_adapter(model, adapter):
    base = run("generate", model.path, "hello", "--max-tokens", 8)
    adapted = run("generate", model.path, "hello", "--max-tokens", 8, "--adapter", adapter)
    assert base.exit_code == adapted.exit_code == 0
    assert base.stdout != adapted.stdout


def test_plain_generate_leaves_the_template_out(model):
    result = run("generate", model.path, "hello", "--max-tokens", 4, "--plain")
    tokenizer = tiny_tokenizer()
    ids = tokenizer("hello").input_ids
    expected = plain_generate(plain_merged(model, None), ids, 4, frozenset({257}))
    assert result.stdout == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_merge_writes_a_plain_checkpoint(model, adapter, tmp_path):
    result = run("merge", model.path, adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = plain_merged(model, load_adapter(adapter))
    for (name, a), b in zip(written.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name
    record = json.loads((tmp_path / "merged" / "neuroada_merge.json").read_text())
    assert record["adapter_digest"] == load_adapter(adapter).digest


def test_merge_never_overwrites(model, adapter, tmp_path):
    (tmp_path / "precious").write_text("x")
    result = run("merge", model.path, adapter, "--out", tmp_path)
    assert result.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_inspect_shows_what_is_inside(adapter):
    result = run("inspect", adapter)
    assert result.exit_code == 0
    assert "7" in result.stdout
    assert "q_proj" in result.stdout


def test_inspect_shows_the_whole_digest_on_a_line(adapter):
    digest = load_adapter(adapter).digest
    assert f"digest              {digest}\n" in run("inspect", adapter).stdout
    found = json.loads(run("inspect", adapter, "--json").stdout)
    assert found["digest"] == digest
    assert found["num_values"] == load_adapter(adapter).nnz
    assert found["metadata"] == {}


def test_train_then_eval_then_generate(model, tmp_path):
    rows = [{"prompt": f"say {c}", "completion": c * 3} for c in "abcdefgh"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "adapter"
    flags = ["--k", 2, "--max-steps", 3, "--batch-size", 2, "--eval-fraction", 0.25]
    result = run("train", model.path, "--data", data, "--out", out, *flags)
    assert result.exit_code == 0, result.output
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "held out in training" in (out / "README.md").read_text()
    scored = run("eval", model.path, "--adapter", out, "--data", data, "--limit", 4, "--json")
    assert scored.exit_code == 0, scored.output
    scores = json.loads(scored.stdout)
    assert scores["rows"] == 4
    assert scores["loss"] > 0
    assert 0 <= scores["exact_match"] <= 1
    metadata = load_adapter(out).config.metadata
    assert metadata["recipe"]["k"] == 2


def test_eval_table_and_base(model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    result = run("eval", model.path, "--data", data)
    assert result.exit_code == 0, result.output
    assert "exact match" in result.stdout


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["generate", "/no/such/folder", "hi"], "/no/such/folder"),
        (["generate", "MODEL", "hi", "--adapter", "/no/such"], "/no/such"),
        (["generate", "MODEL", "hi", "--dtype", "int3"], "dtype"),
        (["generate", "MODEL", "hi", "--temperature", "-1"], "temperature"),
        (["serve", "MODEL", "--device", "abacus"], "abacus"),
        (["inspect", "/no/such"], "/no/such"),
        (["merge", "MODEL", "/no/such", "--out", "/tmp/never-written"], "/no/such"),
        (["eval", "MODEL", "--data", "/no/rows"], "/no/rows"),
        (["eval", "MODEL", "--data", "MODEL/config.json", "--limit", "0"], "limit"),
        (["train", "MODEL", "--data", "/no/rows", "--out", "/tmp/never-written"], "/no/rows"),
        (["train", "MODEL", "--data", "/no/rows", "--out", "/tmp/x", "--k", "0"], "k must be"),
        (["serve", "MODEL", "--adapter", "fr"], "NAME=PATH"),
        (["serve", "MODEL", "--adapter-dir", "/no/such"], "/no/such"),
        (["serve", "MODEL", "--merge", "nobody"], "nobody"),
        (["serve", "MODEL", "--port", "99999"], "port"),
        (["serve", "MODEL", "--tenant-weight", "big"], "--tenant-weight takes NAME=WEIGHT"),
        (["serve", "MODEL", "--tenant-weight", "big=lots"], "NAME=WEIGHT"),
        (["serve", "MODEL", "--tenant-weight", "=2"], "NAME=WEIGHT"),
        (["serve", "MODEL", "--tenant-weight", "big=0"], "the weight of 'big' must be above 0"),
        (["serve", "MODEL", "--adapter-weight", "fr:2"], "--adapter-weight takes NAME=WEIGHT"),
        (["serve", "MODEL", "--adapter-weight", "fr=nan"], "the weight of 'fr' must be above 0"),
        (["serve", "MODEL", "--adapter-memory", "lots"], "'lots' is not a size"),
        (["serve", "MODEL", "--adapter-memory", "0"], "--adapter-memory must be at least 1"),
        (["serve", "MODEL", "--adapter-host-memory", "-1"], "'-1' is not a size"),
        (["serve", "MODEL", "--prefix-cache-memory", "4XB"], "'4XB' is not a size"),
        (["serve", "MODEL", "--kv-cache-memory", "0"], "--kv-cache-memory must be at least 1"),
        (["serve", "MODEL", "--gpu-memory-utilization", "90"], "above 0 and at most 1, got 90"),
        (["serve", "MODEL", "--target-itl-ms", "-5"], "--target-itl-ms must be above 0"),
        (["serve", "MODEL", "--max-num-seqs", "0"], "--max-num-seqs"),
        (["serve", "MODEL", "--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "at least"),
    ],
)
def test_mistake_ends_with_one_sentence_and_code_2(model, args, word):
    result = run(*[arg.replace("MODEL", str(model.path)) for arg in args])
    assert result.exit_code == 2
    assert word in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.count("Error: ") == 1


def test_sequence_that_can_never_fit_is_refused_at_the_start(model):
    """A token of this model needs 256 bytes."""
    flags = ["--max-model-len", 256, "--kv-cache-memory", "32KiB"]
    result = run("serve", model.path, *flags)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    said = " ".join(result.stderr.split())
    assert "one sequence of 256 tokens needs 0 MiB" in said
    assert "lower --max-model-len, or raise --kv-cache-memory" in said


def test_taken_port_is_found_before_the_model_is_looked_for():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "/no/such/model", "--port", port)
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr


def test_serve_flags_reach_engine_and_server(model, adapter, monkeypatch):
    served = []
    monkeypatch.setattr(
        "neuroada_serve.server.serve.serve", lambda *args, **options: served.append(args) or 0
    )
    flags = ["--adapter-dir", adapter.parent, "--preload", "--tenant-header", "x-tenant"]
    flags += ["--tenant-weight", "big=2", "--tenant-weight", "a=b=0.5", "--adapter-weight", "fr=3"]
    flags += ["--adapter-memory", "4MiB", "--adapter-host-memory", "0"]
    flags += ["--kv-cache-memory", "128KiB", "--target-itl-ms", 20]
    flags += ["--gpu-memory-utilization", 0.5]
    flags += ["--prefix-cache-memory", "1.5MB", "--allow-runtime-adapters", "--port", 0]
    flags += ["--max-connections", 9, "--allowed-host", "a", "--allowed-host", "b"]
    flags += ["--served-model-name", "x", "--log-level", "debug", "--enable-log-requests"]
    result = run("serve", model.path, *flags)
    assert result.exit_code == 0
    said = " ".join(result.stderr.split())
    assert "KV cache: 512 tokens in 0.00 GiB, or 2.0 sequences of 256 tokens." in said
    (engine, config, *_), settings = served[0], served[0][0].config
    assert config == ServerConfig(
        adapter_dir=adapter.parent,
        preload=True,
        tenant_header="x-tenant",
        allow_runtime_adapters=True,
        port=0,
        max_connections=9,
        allowed_hosts=("a", "b"),
        served_model_name=("x",),
        log_level="debug",
        enable_log_requests=True,
    )
    assert settings.tenant_weights == {"big": 2, "a=b": 0.5}
    assert settings.adapter_weights == {"fr": 3}
    assert (settings.adapter_memory, settings.adapter_host_memory) == (4 << 20, 0)
    assert (settings.kv_cache_memory, settings.prefix_cache_memory) == (128 << 10, 1_500_000)
    assert (settings.target_itl_ms, settings.gpu_memory_utilization) == (20, 0.5)
    assert engine.adapters.describe_one("fr").tier == "device"  # preloaded


@pytest.mark.timeout(300)
def test_sighup_serves_what_has_come_into_the_adapter_dir(model, adapter, tmp_path, monkeypatch):
    shutil.copytree(adapter, tmp_path / "fr")
    (tmp_path / "half").mkdir()
    said: list[str] = []
    logged: list[str] = []

    def notify(message: str) -> None:
        said.append(message)
        if message.startswith("Serving"):
            shutil.copytree(adapter, tmp_path / "de")
            shutil.copy(adapter / CONFIG_FILE, tmp_path / "half")
            os.kill(os.getpid(), signal.SIGHUP)

    def log(level: int, message: str, *args: object) -> None:
        logged.append(message % args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("neuroada_serve.cli.serve.notify", notify)
    monkeypatch.setattr("neuroada_serve.server.serve.logger.log", log)
    result = run("serve", model.path, "--adapter-dir", tmp_path, "--port", 0)
    assert result.exit_code == 0, result.output
    *_, start, stop = said
    assert start.endswith("adapters: fr")
    assert logged == [
        "adapter directory rescanned by SIGHUP: added de; "
        "not served: adapter 'half' has no adapter_model.safetensors"
    ]
    assert stop.startswith("Stopped.")


def test_wrong_flag_is_a_usage_error():
    assert run("generate", "--no-such-flag").exit_code == 2


def test_every_flag_has_help():
    commands = get_command(app).commands
    assert set(commands) == {
        "demo",
        "serve",
        "train",
        "eval",
        "chat",
        "generate",
        "classify",
        "merge",
        "inspect",
        "bench",
        "convert",
    }
    for name, command in commands.items():
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)


@pytest.mark.parametrize(
    ("text", "k", "pattern"),
    [
        ("8", 8, {}),
        ("q_proj|v_proj=8,1", 1, {"q_proj|v_proj": 8}),
        (r"layers\.0\..*=4, q_proj=2", 0, {r"layers\.0\..*": 4, "q_proj": 2}),
    ],
)
def test_k_may_be_given_by_module(text, k, pattern):
    assert k_by_module(text) == (k, pattern)


@pytest.mark.parametrize("text", ["", "many", "q_proj=x,1", "=8", "8,q_proj", "1,2", "-1"])
def test_k_that_is_not_written_so_is_refused(text, tmp_path):
    result = run("train", "demo", "--data", "rows.jsonl", "--out", tmp_path / "a", "--k", text)
    assert result.exit_code == 2
    assert "--k takes a number or PATTERN=K" in result.stderr
