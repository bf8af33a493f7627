"""Files that commands of README and docs/ write are ignored by git."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.pages import BLOCKS, PROSE, ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout of git")


def written() -> set[str]:
    """Everything that a command of a page is told to write, as one path each."""
    said = [*(block.text for block in BLOCKS), *re.findall(r"`([^`]+)`", PROSE)]
    found = re.findall(r"--out ([\w./-]+)", "\n".join(said))
    return {path for path in found if path != "DIR" and not path.startswith("bench/results/")}


def is_ignored(path: str) -> bool:
    command = ["git", "check-ignore", "--quiet", "--no-index", path]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def test_what_commands_of_pages_write_is_ignored():
    paths = written()
    assert {"served/team", "my-triage", "rows", "merged", "results.json"} <= paths
    for path in paths:
        files = [f"{path}/x", f"{path}.training/x"]  # in a folder, and the checkpoints beside it
        if Path(path).suffix:
            files = [path, Path(path).with_suffix(".scores.png").name]
        assert [file for file in files if not is_ignored(file)] == []


def test_what_belongs_to_the_repository_is_not_ignored():
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout == ""
