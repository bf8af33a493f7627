"""Set before any test imports torch: threads that wait should not spin for long, or they slow each
other down wherever the machine has other work (the command line does the same)."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# A shell starts what it runs in the background with Ctrl-C ignored, and so would all children be.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine, however busy: what fails here is the code.
settings.register_profile(
    "neuroada", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("neuroada")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
