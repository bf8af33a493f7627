"""Silence progress bars and warnings of other libraries."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

# On CPUs with AVX512-BF16 it warns when imported that a kernel to generate with, not to train with,
# would have to be downloaded; and transformers' Trainer imports it by way of peft where both are
# installed, quantized base or not.
_BITSANDBYTES_KERNELS = "bitsandbytes.backends.cpu.ops"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library while we report progress ourselves."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Silence the library's remarks on its CPU kernels while it is imported."""
    logger = logging.getLogger(_BITSANDBYTES_KERNELS)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
