"""Kill training at its n-th event and go on; run by train/test_crash.py in a process of its own.

An event is a step, a flush to disk or a rename. One process loads the base; every attempt is a fork
of it, so that a hundred take a minute. Prints one JSON object:
    events: of an uninterrupted run
    points: by kill point, whether the files that came out in the end were the uninterrupted ones

    python -m tests.support.crash_training FOLDER all|FIRST:STEP MAX_STEPS
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  # here once, rather than in every fork
import torch

from neuroada_serve.adapters import durable
from neuroada_serve.config import TrainConfig
from neuroada_serve.train import loop
from neuroada_serve.train.trainer import train_adapter
from tests.support.training import make_base

CONFIG = TrainConfig(
    k=2,
    save_steps=2,
    eval_steps=6,
    batch_size=3,
    gradient_accumulation=2,
    eval_fraction=0.25,
    lr=0.01,
)
ROWS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(24)]
FILES = ("adapter_model.safetensors", "adapter_config.json", "loss.jsonl", "README.md", "loss.png")


class Events:
    """Counts events; kills the process before number `last`."""

    def __init__(self, last: int | None) -> None:
        self.count, self._last = 0, last

    def __call__(self) -> None:
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def before(self, function):
        def wrapped(*args, **kwargs):
            self()
            return function(*args, **kwargs)

        return wrapped


def attempt(base, config: TrainConfig, out: Path, kill_at: int | None) -> int:
    """Train in a fork; the signal that ended it, or 0. Its number of events goes to a file."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return os.WTERMSIG(status)
        assert status == 0, "training failed"
        return 0
    try:
        events = Events(kill_at)
        durable.os.fsync = events.before(os.fsync)
        durable.os.replace = events.before(os.replace)
        loop._Callback.on_step_end = events.before(loop._Callback.on_step_end)
        train_adapter(base, out.with_name("rows.jsonl"), out, config)
        out.with_name("events").write_text(str(events.count))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def contents(out: Path) -> list[bytes]:
    assert not out.with_name(f"{out.name}.training").exists(), "checkpoints are left"
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    return [(out / name).read_bytes().replace(out.name.encode(), b"") for name in FILES[:4]]


def main() -> None:
    folder, which, max_steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)  # threads do not survive a fork
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    base = make_base(folder / "base", "gpt2", dropout=0.1)
    config = replace(CONFIG, max_steps=max_steps)
    whole = folder / "whole"
    assert attempt(base, config, whole, None) == 0
    expected, count = contents(whole), int((folder / "events").read_text())
    first, step = (0, 1) if which == "all" else map(int, which.split(":"))
    points = {}
    for n in range(first, count, step):
        out = folder / f"killed-{n}"
        assert attempt(base, config, out, n) == signal.SIGKILL
        again = attempt(base, config, out, n // 2)  # and once more on the way
        if again:
            assert attempt(base, config, out, None) == 0
        points[n] = contents(out) == expected
    print(json.dumps({"events": count, "points": points}))


if __name__ == "__main__":
    main()
