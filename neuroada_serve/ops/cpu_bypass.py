"""Runs the CPU kernels of `cpu_kernels.py` on torch tensors, on torch's own threads.

torch's OpenMP team is taken over for the length of a kernel, as any torch operator would do, so
there is one set of threads that never competes with another. Without numba, or for dtypes that the
kernels do not have, `supports` says no and the callers use torch operators instead.
"""

import ctypes
import glob
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.errors import ShapeError

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Both by `bench/choices.py`: so many lanes and fewer are computed one by one, not side by side; so
# many entries and fewer are not worth waking a second thread.
FEW_LANES = 3
THREADED_ENTRIES = 8192
_SMALLEST = 32  # rows of x and of gradients shorter than a tile are left to torch
_FEWEST_NEURONS = 256  # in one piece of the value gradient


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels can run on these tensors: one known dtype, on the CPU, numba there."""
    dtype = tensors[0].dtype
    return (
        dtype in _KINDS
        and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)
        and _kernels() is not None
    )


class BypassLaunch:
    """`bypass_add_` on the CPU for one table, with all that does not change from step to step set.

    Args:
        index: [d_out, k] int32, contiguous rows.
        bypass: [num_slots, d_out, k], contiguous within a slot; `supports(bypass)`.
    """

    def __init__(self, index: Tensor, bypass: Tensor) -> None:
        d_out, k = index.shape
        if index.stride(1) != 1 and k > 1:
            raise ShapeError(f"rows of index must be contiguous, got strides {index.stride()}")
        if not bypass[0].is_contiguous():
            raise ShapeError(f"a slot must be contiguous, bypass has strides {bypass.stride()}")
        self._kept = index, bypass  # the block below holds their addresses
        self._entries_per_lane, self.k = d_out * k, k
        self._at = at = _kernels()
        self._block = block = (ctypes.c_int64 * at.NUM_FIELDS)()
        block[at.KIND] = _KINDS[bypass.dtype]
        block[at.D_OUT], block[at.K] = d_out, k
        block[at.INDEX], block[at.INDEX_STRIDE] = index.data_ptr(), index.stride(0)
        block[at.BYPASS], block[at.SLOT_STRIDE] = bypass.data_ptr(), bypass.stride(0)
        self.address = ctypes.addressof(block)
        self._run = _Kernel(at.bypass_add, block)

    def arguments(self, lanes_address: int) -> Any:
        """A block like the launch's own that reads its lanes at this address, for a kernel that has
        x and y. It holds addresses of the launch's tensors.
        """
        block = type(self._block).from_buffer_copy(self._block)
        block[self._at.LANES_AT] = lanes_address
        return block

    def __call__(self, y: Tensor, x: Tensor, lanes: "Lanes") -> None:
        """Add to y [num_tokens, d_out]; rows of x and y contiguous, wherever they begin."""
        block, at = self._block, self._at
        block[at.Y], block[at.Y_STRIDE] = y.data_ptr(), y.stride(0)
        block[at.X], block[at.X_STRIDE], block[at.D_IN] = x.data_ptr(), x.stride(0), x.shape[1]
        block[at.LANES_AT] = lanes.address
        self._run(lanes.num_lanes * self._entries_per_lane)


class Lanes:
    """The tokens to compute, as the kernel reads them.

    Args:
        positions: [num_lanes] int64, the rows of x and y.
        slots: [num_lanes] int64, their slots; NO_SLOT where merged values are only taken out.
        merged_slot: the slot whose values every lane takes out.
    """

    def __init__(self, positions: Tensor, slots: Tensor, merged_slot: int | None) -> None:
        self._kept = positions, slots  # the block holds their addresses
        self.num_lanes = len(slots)
        merged = -1 if merged_slot is None else merged_slot
        at = _kernels()
        self.block = block = (ctypes.c_int64 * at.NUM_LANE_FIELDS)()
        block[at.LANE_POSITIONS], block[at.LANE_SLOTS] = positions.data_ptr(), slots.data_ptr()
        block[at.NUM_LANES], block[at.MERGED_SLOT] = self.num_lanes, merged
        whole, left = divmod(self.num_lanes, at.LANES)
        block[at.NUM_BLOCKS] = whole + (left > FEW_LANES)
        self.address = ctypes.addressof(block)

    def copy(self) -> Any:
        """A block of the same fields."""
        return type(self.block).from_buffer_copy(self.block)


def add_entries(weight: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """weight[positions] += values, in float32, rounded once.

    Args:
        weight: [entries], contiguous.
        positions: [nnz] int64, distinct.
        values: [nnz], dtype of weight, contiguous.

    Returns:
        [nnz], what was there before.
    """
    saved = torch.empty_like(values)
    _run_on_entries(_kernels().add_entries, weight, positions, values, saved)
    return saved


def put_entries(weight: Tensor, positions: Tensor, values: Tensor) -> None:
    """weight[positions] = values; shapes as in `add_entries`."""
    _run_on_entries(_kernels().put_entries, weight, positions, values, values)


class RmsNorm:
    """y = weight * x / sqrt(mean(x * x) + eps) over the last dimension, as one kernel.

    Rounds as transformers' own norm does: after the division, and after the product.

    Args:
        weight: [width], contiguous; `supports(weight)`.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._at = at = _kernels()
        self._weight = weight  # the block below holds its address
        self._eps = ctypes.c_float(eps)
        self._block = block = (ctypes.c_int64 * at.NUM_NORM_FIELDS)()
        block[at.KIND] = _KINDS[weight.dtype]
        block[at.NORM_WEIGHT], block[at.NORM_WIDTH] = weight.data_ptr(), weight.numel()
        block[at.NORM_EPS] = ctypes.addressof(self._eps)
        self._run = _Kernel(at.rms_norm, block)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., width], contiguous, in the weight's dtype."""
        block, at = self._block, self._at
        y, count = torch.empty_like(x), x.numel()
        block[at.NORM_Y], block[at.NORM_X] = y.data_ptr(), x.data_ptr()
        block[at.NORM_ROWS] = count // block[at.NORM_WIDTH]
        self._run(count)
        return y


def value_grad(grads: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """out[i, j] = sum_t grads[t, i] * x[t, index[i, j]], in float32.

    Args:
        grads, x: [tokens, d_out] and [tokens, d_in], contiguous rows; `supports_value_grad`.
        index: [d_out, k] int32, contiguous.
    """
    at = _grad_kernels()
    (tokens, d_out), (d_in, k) = grads.shape, (x.shape[1], index.shape[1])
    spans = max(1, -(-tokens // at.SPAN))
    parts = torch.zeros(spans, d_out, k)
    zeros = torch.zeros(max(d_out, d_in), dtype=x.dtype)
    block = (ctypes.c_int64 * at.NUM_FIELDS)()
    block[at.KIND] = _KINDS[x.dtype]
    block[at.GRADS], block[at.GRAD_STRIDE] = grads.data_ptr(), grads.stride(0)
    block[at.X], block[at.X_STRIDE] = x.data_ptr(), x.stride(0)
    block[at.TOKENS], block[at.D_OUT], block[at.D_IN] = tokens, d_out, d_in
    block[at.INDEX], block[at.K] = index.data_ptr(), k
    block[at.PARTS], block[at.ZEROS] = parts.data_ptr(), zeros.data_ptr()
    wanted = 2 * torch.get_num_threads()  # pieces; each group of neurons turns x once more
    groups = max(1, min(-(-wanted // spans), d_out // _FEWEST_NEURONS))
    block[at.GROUP] = -(-d_out // groups // at.TILE) * at.TILE
    _Kernel(at.value_grad, block)(tokens * d_out)
    return parts[0] if spans == 1 else parts.sum(dim=0)


def supports_value_grad(grads: Tensor, x: Tensor, index: Tensor) -> bool:
    """Whether `value_grad` can run on these tensors: as `supports`, and not tiny ones."""
    return (
        supports(grads, x)
        and min(grads.shape[1], x.shape[1]) >= _SMALLEST
        and index.dtype == torch.int32
        and index.is_contiguous()
        and grads.stride(1) == x.stride(1) == 1
    )


def _run_on_entries(
    kernel: Any, weight: Tensor, positions: Tensor, values: Tensor, saved: Tensor
) -> None:
    at = _kernels()
    block = (ctypes.c_int64 * at.NUM_ENTRY_FIELDS)()
    block[at.KIND] = _KINDS[weight.dtype]
    block[at.WEIGHT], block[at.POSITIONS] = weight.data_ptr(), positions.data_ptr()
    block[at.VALUES], block[at.SAVED] = values.data_ptr(), saved.data_ptr()
    block[at.NUM_ENTRIES] = len(positions)
    _Kernel(kernel, block)(len(positions))


@cache
def _grad_kernels() -> Any:
    from neuroada_serve.ops import cpu_grad_kernels

    return cpu_grad_kernels


@cache
def _kernels() -> Any:
    try:
        from neuroada_serve.ops import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels


class _Kernel:
    """A kernel with its argument block, run in as many threads as torch uses."""

    def __init__(self, kernel: Any, block: Any) -> None:
        self._block = block  # kept alive, and its first field is the counter
        self._address = ctypes.addressof(block)
        self._function = kernel.ctypes
        self._function_address = kernel.address
        self._openmp = _openmp()

    def __call__(self, num_entries: int) -> None:
        self._block[0] = 0
        threads = torch.get_num_threads() if num_entries > THREADED_ENTRIES else 1
        if threads == 1 or self._openmp is None:
            self._function(self._address)
        else:
            self._openmp[0](self._function_address, self._address, threads, 0)


def has_team() -> bool:
    """Whether kernels can take over torch's OpenMP threads."""
    return _openmp() is not None


def run_team(kernel: Any, block: Any, barrier_field: int, threads: int) -> None:
    """Run a kernel whose threads wait for each other, by the barrier it finds in its block."""
    block[0] = 0
    openmp = _openmp()
    if threads == 1 or openmp is None:
        block[barrier_field] = 0
        kernel.ctypes(ctypes.addressof(block))
    else:
        parallel, barrier = openmp
        block[barrier_field] = barrier
        parallel(kernel.address, ctypes.addressof(block), threads, 0)


@cache
def _openmp() -> tuple[Any, int] | None:
    """Of the OpenMP library that torch runs on: GOMP_parallel(function, data, num_threads, flags),
    and the address of GOMP_barrier().
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
