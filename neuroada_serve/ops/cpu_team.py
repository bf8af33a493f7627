"""Runs compiled kernels on torch's own threads.

torch's OpenMP team is taken over for the length of a kernel, as any torch operator would do, so
there is one set of threads that never competes with another. Without numba, or for dtypes that the
kernels do not have, `supports` says no and callers use torch operators instead.
"""

import ctypes
import glob
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.ops.cpu_blocks import KINDS, ProgramBlock

# By `bench/choices.py`: so many entries and fewer are not worth waking a second thread.
THREADED_ENTRIES = 8192


@cache
def kernels() -> Any:
    """`cpu_kernels`; None without numba."""
    try:
        from neuroada_serve.ops import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels


@cache
def forward_kernels() -> Any:
    """`cpu_forward_kernels`; None without numba."""
    try:
        from neuroada_serve.ops import cpu_forward_kernels
    except ImportError:
        return None
    return cpu_forward_kernels


@cache
def attention_kernels() -> Any:
    """`cpu_attention_kernels`; None without numba."""
    try:
        from neuroada_serve.ops import cpu_attention_kernels
    except ImportError:
        return None
    return cpu_attention_kernels


def supports(*tensors: Tensor) -> bool:
    """Tell if kernels can run on these tensors: one known dtype, on the CPU, numba there."""
    dtype = tensors[0].dtype
    return (
        dtype in KINDS
        and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)
        and kernels() is not None
    )


class TeamKernel:
    """A kernel that runs in as many threads as torch uses."""

    def __init__(self, kernel: Any) -> None:
        self._function, self._address = kernel.ctypes, kernel.address
        self._openmp = _openmp()

    def __call__(self, block: Any, num_entries: int) -> None:
        """Run on a block whose counter is 0; few entries are computed by one thread."""
        address = ctypes.addressof(block)
        threads = torch.get_num_threads() if num_entries > THREADED_ENTRIES else 1
        if threads == 1 or self._openmp is None:
            self._function(address)
        else:
            self._openmp[0](self._address, address, threads, 0)


def run_program(program: ProgramBlock, threads: int) -> None:
    """Run a list of operations by threads that wait for each other after each."""
    program.counter = program.barrier = 0
    kernel, address, openmp = forward_kernels().run, ctypes.addressof(program), _openmp()
    if threads == 1 or openmp is None:
        kernel.ctypes(address)
    else:
        parallel, program.barrier = openmp
        parallel(kernel.address, address, threads, 0)


def has_team() -> bool:
    """Tell if kernels can take over torch's OpenMP threads."""
    return _openmp() is not None


@cache
def _openmp() -> tuple[Any, int] | None:
    """Find GOMP_parallel(function, data, num_threads, flags), and the address of GOMP_barrier(), in
    the OpenMP library that torch runs on.
    """
    torch_folder = os.path.dirname(torch.__file__)
    candidates = [
        *glob.glob(os.path.join(torch_folder, "lib", "libgomp*.so*")),
        *glob.glob(os.path.join(os.path.dirname(torch_folder), "torch.libs", "libgomp*.so*")),
    ]
    for path in candidates:
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            parallel, barrier = library.GOMP_parallel, library.GOMP_barrier
        except (OSError, AttributeError):
            continue  # torch did not load this one
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        address = ctypes.cast(barrier, ctypes.c_void_p).value
        assert address is not None
        return parallel, address
    return None
