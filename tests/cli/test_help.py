"""--help, --version and shell completion."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from neuroada_serve import __version__
from neuroada_serve.cli.help import EXAMPLES
from neuroada_serve.cli.main import app


def commands() -> dict[str, object]:
    """Every command that does something, by all its words."""
    found = {}
    for name, command in get_command(app).commands.items():
        nested = getattr(command, "commands", None)
        found |= {f"{name} {n}": c for n, c in nested.items()} if nested else {name: command}
    return found


def shown(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], terminal_width=78)  # of 80
    assert result.exit_code == 0
    return result.stdout


def test_version_is_the_packages():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"neuroada {__version__}\n")


@pytest.mark.parametrize("group", ["", "bench", "convert"])
def test_list_of_commands_cuts_no_sentence(group):
    listed = shown(*group.split()).partition("Commands:")[2]
    assert "..." not in listed
    assert all(name.split()[-1] in listed for name in commands() if name.split()[:-1] == [group])
    assert group or all(name.split()[0] in listed for name in commands())


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("serve", "Adapters, HTTP, Scheduling, Log, Model, Memory"),
        ("train", "Rows, What is trained, Steps, Memory and speed, Task, Results, Model"),
        ("eval", "Rows, Adapters, Scores, Model, Results"),
        ("bench throughput", "Load, Adapters, Engine, Peers"),
    ],
)
def test_flags_stand_in_their_groups(name, groups):
    text = shown(*name.split())
    order = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    order = [group for group in order if group not in ("Example", "Examples")]
    assert order == ["Arguments", *groups.split(", "), "Options"]
    alone = text.partition("\nOptions:\n")[2].partition("\nExample")[0]
    assert len(re.findall(r"^  -", alone, re.MULTILINE)) <= 3  # --help and little else


def test_every_command_shows_examples_that_its_flags_take():
    assert commands().keys() == EXAMPLES.keys()
    for name, command in commands().items():
        for example in EXAMPLES[name]:
            assert f"  {example}\n" in shown(*name.split())
            words = shlex.split(example)
            assert words[: 1 + len(name.split())] == ["neuroada", *name.split()]
            command.make_context(name, words[1 + len(name.split()) :])


def test_typo_is_told_what_was_meant():
    result = CliRunner().invoke(app, ["genrate"])
    assert result.exit_code == 2
    assert "generate" in result.stderr


def test_shell_completes_commands_and_flags():
    def completed(words: str) -> list[str]:
        given = {"_NEUROADA_COMPLETE": "complete_bash", "COMP_WORDS": words}
        code = "from neuroada_serve.cli.main import app; app(prog_name='neuroada')"
        count = str(len(words.split()) - (not words.endswith(" ")))
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | given | {"COMP_CWORD": count},
            capture_output=True,
            text=True,
        )
        return result.stdout.split()

    assert completed("neuroada ins") == ["inspect"]
    assert completed("neuroada serve --adapter-d") == ["--adapter-dir"]
