"""Settings of benchmarks as text."""

import pytest

from neuroada_serve.benchmark.settings import parse_goodput
from neuroada_serve.errors import UsageError


def test_goodput_is_read_as_vllm_writes_it():
    assert parse_goodput(["ttft:500 tpot:50"]) == (("ttft", 500), ("tpot", 50))
    assert parse_goodput(["ttft:500", "e2el:9,tpot:1"]) == (("ttft", 500), ("e2el", 9), ("tpot", 1))
    for wrong in ("ttft", "ttft:x", "ttft:0", "itl:5"):
        with pytest.raises(UsageError, match="ttft, tpot, e2el"):
            parse_goodput([wrong])
