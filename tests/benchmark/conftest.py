"""Fixtures of the benchmarks' tests."""

import pytest
import torch

from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)
