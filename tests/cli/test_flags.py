"""Settings are written once: flags, variables, keys of a file and LLM arguments are the fields."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from neuroada_serve import LLM
from neuroada_serve.benchmark.settings import LatencyConfig, OfflineConfig, ServingConfig
from neuroada_serve.cli.flags import flags_of, long_name, shown_default, variable
from neuroada_serve.cli.main import app
from neuroada_serve.config import EngineConfig, ServerConfig, TrainConfig
from neuroada_serve.evaluation.settings import EvalSettings
from tests.support.pages import ROOT, TEXT, block_with

# Command -> settings of which all fields are flags, and others of which some are.
SETTINGS = {
    "serve": ((ServerConfig, EngineConfig), ()),
    "train": ((TrainConfig,), (EngineConfig,)),
    "eval": ((EvalSettings,), (EngineConfig,)),
    "chat": ((), (ServerConfig, EngineConfig)),
    "generate": ((), (EngineConfig,)),
    "classify": ((), (EngineConfig,)),
    "merge": ((), (EngineConfig,)),
    "bench throughput": ((OfflineConfig,), ()),
    "bench latency": ((LatencyConfig,), ()),
    "bench serving": ((ServingConfig,), ()),
}
ALL = {config for pair in SETTINGS.values() for configs in pair for config in configs}
# Fields without a flag of their own.
FED_BY_ANOTHER = {
    "k_pattern": "--k gives both",
    "prompt_format": "--plain is its other word",
    "num_prompts": "of bench latency alone",
    "prefill_len": "of bench throughput alone",
}
# Flags that are no field: what a command does and where it writes, not how an engine is set.
NO_FIELD = {
    "--help": "typer's",
    "--config": "names the file of the other flags",
    "--adapter": "folders by name; LLM takes them as `adapters`",
    "--plain": "prompt_format in one word",
    "--data": "the rows themselves",
    "--out": "where to write",
    "--json": "how to print",
    "--check": "train nothing (bench's is a field)",
    "--fresh": "discard checkpoints",
    "--publish": "which server to tell",
    "--publish-improved": "when to tell it",
    "--base": "eval: score the base too; convert: which base",
    "--save": "eval: where scores go",
    "--system": "chat: the first message",
    "--max-tokens": "SamplingParams, whose default (16, vLLM's) is too short for a terminal",
    "--temperature": "SamplingParams, whose default (1, vLLM's) is not greedy as a terminal's is",
    "--seed": "SamplingParams has the same default",
    "--k": "convert: how many values to keep; no setting of a run",
    "--dtype": "convert: of the file's values",
}


def commands():
    found = {}
    for name, command in get_command(app).commands.items():
        nested = getattr(command, "commands", None)
        found |= {f"{name} {n}": c for n, c in nested.items()} if nested else {name: command}
    return found


def options(command):
    """Long name -> option."""
    return {max(p.opts, key=len): p for p in command.params if p.param_type_name == "option"}


def test_no_default_and_no_help_is_written_twice():
    """Every flag shows its field's default and help, or is listed as no field."""
    used = set()
    for name, command in commands().items():
        whole, some = SETTINGS.get(name, ((), ()))
        of_fields = {long_name(f): (c, f) for c in (*some, *whole) for f in flags_of(c)}
        for flag, option in options(command).items():
            if flag not in of_fields:
                assert flag in NO_FIELD, f"{name} {flag}"
                used.add(flag)
                continue
            config, field = of_fields[flag]
            assert option.help == field.metadata["help"]
            assert option.default == shown_default(field)
            assert option.envvar == variable(config, field)
            assert option.rich_help_panel == field.metadata["group"]
    assert used | {"--help"} == NO_FIELD.keys()  # none is listed in vain


def test_every_field_is_a_flag():
    for name, (whole, _) in SETTINGS.items():
        flags = options(commands()[name])
        for config in whole:
            for field in fields(config):
                is_flag = long_name(field) in flags and field.metadata["flag"] != ""
                assert is_flag != (field.metadata["flag"] == ""), f"{name} {field.name}"
                assert is_flag or field.name in FED_BY_ANOTHER, f"{name} {field.name}"


def test_variables_are_distinct_but_for_the_same_setting():
    named = {}
    for config in ALL:
        for field in flags_of(config):
            named.setdefault(variable(config, field), set()).add(field.name)
    assert [names for names in named.values() if len(names) > 1] == []
    assert "NEUROADA_CACHE" not in named  # the place of downloads, see model/source.py


def test_llm_takes_the_engines_fields_with_their_defaults():
    with pytest.raises(TypeError, match="max_seqs"):
        LLM("demo", max_seqs=3)
    own = inspect.signature(LLM).parameters
    assert not own.keys() & {f.name for f in fields(EngineConfig)}  # all go to EngineConfig
    for name in ("adapter_dir", "preload"):
        assert own[name].default == getattr(ServerConfig(), name)


def test_pages_name_only_flags_and_variables_that_exist():
    flags = {
        flag
        for command in commands().values()
        for option in command.params
        for flag in (*option.opts, *option.secondary_opts)
    }
    of_others = {"--index-url", "--no-binary", "--no-deps"}  # pip's
    of_others |= {"--nproc-per-node", "--llama-8b"}  # torchrun's, a benchmark's
    of_others |= {"--strict", "--rm"}  # mkdocs', docker's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", TEXT))
    variables = {variable(c, f) for c in ALL for f in flags_of(c)}
    assert named - flags - {"--help"} == of_others
    found = set(re.findall(r"\bNEUROADA_[A-Z_]*[A-Z]\b", TEXT))
    assert found - variables - {"NEUROADA_CACHE", "NEUROADA_CONFIG"} == set()


# --- where values come from ------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Run `serve` up to its loading: what it was given, or what it said."""
    given = []

    def note(model, adapters, engine, server, bound, early):
        given.append((model, adapters, engine, server))
        return 0

    monkeypatch.setattr("neuroada_serve.cli.serve._load_and_serve", note)

    def run(*arguments, file=None, **variables):
        if file is not None:
            (tmp_path / "serve.yaml").write_text(file)
            arguments = (*arguments, "--config", str(tmp_path / "serve.yaml"))
        result = CliRunner().invoke(app, ["serve", *arguments], env=variables)
        if result.exit_code:
            assert result.exit_code == 2, result.output
            return result.stderr
        return given.pop()

    return run


def test_nothing_given_is_the_dataclass(served):
    assert served("demo", "--port", "0")[2:] == (EngineConfig(), ServerConfig(port=0))


def test_command_line_beats_environment_beats_file(served):
    file = "port: 0\nmax-num-seqs: 3\nmax_num_batched_tokens: 300\nmerge: auto\n"
    environment = {"NEUROADA_MAX_NUM_SEQS": "4", "NEUROADA_MAX_NUM_BATCHED_TOKENS": "400"}
    _, _, engine, _ = served("demo", "--max-num-seqs", "5", file=file, **environment)
    assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (5, 400)
    assert engine.merge == "auto"


def test_file_takes_what_flags_take(served, tmp_path):
    (tmp_path / "fr").mkdir()
    file = f"""
model: demo
port: 0
preload: true
enforce-eager: false
adapter-dir: {tmp_path}
adapter: ["x={tmp_path / "fr"}", {tmp_path / "fr"}]
adapter-memory: 2KiB
prefix-cache-memory: 0
tenant-weight: {{big: 2, small: 0.5}}
adapter-weight: [fr=3]
served-model-name: one
device:
"""
    model, adapters, engine, server = served(file=file)
    assert (model, adapters) == ("demo", {"x": tmp_path / "fr", "fr": tmp_path / "fr"})
    assert (server.preload, server.adapter_dir) == (True, tmp_path)
    assert server.served_model_name == ("one",)
    assert (engine.adapter_memory, engine.prefix_cache_memory) == (2048, 0)
    assert engine.tenant_weights == {"big": 2, "small": 0.5}
    assert engine.adapter_weights == {"fr": 3}
    assert (engine.device, engine.enforce_eager) == ("auto", False)


def test_variables_take_several_values_and_switches(served):
    given = {"NEUROADA_ALLOWED_HOST": "a.example b.example", "NEUROADA_PORT": "0"}
    given |= {"NEUROADA_PRELOAD": "1", "NEUROADA_ADAPTER_DIR": "/x", "NEUROADA_MERGE": ""}
    _, _, engine, server = served("demo", **given)
    assert server.allowed_hosts == ("a.example", "b.example")
    assert (server.preload, engine.merge) == (True, "never")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("prot: 1", "unknown key 'prot'; did you mean 'port'?"),
        ("max_num_seq: 1", "unknown key 'max_num_seq'; did you mean 'max-num-seqs'?"),
        ("config: x", "unknown key 'config'"),
        ("help: true", "unknown key 'help'"),
        ("7: 1", "unknown key 7"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "'max_num_seqs' in two spellings"),
        ("port: no-number", "serve.yaml: port"),
        ("port: 1.5", "serve.yaml: port"),
        ("port: [1, 2]", "serve.yaml: port takes one value, got [1, 2]"),
        ("port: yes", "serve.yaml: port takes no true or false"),
        ("preload: 1", "serve.yaml: preload takes true or false, got 1"),
        ("max-num-seqs: 0", "serve.yaml: max-num-seqs must be at least 1, got 0"),
        ("adapter-memory: lots", "serve.yaml: adapter-memory: 'lots' is not a size"),
        ("tenant-weight: [big]", "serve.yaml: tenant-weight takes NAME=WEIGHT"),
        ("preload: true", "serve.yaml: preload needs --adapter-dir"),
        ("port: {", "cannot be read"),
        ("!!python/object:os.system {}", "cannot be read"),
        ("- port", "must have a line KEY: VALUE"),
    ],
)
def test_wrong_file_is_refused_by_file_and_key(served, file, said):
    assert said in " ".join(served("demo", file=file).split())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NEUROADA_PORT", "x", "'NEUROADA_PORT'"),
        ("NEUROADA_PORT", "99999", "NEUROADA_PORT must be within 0..65535, got 99999"),
        ("NEUROADA_ADAPTER_MEMORY", "lots", "NEUROADA_ADAPTER_MEMORY: 'lots' is not a size"),
        ("NEUROADA_PRELOAD", "1", "NEUROADA_PRELOAD needs --adapter-dir"),
        ("NEUROADA_PRELOAD", "perhaps", "'NEUROADA_PRELOAD'"),
        ("NEUROADA_CONFIG", "/nowhere/x.yaml", "/nowhere/x.yaml cannot be read"),
    ],
)
def test_wrong_variable_is_refused_by_name(served, name, value, said):
    assert said in " ".join(served("demo", **{name: value}).split())


def test_wrong_flag_is_refused_by_name(served):
    said = served("demo", "--max-num-seqs", "600", NEUROADA_MAX_NUM_BATCHED_TOKENS="512")
    assert "NEUROADA_MAX_NUM_BATCHED_TOKENS (512) must be at least --max-num-seqs (600)" in said


def test_the_file_on_the_page_is_taken(served, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = block_with("max-num-seqs", "yaml")
    model, adapters, engine, _ = served("--port", "0", file=file)
    assert (model, list(adapters), engine.max_num_seqs) == ("demo", ["sql", "json"], 32)


def test_train_takes_a_file_and_its_own_variables(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "train.yaml").write_text(f"model: m\ndata: {tmp_path}/rows.jsonl\nout: o\nk: 2\n")
    (tmp_path / "serve.yaml").write_text("port: 1\n")
    run = ["train", "--config", str(tmp_path / "train.yaml"), "--seed", "-1"]
    said = CliRunner().invoke(app, run, env={"NEUROADA_SEED": "3", "NEUROADA_TRAIN_K": "x"})
    assert "NEUROADA_TRAIN_K takes a number or PATTERN=K" in said.stderr
    del run[1:3]
    environment = {"NEUROADA_CONFIG": str(tmp_path / "serve.yaml")}  # serve's alone
    environment["NEUROADA_TRAIN_CONFIG"] = str(tmp_path / "train.yaml")
    said = CliRunner().invoke(app, run, env=environment)
    assert "--seed must be at least 0, got -1" in said.stderr


def test_help_waits_for_no_heavy_import():
    code = (
        "import sys, neuroada_serve.cli.main; print({'torch', 'yaml', 'asyncio'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
