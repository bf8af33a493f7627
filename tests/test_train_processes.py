"""Several processes train what one trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from test_train import ROWS, make_base, write_rows

from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.train.loop import LengthGroupedBatches
from neuroada_serve.train.processes import Processes


def test_processes_deal_out_the_batches_of_one():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    whole = LengthGroupedBatches(lengths, 2, seed=1, multiple=4)
    parts = [LengthGroupedBatches(lengths, 2, 1, 2, Processes(rank, 2)) for rank in (0, 1)]
    for _ in range(2):  # passes
        batches = list(whole)
        dealt = [list(part) for part in parts]
        assert [batch for pair in zip(*dealt, strict=True) for batch in pair] == batches


_KILLED = """
import os, sys
from neuroada_serve.cli.main import main
from neuroada_serve.train.checkpoint import Checkpoints
save = Checkpoints.save
def save_and_die(self, checkpoint):
    save(self, checkpoint)
    if checkpoint.step == 4:
        os._exit(9)
Checkpoints.save = save_and_die
main()
"""


def launch(tmp_path: Path, out: str, processes: int, *options: str, start=("-m", "neuroada_serve")):
    """The processes of one training, each told its rank as a launcher tells it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *start, "train", str(tmp_path / "tiny")]
    command += ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / out)]
    command += ["--k", "2", "--max-steps", "6", "--batch-size", "2", "--eval-fraction", "0.25"]
    command += ["--eval-steps", "2", "--save-steps", "2", "--selection", "gradient", *options]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    for rank in range(processes):
        if processes > 1:
            shared |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        yield subprocess.Popen(command, env=os.environ | shared, stderr=subprocess.PIPE, text=True)


def train(tmp_path: Path, out: str, processes: int, *options: str) -> str:
    """What the first process said."""
    started = list(launch(tmp_path, out, processes, *options))
    said = [process.communicate(timeout=180)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, said
    return said[0]


def test_two_processes_train_what_one_does_also_when_interrupted(tmp_path):
    base = make_base(tmp_path / "tiny", "llama")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    train(tmp_path, "one", 1, "--gradient-accumulation", "4")
    said = train(tmp_path, "two", 2, "--gradient-accumulation", "2")
    assert "2 processes take 2 batches a step each" in said
    one, two = (load_adapter(tmp_path / name, base.spec) for name in ("one", "two"))
    assert two.config.metadata["recipe"]["processes"] == 2
    for name, part in one.modules.items():
        assert torch.equal(part.index, two.modules[name].index)
        torch.testing.assert_close(part.bypass, two.modules[name].bypass, rtol=0.02, atol=1e-4)
    assert not (tmp_path / "two.training").exists()

    options = ("--gradient-accumulation", "2")
    first, second = launch(tmp_path, "again", 2, *options, start=("-c", _KILLED))
    first.communicate(timeout=180)
    assert first.returncode == 9
    second.kill()  # as the launcher does
    second.communicate()
    assert "Going on from step 4" in train(tmp_path, "again", 2, *options)
    weights = [tmp_path / name / "adapter_model.safetensors" for name in ("two", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
