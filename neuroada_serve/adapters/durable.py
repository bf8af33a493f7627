"""Durable writes: after a crash a file is whole or absent."""

import os
import secrets
from pathlib import Path

from neuroada_serve.errors import UsageError


def check_writable(folder: Path, what: Path) -> None:
    """Refuse a folder that cannot be written to, before the work whose result it should hold.

    Args:
        folder: which is there, or can be made.
        what: the file or folder that is named in the refusal.

    Raises:
        UsageError: the folder can be neither written to nor made.
    """
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{what} cannot be written: {existing} is no folder you may write to")


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that is not empty or cannot be made.

    Raises:
        UsageError
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; name a new one")
    check_writable(folder, folder)


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` to `path`: temporary file in the same directory, fsync, rename, fsync directory.

    After a crash the path holds its old bytes or its new ones. On error the temporary file is
    removed and the old bytes stay. Mode is 0644 less the umask.
    """
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in this directory survive a crash."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_unfinished(path: Path) -> bool:
    """Return whether a file is a temporary one that a killed `write_durably` left behind."""
    return path.match(".*.tmp-*")


def remove_unfinished(directory: Path) -> None:
    """Delete the temporary files of killed writers. Nobody else may be writing in the folder."""
    for path in filter(is_unfinished, list(directory.glob(".*"))):
        path.unlink(missing_ok=True)
