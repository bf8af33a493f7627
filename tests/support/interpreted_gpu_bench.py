"""The GPU benchmark's attention kernels with toy sizes; run by test_gpu.py in a process of its own
(see interpreted_bypass.py)."""

import time

from bench.gpu.attention import TINY_ATTENTION, measure_attention
from bench.gpu.report import Report
from tests.support.triton_interpreter import DEVICE


def test_attention_kernels_are_measured_beside_what_they_replaced():
    report = Report(time.monotonic() + 500, DEVICE)
    measure_attention(report, TINY_ATTENTION)
    assert report.skipped == []
    assert len(report.checks) == 4
    assert all(report.checks.values())
    assert sorted(report.samples_ms) == sorted(
        f"{name}/{way}"
        for name, ways in {
            "attention/1x40": ("paged", "contiguous"),
            "attention/2x17": ("paged", "contiguous"),
            "chunk attention/20 after 0": ("paged", "SDPA on gathered", "SDPA alone"),
            "chunk attention/5 after 30": ("paged", "SDPA on gathered", "SDPA alone"),
        }.items()
        for way in ways
    )
    assert all(len(samples) == 2 for samples in report.samples_ms.values())
