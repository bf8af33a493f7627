"""Read and write single entries of a weight matrix, by row-wise columns.

index_copy_ on the flat weight costs what the entries cost; scatter_ on a bf16 weight on CPU costs
what the whole matrix does, however few entries it writes.
"""

import torch
from torch import Tensor


def flat_positions(index: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Positions in weight.view(-1) of entry (i, index[i, j]).

    Args:
        index: [d_out, k] int32.
        weight: [d_out, d_in], or [d_in, d_out] with transposed (the layout of GPT-2's Conv1D).

    Returns:
        [d_out * k] int64, row by row.
    """
    rows = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    columns = index.long()
    stride = weight.shape[1]
    positions = columns * stride + rows if transposed else rows * stride + columns
    return positions.flatten()


def read_entries(weight: Tensor, positions: Tensor) -> Tensor:
    """weight.view(-1)[positions], a copy in weight's dtype."""
    return weight.detach().view(-1).index_select(0, positions)


def write_entries_(weight: Tensor, positions: Tensor, values: Tensor) -> None:
    """weight.view(-1)[positions] = values, in place; positions distinct, values in its dtype."""
    weight.detach().view(-1).index_copy_(0, positions, values)
