"""The counts of bench/house.py, on a small tree and on this repository's limits."""

import json
from pathlib import Path

from bench import house


def test_classes_stay_within_250_lines_and_20_methods():
    assert [str(size) for size in house.class_sizes(house.ROOT) if size.too_large] == []


def test_package_files_stay_within_500_lines():
    assert house.long_files(house.ROOT) == {}


def test_every_limit_of_the_table_holds():
    counts = house.counts(house.ROOT)
    over = [str(c) for c in counts if c.limit is not None and c.now > c.limit]
    assert over == []


def test_bench_scripts_stay_within_300_lines():
    found = house.long_files(house.ROOT, "bench", house.MAX_SCRIPT_LINES)
    assert found == {}


def small_tree(root: Path) -> Path:
    files = {
        "README.md": "# One\n\nTwo\n",
        "neuroada_serve/config.py": "class Config:\n    seed: int = option(0, 'Seed.')\n",
        "neuroada_serve/cli/ask.py": "@command\ndef ask(seed: int = 0): ...\n",
        "neuroada_serve/adapters/bank.py": '"""Where values are."""\nclass SiteBypass: ...\n',
        "neuroada_serve/adapters/_pages.py": '"""Pages of a bank."""\n',
        "neuroada_serve/tasks.py": '"""Tasks; a new one needs `train/objectives.py`, too."""\n',
        "tests/adapters/test_pages.py": "",
    }
    methods = "".join(f"    def m{i}(self): ...\n" for i in range(21))
    files["neuroada_serve/engine/engine.py"] = "class Engine:\n" + methods
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_small_tree_is_counted(tmp_path, capsys):
    root = small_tree(tmp_path)
    house.main(["--root", str(root), "--json", str(tmp_path / "house.json")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "house.json").read_text())
    assert {name: count["now"] for name, count in result["counts"].items()} == {
        "lines of the largest class": 22,
        "methods of the largest class": 21,
        "classes over either limit": 1,
        "package files over 500 lines": 0,
        "bench scripts over 300 lines": 0,
        "types of a step's plan": 1,
        "files that a new task needs": 2,
        "flags whose default is written twice": 1,
        "docstrings that begin with a question": 1,
        "docstrings of the package": 3,
        "such docstrings in bench and tests": 0,
        "modules without a test of their name": 5,
        "modules of the package": 6,
        "lines of README": 3,
        "lines of the package": 30,
    }
    assert result["found"]["flags whose default is written twice"] == [
        "seed = 0: config.py:2, cli/ask.py:2"
    ]
    assert result["found"]["docstrings that begin with a question"] == [
        "neuroada_serve/adapters/bank.py:1: Where values are."
    ]
