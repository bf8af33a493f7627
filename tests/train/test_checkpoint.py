"""Checkpoints of training: whole or passed over, of this run or refused."""

import errno
import os

import pytest
import torch

from neuroada_serve.adapters import durable
from neuroada_serve.errors import UsageError
from neuroada_serve.train import trainer
from neuroada_serve.train.checkpoint import Checkpoint, Checkpoints
from neuroada_serve.train.loop import Loop
from neuroada_serve.train.trainer import train_adapter
from tests.support.training import QUICK, ROWS, make_base, write_rows


def checkpoint(step):
    tensors = {"a.value": torch.full((3, 2), float(step)), "random.cpu": torch.get_rng_state()}
    return Checkpoint(step, tensors, {"losses": [0.1 * step]})


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "mine.training"


@pytest.fixture
def checkpoints(folder):
    return Checkpoints(folder, {"lr": 0.01, "rows": "ab"})


def silent(message):
    raise AssertionError(message)


def test_what_was_saved_comes_back(checkpoints):
    assert checkpoints.newest(silent) is None
    checkpoints.save(checkpoint(5))
    found = checkpoints.newest(silent)
    assert found.step == 5
    assert found.state["losses"] == [0.5]
    assert torch.equal(found.tensors["a.value"], checkpoint(5).tensors["a.value"])


def test_the_newest_two_are_kept(checkpoints, folder):
    for step in (2, 10, 4, 12):
        checkpoints.save(checkpoint(step))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-0000010.safetensors", "step-0000012.safetensors"]
    checkpoints.remove()
    assert not folder.exists()


def cut(data):
    return data[: len(data) // 2]


def flip_last(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def flip_state(data):
    return data.replace(b"losses", b"looses", 1)


def empty(data):
    return b""


@pytest.mark.parametrize("damage", [cut, flip_last, flip_state, empty])
def test_a_broken_newest_is_told_and_passed_over(checkpoints, folder, damage):
    checkpoints.save(checkpoint(4))
    checkpoints.save(checkpoint(6))
    newest = folder / "step-0000006.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    told = []
    assert checkpoints.newest(told.append).step == 4
    assert "step-0000006" in told[0]


def test_another_runs_checkpoints_are_refused_by_what_differs(checkpoints, folder):
    checkpoints.save(checkpoint(4))
    other = Checkpoints(folder, {"lr": 0.02, "rows": "ab"})
    with pytest.raises(UsageError, match=r"lr was 0.01 and is 0.02\. .*--fresh"):
        other.newest(silent)


# --- a whole run -------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a run, as a crash would."""


def stopping_at(monkeypatch, step):
    """Have the run stop before the step's checkpoint is written."""
    taken = Loop.checkpoint

    def checkpoint(self):
        if self.done == step:
            raise Stop
        return taken(self)

    monkeypatch.setattr(Loop, "checkpoint", checkpoint)


CONFIG = trainer.replace(QUICK, max_steps=8, save_steps=2, eval_steps=4)


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "tiny", "llama")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def interrupted(base, rows, out, monkeypatch, step=7):
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "checkpoint", Loop.checkpoint)
        stopping_at(patch, step)
        config = trainer.replace(CONFIG, save_steps=1)
        with pytest.raises(Stop):
            train_adapter(base, rows, out, config)


def test_a_torn_newest_costs_only_its_steps(base, rows, tmp_path, monkeypatch):
    whole = train_adapter(base, rows, tmp_path / "whole", CONFIG)
    out = tmp_path / "out"
    interrupted(base, rows, out, monkeypatch)
    newest = max((tmp_path / "out.training").iterdir())
    newest.write_bytes(cut(newest.read_bytes()))
    told = []
    resumed = train_adapter(base, rows, out, CONFIG, told.append)
    assert any("Resuming from step 5" in message for message in told), told
    assert resumed.adapter.digest == whole.adapter.digest
    assert resumed.losses == whole.losses
    assert not (tmp_path / "out.training").exists()


def test_fresh_starts_again(base, rows, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(base, rows, out, monkeypatch)
    told = []
    train_adapter(base, rows, out, CONFIG, told.append, fresh=True)
    assert not any("Going on" in message for message in told)


def test_changed_rows_or_settings_are_refused_and_lose_nothing(
    base,
    rows,
    tmp_path,
    monkeypatch,
):
    out = tmp_path / "out"
    interrupted(base, rows, out, monkeypatch)
    kept = sorted((tmp_path / "out.training").iterdir())
    with pytest.raises(UsageError, match="lr was None and is 0.5"):
        train_adapter(base, rows, out, trainer.replace(CONFIG, lr=0.5))
    other = write_rows(tmp_path / "other.jsonl", ROWS[:-1])
    with pytest.raises(UsageError, match="rows was"):
        train_adapter(base, other, out, CONFIG)
    assert sorted((tmp_path / "out.training").iterdir()) == kept
    assert not out.exists()


class FullDisk:
    """os, on a disk that is full from the n-th flush or rename on."""

    def __init__(self, last):
        self._left = last
        self.calls = 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("fsync", "replace"):
            return real

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls > self._left:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call


def test_a_full_disk_is_said_and_loses_nothing(base, rows, tmp_path, monkeypatch):
    whole = train_adapter(base, rows, tmp_path / "whole", CONFIG)
    counting = FullDisk(1 << 30)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", counting)
        train_adapter(base, rows, tmp_path / "counted", CONFIG)
    assert counting.calls > 20
    for last in range(0, counting.calls, 3):
        out = tmp_path / f"full-{last}"
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", FullDisk(last))
            with pytest.raises(UsageError, match=r"No space left.*[mM]ake room"):
                train_adapter(base, rows, out, CONFIG)
        files = list(tmp_path.glob(f"full-{last}*/*"))
        assert not [path for path in files if ".tmp-" in path.name]
        resumed = train_adapter(base, rows, out, CONFIG)
        assert resumed.adapter.digest == whole.adapter.digest, last
