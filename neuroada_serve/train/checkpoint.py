"""Keep the state of a run on disk: enough to go on after a crash as if nothing had happened.

A checkpoint is one safetensors file, so that a single rename makes it whole: tensors (index,
values, the optimizer's moments, random states), and in its metadata the rest as JSON, with the
sha256 of both. The newest two are kept beside the adapter's folder, in `NAME.training`, until the
adapter is written. No pickle.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from neuroada_serve.adapters.durable import sync_directory, write_durably
from neuroada_serve.errors import UsageError

_FORMAT = "neuroada-training/1"
_KEPT = 2
_NAME = re.compile(r"step-(\d{7})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run. step: optimizer steps done. tensors: by name. state: what JSON holds."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def checkpoint_folder(out: Path) -> Path:
    """Return the folder for the checkpoints of a run that writes `out`."""
    return out.absolute().parent / f"{out.absolute().name}.training"


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint in a folder; None if there is none."""
    return next((step for step, _ in _files_in(folder)), None)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: used for nothing else; made when the first checkpoint is written.
        run: everything that decides what the run does, as JSON holds it; only checkpoints of an
            equal run are resumed.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self._run = json.loads(json.dumps(run))

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint durably, then remove those before the newest two.

        Raises:
            UsageError: it cannot be written; those that are there stay.
        """
        state = json.dumps({"step": checkpoint.step, "run": self._run, **checkpoint.state})
        tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
        data = save(tensors, {"format": _FORMAT, "state": state, "sha256": _digest(state, tensors)})
        path = self.folder / f"step-{checkpoint.step:07}.safetensors"
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                sync_directory(self.folder.parent)
            write_durably(path, data)
        except OSError as error:
            raise UsageError(
                f"the checkpoint {path} cannot be written: {error.strerror}; those before it are "
                "whole. Make room, and the same command goes on from them"
            ) from error
        for _, older in _files_in(self.folder)[_KEPT:]:
            older.unlink(missing_ok=True)

    def newest(self, notify: Callable[[str], None]) -> Checkpoint | None:
        """Return the newest checkpoint that is whole; None if there is none. Broken ones are
        reported and skipped.

        Raises:
            UsageError: they are of another run; names what differs.
        """
        for _, path in _files_in(self.folder):
            try:
                found = _read(path)
            except _Broken as broken:
                notify(f"Skipping checkpoint {path.name}: {broken}.")
                continue
            self._check_same_run(found.state["run"])
            return found
        return None

    def remove(self) -> None:
        """Remove all checkpoints, and the remains of an interrupted write."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _check_same_run(self, run: Mapping[str, Any]) -> None:
        differing = [
            f"{name} was {run.get(name)!r} and is {self._run.get(name)!r}"
            for name in sorted(run.keys() | self._run.keys())
            if run.get(name) != self._run.get(name)
        ]
        if differing:
            raise UsageError(
                f"{self.folder} has checkpoints of another run: {'; '.join(differing)}. Finish "
                "that run, or discard them with --fresh"
            )


def _files_in(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of a folder's checkpoints, newest first."""
    if not folder.is_dir():
        return []
    names = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(m[1]), path) for m, path in names if m), reverse=True)


class _Broken(Exception):
    """A checkpoint cannot be used; the message says why."""


def _read(path: Path) -> Checkpoint:
    try:
        data = path.read_bytes()
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header["__metadata__"]
        if metadata["format"] != _FORMAT:
            raise _Broken(f"its format is {metadata['format']!r}, not {_FORMAT!r}")
        if metadata["sha256"] != _digest(metadata["state"], tensors):
            raise _Broken("its bytes are not those that were written")
        state = json.loads(metadata["state"])
        return Checkpoint(state["step"], tensors, state)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _Broken(f"it is torn ({error})") from error


def _digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
