"""`bypass_add_` on the CPU, by the kernel of `cpu_kernels.py`."""

import ctypes
from functools import cache

from torch import Tensor

from neuroada_serve.ops import cpu_team
from neuroada_serve.ops.cpu_blocks import BypassBlock, LanesBlock, TableBlock


def bypass_add_cpu_(y: Tensor, x: Tensor, table: TableBlock, lanes: LanesBlock) -> None:
    """Add a table's values to y [num_tokens, d_out]; rows of x and y contiguous, wherever they
    begin, in the table's dtype."""
    table_at, lanes_at = ctypes.addressof(table), ctypes.addressof(lanes)
    strides = (y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[1])
    _kernel()(BypassBlock(0, table_at, lanes_at, *strides), lanes.num_lanes * table.d_out * table.k)


@cache
def _kernel() -> cpu_team.TeamKernel:
    return cpu_team.TeamKernel(cpu_team.kernels().bypass_add)
