"""Training that is killed goes on as if it had not been."""

import json

import pytest

from tests.support.python import run_python


def killed_at(folder, which, max_steps):
    out = run_python("-m", "tests.support.crash_training", str(folder), which, str(max_steps))
    return json.loads(out.splitlines()[-1])


def test_resumed_runs_give_the_same_bytes(tmp_path):
    found = killed_at(tmp_path, "7:11", 14)
    assert len(found["points"]) >= 4
    assert all(found["points"].values()), found


@pytest.mark.slow
def test_a_hundred_kill_points_give_the_same_bytes(tmp_path):
    found = killed_at(tmp_path, "all", 36)
    assert len(found["points"]) == found["events"] >= 100
    assert all(found["points"].values()), found
