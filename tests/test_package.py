"""`import neuroada_serve`: its names, and what importing it costs."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import neuroada_serve


def test_all_is_what_there_is():
    assert set(neuroada_serve.__all__) == {
        "LLM",
        "Adapter",
        "NeuroAdaError",
        "SamplingParams",
        "__version__",
        "load_adapter",
        "save_adapter",
    }
    for name in neuroada_serve.__all__:
        assert getattr(neuroada_serve, name) is not None


def test_dir_shows_all_and_nothing_else():
    shown = [name for name in dir(neuroada_serve) if not name.startswith("__")]
    assert shown == sorted(set(neuroada_serve.__all__) - {"__version__"})


def test_import_and_dir_leave_torch_alone():
    code = "import sys, neuroada_serve; dir(neuroada_serve); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nobody"):
        _ = neuroada_serve.Nobody


# --- what it needs -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN_INTERPRETER = {"benchmark/peer_vllm.py": {"vllm"}}  # run with --peer-python


def declared(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", one)[0].lower().replace("_", "-") for one in requirements}


def imports(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level names that are imported, and whether the module can be had without them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0], guarded
        else:
            guards = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try | ast.If)
            yield from imports(node, guarded or guards)


def test_whatever_is_imported_is_declared():
    """A package that only comes along with another may leave with its next version."""
    core = declared(PROJECT["dependencies"])
    extras = declared(sum(PROJECT["optional-dependencies"].values(), []))
    distributions = packages_distributions()
    missing = []
    for file in (ROOT / "neuroada_serve").rglob("*.py"):
        where = str(file.relative_to(ROOT / "neuroada_serve"))
        for name, guarded in imports(ast.parse(file.read_text())):
            own = sys.stdlib_module_names | {"neuroada_serve"} | OWN_INTERPRETER.get(where, set())
            known = {n.lower().replace("_", "-") for n in distributions.get(name, [name])}
            if name not in own and not known & (core | extras if guarded else core):
                missing.append(f"{where} imports {name}")
    assert missing == []


def test_whatever_is_declared_has_a_lower_bound_and_a_version_that_was_tested():
    wanted = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    wanted = [one for one in wanted if not one.startswith("neuroada-serve[")]
    assert [one for one in wanted if ">=" not in one] == []
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert declared(wanted) <= declared(pinned)
