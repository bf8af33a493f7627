"""The Triton kernels: run in Triton's interpreter (or on a GPU), and compiled for one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_python(*args: str, **env: str) -> None:
    """Triton reads TRITON_INTERPRET when it is imported, so each mode takes a process."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, *args],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@needs_triton
def test_kernels_equal_their_references():
    mode = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    # Interpreted kernels compute on numpy, which warns of the nan that some cases plant.
    files = [f"interpreted_{cases}.py" for cases in ("bypass", "attention", "value_grad")]
    run_python("-m", "pytest", *files, "-q", "-W", "ignore::RuntimeWarning", **mode)


@needs_triton
def test_kernels_compile_for_a_gpu():
    """Compiling needs no GPU; the interpreter accepts kernels that the compiler refuses."""
    run_python("compiled_kernels.py", TRITON_INTERPRET="0")


def test_kernels_import_without_triton():
    run_python(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "from neuroada_serve.ops.triton_bypass import HAS_TRITON as bypass\n"
        "from neuroada_serve.engine.triton_attention import HAS_TRITON as attention\n"
        "from neuroada_serve.ops.triton_value_grad import HAS_TRITON as value_grad\n"
        "assert not bypass and not attention and not value_grad",
    )
