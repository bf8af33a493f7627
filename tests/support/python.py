"""Python in a process of its own, and what needs Triton."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_python(*args: str, **env: str) -> str:
    """Run Python at the root of the checkout and return its output; fail with it if it fails."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def run_interpreted(*names: str) -> None:
    """Run the tests of Triton kernels: in its interpreter, or on a GPU where there is one.

    Triton reads TRITON_INTERPRET when it is imported, so each mode takes a process. Interpreted
    kernels compute on numpy, which warns of the nan that some cases plant.
    """
    import torch

    mode = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    files = [f"tests/support/interpreted_{name}.py" for name in names]
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    run_python("-m", "pytest", *files, *options, OMP_NUM_THREADS="1", **mode)
