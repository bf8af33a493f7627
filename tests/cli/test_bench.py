"""The command line of `neuroada bench`."""

import io
import math
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from neuroada_serve.benchmark import offline
from neuroada_serve.benchmark.report import plain, progress_bar
from neuroada_serve.benchmark.settings import ServingConfig
from neuroada_serve.cli.main import app
from tests.support.benchmark import run
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["throughput", "/no/such"], "/no/such"),
        (["throughput", "MODEL", "--concurrency", "0"], "concurrency"),
        (["throughput", "MODEL", "--concurrency", "many"], "--concurrency"),
        (["throughput", "MODEL", "--popularity", "zipf"], "zipf:A"),
        (["throughput", "MODEL", "--output-len", "1"], "--output-len"),
        (["throughput", "MODEL", "--peer", "hal"], "peft, vllm"),
        (["throughput", "MODEL", "--peer-python", "/no/python"], "/no/python"),
        (["latency", "MODEL", "--k", ""], "k must name"),
        (["latency", "MODEL", "--text-file", "/no/text"], "/no/text"),
        (["serving"], "--base-url"),
        (["serving", "--model", "MODEL", "--popularity", "merged"], "merged"),
        (["serving", "--model", "MODEL", "--goodput", "itl:5"], "ttft, tpot, e2el"),
        (["serving", "--model", "MODEL", "--lora-modules", "fr"], "--base-url"),
        (["serving", "--base-url", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_mistake_ends_with_one_sentence_and_code_2(model, args, word):
    result = run(*[arg.replace("MODEL", str(model.path)) for arg in args])
    assert result.exit_code == 2, result.output
    assert word in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.count("Error: ") == 1


def test_every_flag_has_help():
    commands = get_command(app).commands["bench"].commands
    assert set(commands) == {"throughput", "latency", "serving"}
    for name, command in commands.items():
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)


def test_document_is_plain_json():
    assert plain({"a": (math.inf, math.nan, Path("x"))}) == {"a": ["inf", None, "x"]}
    assert ServingConfig(model="demo").request_rate == math.inf


def test_progress_is_drawn_in_a_terminal_alone():
    terminal = offline.Console(file=io.StringIO(), force_terminal=True)
    log = offline.Console(file=io.StringIO(), force_terminal=False)
    for console in (terminal, log):
        with progress_bar(console) as progress:
            progress.update(progress.add_task("reading", total=2), completed=2, refresh=True)
    assert "reading" in terminal.file.getvalue()
    assert log.file.getvalue() == ""
