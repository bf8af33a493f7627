"""Adapter files are hostile input: each kind of fault is refused by name and changes nothing."""

import json
import random
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve import SamplingParams
from neuroada_serve.adapters.format import BaseSpec, save_adapter
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.errors import AdapterError, AdapterFormatError, AdapterNotFoundError
from neuroada_serve.model.loader import load_base
from tests.support.broken import (
    BROKEN,
    CONFIG,
    WEIGHTS,
    Part,
    edit_bytes,
    edit_config,
    edit_parts,
    first_module,
    set_entry,
)
from tests.support.tiny import adapter_for, random_adapter, save_tiny_model

LOADING_ERRORS = (AdapterFormatError, AdapterNotFoundError)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(save_tiny_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def valid(base, tmp_path_factory):
    """A valid adapter folder; copied before it is broken."""
    folder = tmp_path_factory.mktemp("valid") / "adapter"
    save_adapter(adapter_for(base.model, base.spec, seed=1), folder)
    return folder


@pytest.fixture
def folder(valid, tmp_path):
    """A copy of the valid adapter, in a root directory of its own."""
    return shutil.copytree(valid, tmp_path / "root" / "adapter")


def refusal(path, spec: BaseSpec, root) -> AdapterError:
    with pytest.raises(LOADING_ERRORS) as raised:
        load_adapter(path, spec, root=root)
    return raised.value


def test_the_catalogue_starts_from_a_valid_adapter(base, folder):
    assert load_adapter(folder, base.spec, root=folder.parent).config.k == 2
    assert len(BROKEN) >= 64


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapter_is_refused_by_name_of_its_fault(name, base, folder):
    broken = BROKEN[name]
    error = refusal(broken.apply(folder, base.spec), base.spec, folder.parent)
    message = str(error)
    assert isinstance(error, broken.error)
    assert re.search(broken.match, message), message[:500]
    # It goes to logs and HTTP answers: nothing of a hostile file may pose as a line of its own.
    assert message.isprintable()
    assert len(message) < 10_000


def test_engine_answers_the_same_after_all_broken_adapters(base, valid, tmp_path):
    engine = Engine(base, EngineConfig())
    engine.adapters.load("good", valid)
    tokens, digest = _answer(engine, "good"), engine.base_digest()
    for name, broken in BROKEN.items():
        folder = shutil.copytree(valid, tmp_path / name / "adapter")
        path = broken.apply(folder, base.spec)
        with pytest.raises(LOADING_ERRORS):
            engine.adapters.load("good", path, folder.parent, replace=True)
    assert engine.adapters.store.names == ("good",)
    assert _answer(engine, "good") == tokens
    assert engine.base_digest() == digest


def _answer(engine: Engine, adapter: str) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.add_request("r", [5, 6, 7], params, adapter)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return [token for output in outputs for token in output.token_ids]


# --- all faults at once ----------------------------------------------------------------------


def test_three_config_faults_are_reported_together(base, folder):
    edit_config(folder, auto_map={}, k="2", selection=...)
    error = refusal(folder, base.spec, folder.parent)
    assert len(error.faults) == 3
    for part in ("auto_map", "k must be", "lacks 'selection'"):
        assert part in str(error)


def test_three_tensor_faults_are_reported_together(base, folder):
    one, two, three = sorted(base.spec.shapes)[:3]

    def change(parts, metadata):
        del parts[f"{one}.index"]
        parts[f"{two}.bypass"] = Part("I32", [*parts[f"{two}.bypass"].shape], bytes(4 * 64))
        parts["extra"] = Part("F32", [1], bytes(4))
        parts[f"{two}.bypass"].data = bytes(4 * base.spec.shapes[two][0] * 2)
        metadata["format"] = "pt"

    edit_parts(folder, change)
    error = refusal(folder, base.spec, folder.parent)
    for part in (f"{one}.index is missing", f"{two}.bypass has dtype", "'extra'", "format is 'pt'"):
        assert part in str(error)
    assert len(error.faults) == 4


def test_three_value_faults_are_reported_together(base, folder):
    one, two, three = sorted(base.spec.shapes)[:3]
    set_entry(folder, f"{one}.bypass", 0, 0, float("nan"))
    set_entry(folder, f"{two}.index", 0, 0, 60_000)
    set_entry(folder, f"{three}.index", 3, 1, -7, "I32")
    error = refusal(folder, base.spec, folder.parent)
    assert len(error.faults) == 3
    for fault, module in zip(error.faults, (one, two, three), strict=True):
        assert fault.startswith(module)


def test_at_most_twenty_faults_are_reported(base, folder):
    extra = {f"extra{i}": Part("F32", [1], bytes(4)) for i in range(50)}
    edit_parts(folder, lambda parts, metadata: parts.update(extra))
    assert len(refusal(folder, base.spec, folder.parent).faults) == 20


def test_more_faults_than_a_message_holds_are_counted(base, folder):
    extra = {f"extra{i}": Part("F32", [1], bytes(4)) for i in range(50)}
    edit_parts(folder, lambda parts, metadata: parts.update(extra))
    message = str(refusal(folder, base.spec, folder.parent))
    assert message.endswith("; and 45 more")
    assert message.count("unexpected tensor") == 5


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_adapter_of_another_base_is_told_once_with_both_names(base, tmp_path, family):
    """Other modules and shapes follow from that, and a file may well be larger than any for this
    base."""
    other = save_tiny_model(tmp_path / "other", family)
    save_adapter(random_adapter(other, seed=1, k=8), tmp_path / "fr")
    error = refusal(tmp_path / "fr", base.spec, tmp_path)
    assert len(error.faults) == 1
    assert f"'tiny-{family}'" in str(error)
    assert repr(base.spec.name) in str(error)
    assert "serve it on its own base or train it again on this one" in str(error)


def test_larger_adapter_of_another_base_is_told_as_such(base, folder):
    edit_config(folder, base_fingerprint="0" * 64)
    (folder / WEIGHTS).write_bytes(bytes(4 << 20))
    assert "another base" in str(refusal(folder, base.spec, folder.parent))


# --- mutations -------------------------------------------------------------------------------


def check_invariants(adapter, spec: BaseSpec) -> None:
    """Check what the ops rely on; nothing that loads may break it."""
    for name, part in adapter.modules.items():
        d_out, d_in = spec.shapes[name]
        assert part.index.shape == part.bypass.shape == (d_out, adapter.config.k)
        assert part.index.dtype == torch.int32
        assert 0 <= int(part.index.min()) <= int(part.index.max()) < d_in
        assert all(len(set(row)) == len(row) for row in part.index.tolist())
        assert bool(part.bypass.isfinite().all())


def load_mutated(folder, spec: BaseSpec) -> str | None:
    """The digest if it loads, with all invariants; None if it is refused."""
    try:
        adapter = load_adapter(folder, spec, root=folder.parent)
    except LOADING_ERRORS:
        return None
    check_invariants(adapter, spec)
    return adapter.digest


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A spec of two small modules and a valid adapter of it, for many quick loads."""
    shapes = {"model.layers.0.q_proj": (5, 9), "model.layers.0.up_proj": (3, 7)}
    model = torch.nn.Module()
    for name, (d_out, d_in) in shapes.items():
        parent = model
        for child in name.split(".")[:-1]:
            if not hasattr(parent, child):
                parent.add_module(child, torch.nn.Module())
            parent = getattr(parent, child)
        parent.add_module(name.rpartition(".")[2], torch.nn.Linear(d_in, d_out, bias=False))
    spec = BaseSpec("small", "0" * 64, shapes)
    folder = tmp_path_factory.mktemp("small") / "root" / "adapter"
    save_adapter(adapter_for(model, spec, seed=3), folder)
    return spec, folder, (folder / WEIGHTS).read_bytes(), (folder / CONFIG).read_bytes()


def test_every_flipped_byte_is_refused_or_changes_the_digest(small):
    spec, folder, weights, config = small
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    digest = load_mutated(folder, spec)
    assert digest is not None
    draw = random.Random(0)
    for position in range(len(weights)):
        flipped = bytearray(weights)
        flipped[position] ^= 1 << draw.randrange(8)
        (folder / WEIGHTS).write_bytes(flipped)
        assert load_mutated(folder, spec) != digest


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_mutated_weights_load_with_all_invariants_or_are_refused(small, data):
    spec, folder, weights, config = small
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    mutated = bytearray(weights)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(mutated) - 1))
        action = data.draw(st.sampled_from(["set", "delete", "insert"]))
        if action == "set":
            mutated[position] = data.draw(st.integers(0, 255))
        elif action == "delete":
            del mutated[position : position + data.draw(st.integers(1, 9))]
        else:
            mutated[position:position] = data.draw(st.binary(min_size=1, max_size=9))
    edit_bytes(folder, lambda _: bytes(mutated))
    load_mutated(folder, spec)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_header_with_any_json_in_it_loads_or_is_refused(small, data):
    spec, folder, weights, config = small
    (folder / CONFIG).write_bytes(config)
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()):
        header[name] = data.draw(_JSON)
    else:
        header[name][data.draw(st.sampled_from(sorted(header[name])))] = data.draw(_JSON)
    text = json.dumps(header).encode()
    rest = weights[8 + size :]
    edit_bytes(folder, lambda _: len(text).to_bytes(8, "little") + text + rest)
    load_mutated(folder, spec)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_config_with_any_json_in_it_loads_or_is_refused(small, data):
    spec, folder, weights, config = small
    (folder / WEIGHTS).write_bytes(weights)
    raw = json.loads(config)
    raw[data.draw(st.sampled_from(sorted(raw)) | st.text(max_size=9))] = data.draw(_JSON)
    (folder / CONFIG).write_text(json.dumps(raw))
    load_mutated(folder, spec)


def test_first_module_of_the_catalogue_is_of_the_base(base):
    assert first_module(base.spec) in base.spec.shapes
