"""Matthews' correlation."""

import pytest
import torch
import torch.nn.functional as F

from neuroada_serve.evaluation.matthews import matthews


@pytest.mark.parametrize(
    ("right", "chosen"),
    [
        ([0, 1, 1, 0, 1], [0, 1, 0, 0, 1]),
        ([0, 1, 2, 2, 1, 0], [2, 1, 2, 0, 1, 0]),
        ([0, 1, 1, 0], [1, 0, 0, 1]),
        ([0, 1, 1], [1, 1, 1]),
    ],
)
def test_matthews_is_the_correlation(right, chosen):
    labels = 1 + max(right)
    counts = [[0] * (labels + 1) for _ in range(labels)]
    for row, column in zip(right, chosen, strict=True):
        counts[row][column] += 1
    # the covariance of one-hot rows, as Gorodkin defines it
    x, y = (F.one_hot(torch.tensor(v), labels).double() for v in (right, chosen))
    x, y = x - x.mean(0), y - y.mean(0)
    spread = ((x * x).sum() * (y * y).sum()).sqrt()
    expected = ((x * y).sum() / spread).nan_to_num().item()
    assert matthews(counts) == pytest.approx(expected)
