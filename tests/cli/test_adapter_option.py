"""--adapter NAME=PATH and --adapter PATH, alike in every command."""

import json

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from neuroada_serve import save_adapter
from neuroada_serve.cli.common import adapters_of
from neuroada_serve.cli.main import app
from neuroada_serve.errors import UsageError
from tests.support.tiny import random_adapter, save_tiny_model


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "fr"
    path.mkdir()
    return path


def test_adapter_is_named_or_called_like_its_folder(folder, monkeypatch):
    assert adapters_of([str(folder), f"again={folder}/"]) == {"fr": folder, "again": folder}
    monkeypatch.chdir(folder)
    assert list(adapters_of(["."])) == ["fr"]
    assert adapters_of(None) == {}


def test_a_folder_with_an_equals_sign_is_a_path(tmp_path):
    path = tmp_path / "k=8" / "fr"
    path.mkdir(parents=True)
    assert adapters_of([str(path), f"b={path}"]) == {"fr": path, "b": path}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere"], "no folder 'nowhere'; give NAME=PATH, or PATH to name the adapter after"),
        (["a=nowhere"], "no folder 'nowhere'; give NAME=PATH, or PATH"),
        (["a="], "no folder ''; give NAME=PATH"),
        (["=FOLDER"], "'' cannot be a name; give NAME=FOLDER"),
        (["a b=FOLDER"], "'a b' cannot be a name; give NAME=FOLDER"),
        (["FOLDER", "fr=FOLDER"], "two adapters are called 'fr'; give another name"),
        (["base=FOLDER"], "no adapter can be called 'base'; give another name"),
    ],
)
def test_a_mistake_names_both_forms(folder, flags, words):
    flags, words = ([s.replace("FOLDER", str(folder)) for s in group] for group in (flags, [words]))
    with pytest.raises(UsageError, match="^--adapter|^two|^no") as caught:
        adapters_of(flags, reserved=["base"])
    assert words[0] in str(caught.value)


def test_every_command_shows_one_shape():
    shapes = {}
    for name, command in get_command(app).commands.items():
        for option in command.params:
            if "--adapter" in option.opts:
                shapes[name] = option.metavar
                assert option.multiple
                assert "under NAME or its own name" in option.help
    assert {"serve", "eval", "generate", "classify"} <= shapes.keys()
    assert set(shapes.values()) == {"[NAME=]PATH"}


def test_both_shapes_reach_every_command(tmp_path, monkeypatch):
    source = save_tiny_model(tmp_path / "model")
    save_adapter(random_adapter(source, seed=1), tmp_path / "fr")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    served = []
    monkeypatch.setattr(
        "neuroada_serve.server.serve.serve",
        lambda *args, **options: served.append(args) or 0,
    )
    for given, name in ((f"{tmp_path}/fr", "fr"), (f"de={tmp_path}/fr", "de")):
        flags = [str(source.path), "--adapter", given]
        run = CliRunner().invoke
        assert run(app, ["serve", *flags]).exit_code == 0
        assert served.pop()[0].adapters.store.names == (name,)
        answered = run(app, ["generate", *flags, "hi", "--max-tokens", "1"])
        assert answered.exit_code == 0, answered.output
        rows = ["--data", f"{tmp_path}/rows.jsonl", "--metric", "loss", "--json"]
        scored = run(app, ["eval", *flags, *rows])
        assert list(json.loads(scored.stdout)["digests"]) == [name]
    twice = run(app, ["generate", *flags, "--adapter", f"b={tmp_path}/fr", "hi"])
    assert twice.exit_code == 2
    assert "one --adapter, got 2" in twice.stderr


def test_a_folder_of_rows_is_said_to_be_one(tmp_path):
    words = ["train", "demo", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "is a folder; name the file in it that has the rows" in " ".join(result.stderr.split())
