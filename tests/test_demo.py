"""The demo's shipped adapters, and the container that serves them."""

import json
import re
import tomllib
from importlib.metadata import PackageNotFoundError, PackagePath
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from neuroada_serve import demo
from neuroada_serve.cli.main import app
from neuroada_serve.demo import find_examples
from neuroada_serve.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "examples" / "docker" / "Dockerfile"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package as a wheel leaves it: no examples/ beside it."""
    package = tmp_path / "lib" / "site-packages" / "neuroada_serve"
    monkeypatch.setattr(demo, "__file__", str(package / "demo.py"))
    return package.parent


def distribution_with(site: Path, *names: str):
    files = [PackagePath(name) for name in names]
    for file in files:
        file.dist = SimpleNamespace(locate_file=lambda path: site / path)
    return lambda name: SimpleNamespace(files=files)


def test_demo_says_what_it_waits_for(monkeypatch):
    """The first start compiles kernels for a while: without a word it looks as if it hung."""

    def llm(model, adapters, *, notify, **config):
        notify("Waiting for the CPU kernels")
        raise UsageError("that was all")

    said = []
    monkeypatch.setattr("neuroada_serve.engine.llm.LLM", llm)
    monkeypatch.setattr(demo, "resolve_model", lambda name, notify: SimpleNamespace(exact=True))
    with pytest.raises(UsageError, match="that was all"):
        demo.run_demo(Console(), said.append)
    assert said == ["Waiting for the CPU kernels"]


def test_clone_has_its_examples_beside_the_package():
    assert find_examples() == ROOT / "examples"


def test_wheel_has_them_where_it_was_installed(installed, tmp_path, monkeypatch):
    share = tmp_path / "share" / "neuroada-serve"
    share.mkdir(parents=True)
    (share / "prompts.json").write_text("{}")
    files = ("neuroada_serve/demo.py", "../../share/neuroada-serve/prompts.json")
    monkeypatch.setattr(demo, "distribution", distribution_with(installed, *files))
    assert find_examples() == share


@pytest.mark.parametrize("files", [None, ("neuroada_serve/demo.py",)])
def test_package_without_them_says_what_to_do(files, installed, monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    found = absent if files is None else distribution_with(installed, *files)
    monkeypatch.setattr(demo, "distribution", found)
    with pytest.raises(UsageError, match="neither beside the package nor installed with it"):
        find_examples()


def test_wheel_takes_every_adapter_of_the_demo():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = json.loads((ROOT / "examples" / "prompts.json").read_text())
    expected = {f"share/neuroada-serve/adapters/{name}" for name in names}
    assert set(listed["data-files"]) == expected | {"share/neuroada-serve"}


def test_container_copies_what_there_is_and_serves_by_flags_that_are_known():
    text = DOCKERFILE.read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()[:-1]), line
    (command,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    name, *arguments = json.loads(command)
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
    assert all(word in shown for word in arguments if word.startswith("--"))
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)
    pinned = dict(re.findall(r"^([\w.-]+)==(.*)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert f'"torch=={pinned["torch"]}+cpu"' in text
