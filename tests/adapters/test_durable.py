"""Crashes while an adapter is written: what is read is old or new, never a mixture."""

import errno
import os
from pathlib import Path

import pytest

from neuroada_serve.adapters import durable
from neuroada_serve.adapters.format import (
    save_adapter,
)
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.errors import AdapterFormatError, AdapterNotFoundError
from tests.support.adapter_files import CONFIG, SHAPES, SPEC, WEIGHTS, assert_equal, new_adapter


def fail_at(monkeypatch, name: str, nth: int, error: BaseException) -> None:
    """Make the nth call of os.NAME in `durable` raise."""
    calls, real = [], getattr(os, name)

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(durable.os, name, failing)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["replace", "fsync", "open"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_failure_before_the_first_rename_leaves_the_old_adapter(name, error, monkeypatch, tmp_path):
    old = new_adapter(SHAPES, seed=1)
    save_adapter(old, tmp_path)
    fail_at(monkeypatch, name, 1, error)
    with pytest.raises(type(error)):
        save_adapter(new_adapter(SHAPES, seed=2), tmp_path)
    monkeypatch.undo()
    assert_equal(load_adapter(tmp_path, SPEC), old)
    assert files_in(tmp_path) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("change", ["k", "base", "modules"])
def test_crash_between_the_two_files_of_unlike_adapters_is_refused(change, monkeypatch, tmp_path):
    new = {
        "k": new_adapter(SHAPES, k=3),
        "base": new_adapter(SHAPES, base_fingerprint="1" * 64),
        "modules": new_adapter({"a.q_proj": (3, 5)}),
    }[change]
    save_adapter(new_adapter(SHAPES, seed=1), tmp_path)
    fail_at(monkeypatch, "replace", 2, OSError(errno.EIO, "I/O error"))
    with pytest.raises(OSError, match="I/O error"):
        save_adapter(new, tmp_path)
    monkeypatch.undo()
    with pytest.raises(AdapterFormatError):
        load_adapter(tmp_path)
    assert files_in(tmp_path) == [CONFIG, WEIGHTS]


def test_crash_between_the_two_files_of_like_adapters_gives_values_of_one(monkeypatch, tmp_path):
    """Same base, k and modules: the config in place describes the new values as well."""
    old, new = new_adapter(SHAPES, seed=1), new_adapter(SHAPES, seed=2)
    save_adapter(old, tmp_path)
    fail_at(monkeypatch, "replace", 2, OSError(errno.EIO, "I/O error"))
    with pytest.raises(OSError, match="I/O error"):
        save_adapter(new, tmp_path)
    monkeypatch.undo()
    assert_equal(load_adapter(tmp_path, SPEC), new)
    assert files_in(tmp_path) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("nth", [1, 2])
def test_crash_in_the_first_save_leaves_no_adapter(nth, monkeypatch, tmp_path):
    fail_at(monkeypatch, "replace", nth, OSError(errno.EIO, "I/O error"))
    with pytest.raises(OSError, match="I/O error"):
        save_adapter(new_adapter(SHAPES), tmp_path)
    monkeypatch.undo()
    with pytest.raises(AdapterNotFoundError):
        load_adapter(tmp_path)
    assert not [name for name in files_in(tmp_path) if name.startswith(".")]


def test_data_is_on_disk_before_it_gets_its_name(monkeypatch, tmp_path):
    """fsync the file, rename it, fsync the directory; for the weights, then for the config."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            durable.os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))
        )
    save_adapter(new_adapter(SHAPES), tmp_path)
    assert calls == ["fsync", "replace", "fsync"] * 2


def test_reader_beside_a_writer_sees_an_old_or_a_new_file(monkeypatch, tmp_path):
    """The adapter loads just before each rename: nothing is written in place."""
    old = new_adapter(SHAPES, seed=1)
    save_adapter(old, tmp_path)
    real, seen = os.replace, []

    def reading(source, target):
        seen.append(load_adapter(tmp_path, SPEC))
        real(source, target)

    monkeypatch.setattr(durable.os, "replace", reading)
    save_adapter(new_adapter(SHAPES, seed=2), tmp_path)
    assert_equal(seen[0], old)
    assert len(seen) == 2
