"""A training run that is cut short, and goes on."""

import pytest

from neuroada_serve.train.loop import Loop
from neuroada_serve.train.trainer import train_adapter

_AT = 3  # the checkpoint that is not written any more


def train_interrupted(base, data, out, config, monkeypatch):
    """Train up to the third checkpoint, end there, and train on in a second call."""
    taken, calls = Loop.checkpoint, []

    def cut_short(self):
        calls.append(self.done)
        if len(calls) == _AT:
            raise KeyboardInterrupt
        return taken(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "checkpoint", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train_adapter(base, data, out, config)
    told = []
    train_adapter(base, data, out, config, told.append)
    resumed = f"Resuming from step {calls[_AT - 2]}"
    assert any(sentence.startswith(resumed) for sentence in told)
