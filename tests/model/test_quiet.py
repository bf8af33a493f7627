"""Chatter of other libraries, which is silenced."""

import logging
import subprocess
import sys
from importlib.util import find_spec

import pytest

from neuroada_serve.model.quiet import quiet_bitsandbytes


def test_importing_the_trainer_says_nothing():
    if find_spec("peft") is None or find_spec("bitsandbytes") is None:
        pytest.skip("peft brings bitsandbytes in, where both are installed")
    command = [sys.executable, "-c", "import neuroada_serve.train.loop"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stderr == ""


def test_bitsandbytes_is_heard_again_afterwards(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with quiet_bitsandbytes():
        logger.warning("no kernel")
    logger.warning("something else")
    assert caplog.messages == ["something else"]
