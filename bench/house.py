"""Count how much a reader of this repository must hold in mind; read the source, import none of it.

python bench/house.py [--root FOLDER] [--json FILE]

A table shows every count beside the first one and its limit; the last line is one JSON document
that also names what was counted.
"""

import argparse
import ast
import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "neuroada_serve"
MAX_CLASS_LINES = 250
MAX_CLASS_METHODS = 20
MAX_FILE_LINES = 500
MAX_SCRIPT_LINES = 300
KERNEL_FILES = ("ops/cpu_forward_kernels.py", "ops/cpu_vectors.py")
RIDDLES = ("What", "Of", "Whose", "Whom", "Who", "Which", "Whether", "How", "Where", "When", "Why")
# Types that carry a step's adapter additions from the bank to the kernels.
FIRST_PLAN = (
    *("Run", "SiteBypass", "SiteBias", "BankBatch", "TokenSlots", "BypassTable", "BypassLaunch"),
    *("Lanes", "Call", "RunAdd", "RunAdditions", "Additions", "_Plan"),
)
PLAN = ("StepPlan", "TokenRun", "BypassTable", "TokenSlots", "TableBlock", "LanesBlock")
PLAN_ROOMS = ("adapters/", "model/", "ops/", "engine/")


@dataclass(frozen=True)
class Count:
    """One count of the table.

    first: before the rebuilding began; None where nobody counted.
    limit: None where the count only informs.
    found: what was counted, for the JSON document.
    """

    name: str
    first: int | None
    now: int
    limit: int | None = None
    found: Sequence[Any] = field(default=(), repr=False)


@cache
def parsed(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(), str(path))


def modules(root: Path, folder: str = PACKAGE) -> dict[str, Path]:
    """Python files of a folder, by their path inside it."""
    paths = sorted((root / folder).rglob("*.py"))
    return {path.relative_to(root / folder).as_posix(): path for path in paths}


def num_lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text().splitlines())


@dataclass(frozen=True)
class ClassSize:
    """Size of one class: lines from `class` to its end, functions defined in its body."""

    name: str
    lines: int
    methods: int

    def __str__(self) -> str:
        return f"{self.name}: {self.lines} lines, {self.methods} methods"

    @property
    def too_large(self) -> bool:
        """Either limit is passed."""
        return self.lines > MAX_CLASS_LINES or self.methods > MAX_CLASS_METHODS


def class_sizes(root: Path) -> list[ClassSize]:
    """Every class of the package, the longest first; names are `path:Class`."""
    found = []
    for name, path in modules(root).items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                functions = (ast.FunctionDef, ast.AsyncFunctionDef)
                methods = sum(isinstance(each, functions) for each in node.body)
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append(ClassSize(f"{name}:{node.name}", lines, methods))
    return sorted(found, key=lambda size: size.lines, reverse=True)


def long_files(root: Path, folder: str = PACKAGE, limit: int = MAX_FILE_LINES) -> dict[str, int]:
    """Lines of files over the limit, the kernel files left out."""
    lines = {name: num_lines(path) for name, path in modules(root, folder).items()}
    return {n: count for n, count in lines.items() if count > limit and n not in KERNEL_FILES}


def plan_types(root: Path) -> list[str]:
    """Existing classes among those known to carry additions from the bank to the kernels."""
    wanted = {*FIRST_PLAN, *PLAN}
    found = []
    for name, path in modules(root).items():
        if name.startswith(PLAN_ROOMS):
            tree = parsed(path)
            classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
            found += [f"{name}:{each}" for each in classes if each in wanted]
    return found


def task_files(root: Path) -> list[str]:
    """Files that a new task needs, by the docstring of tasks.py; a test holds that list."""
    path = root / PACKAGE / "tasks.py"
    if not path.is_file():
        return []
    text = ast.get_docstring(parsed(path)) or ""
    return sorted({"tasks.py", *re.findall(r"`([a-z_]+/[\w/.]+)`", text)})


def docstrings(root: Path, folder: str = PACKAGE) -> Iterator[tuple[str, str]]:
    """Place, as `file:line`, and text of every docstring of a folder."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, path in modules(root, folder).items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, owners) and (text := ast.get_docstring(node)):
                yield f"{folder}/{name}:{node.body[0].lineno}", text


def riddles(root: Path, folder: str = PACKAGE) -> list[str]:
    """Docstrings that begin with a question word, as `file:line: first line`."""
    pattern = re.compile(rf"(?:{'|'.join(RIDDLES)})\b")
    return [
        f"{place}: {text.splitlines()[0]}"
        for place, text in docstrings(root, folder)
        if pattern.match(text)
    ]


def untested_modules(root: Path) -> list[str]:
    """Modules for which tests/ has no file of the same folder and name."""
    found = []
    for name in modules(root):
        folder, file = Path(name).parent, Path(name).name
        test = root / "tests" / folder / f"test_{file.removeprefix('_')}"
        if file not in ("__init__.py", "__main__.py") and not test.is_file():
            found.append(name)
    return found


def repeated_defaults(root: Path) -> list[str]:
    """Flags whose default is a literal in more than one place, None and False left out.

    Places: fields made by `option`, parameters of commands, those of `LLM` named like a field.
    """
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    nodes = [(name, n) for name, path in modules(root).items() for n in ast.walk(parsed(path))]
    for name, node in nodes:
        if isinstance(node, ast.AnnAssign) and (option := _option(node)) is not None:
            places[option].append(f"{name}:{node.lineno}")
    options = {option for option, _ in places}
    for name, node in nodes:
        if isinstance(node, ast.FunctionDef):
            is_command = name.startswith("cli/") and bool(node.decorator_list)
            for parameter, default in _defaults(node):
                if is_command or (name == "engine/llm.py" and parameter in options):
                    places[parameter, default].append(f"{name}:{node.lineno}")
    return [
        f"{name} = {default}: {', '.join(found)}"
        for (name, default), found in sorted(places.items())
        if len(found) > 1 and default not in ("None", "False")
    ]


def _option(node: ast.AnnAssign) -> tuple[str, str] | None:
    """Name and default of a settings field; None for another assignment."""
    call = node.value
    if not isinstance(node.target, ast.Name) or not isinstance(call, ast.Call) or not call.args:
        return None
    is_option = isinstance(call.func, ast.Name) and call.func.id == "option"
    return (node.target.id, ast.unparse(call.args[0])) if is_option else None


def _defaults(node: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """Parameters of a function with their literal defaults."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    some = zip(positional[len(positional) - len(given.defaults) :], given.defaults, strict=True)
    for parameter, default in (*some, *zip(given.kwonlyargs, given.kw_defaults, strict=True)):
        if isinstance(default, ast.Constant):
            yield parameter.arg, ast.unparse(default)


def counts(root: Path = ROOT) -> list[Count]:
    """Every count of the table."""
    sizes = class_sizes(root)
    large = [size for size in sizes if size.too_large]
    files = long_files(root)
    scripts = long_files(root, "bench", MAX_SCRIPT_LINES)
    plan = plan_types(root)
    tasks = task_files(root)
    asked = riddles(root)
    others = riddles(root, "bench") + riddles(root, "tests")
    untested = untested_modules(root)
    repeated = repeated_defaults(root)
    return [
        Count("lines of the largest class", 470, sizes[0].lines, MAX_CLASS_LINES, [sizes[0].name]),
        Count("methods of the largest class", 38, max(s.methods for s in sizes), MAX_CLASS_METHODS),
        Count("classes over either limit", None, len(large), 0, [str(size) for size in large]),
        Count("package files over 500 lines", None, len(files), 0, [*files.items()]),
        Count("bench scripts over 300 lines", 7, len(scripts), 0, [*scripts.items()]),
        Count("types of a step's plan", 13, len(plan), 6, plan),
        Count("files that a new task needs", 31, len(tasks), 6, tasks),
        Count("flags whose default is written twice", 106, len(repeated), 0, repeated),
        Count("docstrings that begin with a question", 115, len(asked), 0, asked),
        Count("docstrings of the package", 1174, sum(1 for _ in docstrings(root))),
        Count("such docstrings in bench and tests", None, len(others), 0, others),
        Count("modules without a test of their name", 94, len(untested), None, untested),
        Count("modules of the package", 124, len(modules(root))),
        Count("lines of README", 648, num_lines(root / "README.md"), 250),
        Count("lines of the package", None, sum(map(num_lines, modules(root).values()))),
    ]


def commit_of(root: Path) -> str | None:
    """Checked out commit; None outside of a checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or None


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to count")
    parser.add_argument("--json", type=Path, help="file to write")
    flags = parser.parse_args(arguments)

    found = counts(flags.root)
    print(f"{'':42}", *(f"{heading:>7}" for heading in ("first", "limit", "now")))
    for count in found:
        figures = ("" if n is None else n for n in (count.first, count.limit, count.now))
        print(f"{count.name:42}", *(f"{figure:>7}" for figure in figures))
    document = json.dumps(
        {
            "benchmark": "house",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit_of(flags.root),
            "counts": {
                count.name: {"first": count.first, "limit": count.limit, "now": count.now}
                for count in found
            },
            "found": {count.name: list(count.found) for count in found if count.found},
        }
    )
    if flags.json:
        flags.json.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
