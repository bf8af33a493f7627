"""Several processes train what one trains."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.train.loop import LengthGroupedBatches
from neuroada_serve.train.processes import Processes
from tests.support.training import ROWS, make_base, write_rows


def test_processes_deal_out_the_batches_of_one():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    whole = LengthGroupedBatches(lengths, 2, seed=1, multiple=4)
    parts = [LengthGroupedBatches(lengths, 2, 1, 2, Processes(rank, 2)) for rank in (0, 1)]
    for _ in range(2):  # passes
        batches = list(whole)
        dealt = [list(part) for part in parts]
        assert [batch for pair in zip(*dealt, strict=True) for batch in pair] == batches


# One process imports everything; each that trains is a fork of it, with its rank from a launcher.
_FORKS = """
import json, os, signal, sys
import matplotlib.backends.backend_agg
import torch
from neuroada_serve.cli.main import main
from neuroada_serve.train import loop, plot, trainer
from neuroada_serve.train.checkpoint import Checkpoints

torch.set_num_threads(1)  # threads do not survive a fork
save = Checkpoints.save

def save_and_die(self, checkpoint):
    save(self, checkpoint)
    if checkpoint.step == 4:
        os._exit(9)

def fork(rank, environment, said, killed, arguments):
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    told = os.open(f"{said}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(told, 1)
    os.dup2(told, 2)
    if killed and rank == 0:
        Checkpoints.save = save_and_die
    sys.argv = ["neuroada", "train", *arguments]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code)

for line in sys.stdin:
    environments, said, killed, arguments = json.loads(line)
    children = [fork(i, e, said, killed, arguments) for i, e in enumerate(environments)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])]
    for child in children[1:]:
        if killed:
            os.kill(child, signal.SIGKILL)  # as the launcher does
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    command = [sys.executable, "-c", _FORKS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield process
        process.stdin.close()


def launch(
    forks: subprocess.Popen, folder: Path, out: str, processes: int, accumulation: int, killed=False
) -> tuple[list[int], str]:
    """Exit codes of the processes of one training, and what the first said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(folder / "tiny"), "--data", str(folder / "rows.jsonl")]
    arguments += ["--out", str(folder / out), "--gradient-accumulation", str(accumulation)]
    arguments += ["--k", "2", "--max-steps", "6", "--batch-size", "2", "--eval-fraction", "0.25"]
    arguments += ["--eval-steps", "2", "--save-steps", "2", "--selection", "gradient"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        for rank in range(processes)
    ]
    environments = ranks if processes > 1 else [{}]
    order = [environments, str(folder / "said"), killed, arguments]
    forks.stdin.write(json.dumps(order) + "\n")
    forks.stdin.flush()
    codes = json.loads(forks.stdout.readline())
    return codes, (folder / "said.0").read_text()


def train(forks: subprocess.Popen, folder: Path, out: str, processes: int, each: int) -> str:
    """Return what the first process printed."""
    codes, said = launch(forks, folder, out, processes, each)
    assert codes == [0] * processes, said
    return said


@pytest.mark.timeout(600)
def test_two_processes_train_what_one_does_also_when_interrupted(forks, tmp_path):
    base = make_base(tmp_path / "tiny", "llama")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    train(forks, tmp_path, "one", 1, 4)
    said = train(forks, tmp_path, "two", 2, 2)
    assert "Each of 2 processes takes 2 batches a step" in said
    one, two = (load_adapter(tmp_path / name, base.spec) for name in ("one", "two"))
    assert two.config.metadata["recipe"]["processes"] == 2
    for name, part in one.modules.items():
        assert torch.equal(part.index, two.modules[name].index)
        torch.testing.assert_close(part.bypass, two.modules[name].bypass, rtol=0.02, atol=1e-4)
    assert not (tmp_path / "two.training").exists()

    codes, _ = launch(forks, tmp_path, "again", 2, 2, killed=True)
    assert codes[0] == 9
    assert codes[1] in (1, -signal.SIGKILL)  # it notices that its peer is gone, or is killed first
    assert "Resuming from step 4" in train(forks, tmp_path, "again", 2, 2)
    weights = [tmp_path / name / "adapter_model.safetensors" for name in ("two", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
