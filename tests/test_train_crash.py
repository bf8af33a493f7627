"""Training that is killed goes on as if it had not been."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def killed_at(folder, which, max_steps):
    command = [sys.executable, "crash_training.py", str(folder), which, str(max_steps)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_resumed_runs_give_the_same_bytes(tmp_path):
    found = killed_at(tmp_path, "7:11", 14)
    assert len(found["points"]) >= 4
    assert all(found["points"].values()), found


@pytest.mark.slow
def test_a_hundred_kill_points_give_the_same_bytes(tmp_path):
    found = killed_at(tmp_path, "all", 36)
    assert len(found["points"]) == found["events"] >= 100
    assert all(found["points"].values()), found
