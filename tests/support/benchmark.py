"""Runs of `neuroada bench` in this process."""

import json

import torch
from typer.testing import CliRunner

from neuroada_serve.benchmark.cases import Work
from neuroada_serve.benchmark.workload import (
    MERGED,
    assign,
    random_prompts,
)
from neuroada_serve.cli.main import app
from neuroada_serve.ops.bypass import bypass_add_

SMALL = ["--output-len", "3", "--prompt-len", "5", "--rounds", "2", "--k", "1,2"]


def run(*args: object):
    return CliRunner().invoke(app, ["bench", *(str(a) for a in args), "--json"])


def document(result) -> dict:
    """The last line of stdout."""
    return json.loads(result.stdout.splitlines()[-1])


def works(popularity: str, k: int | None = 2) -> list[Work]:
    prompts = random_prompts(3, 5, range(256), 1)
    adapters = tuple(assign(popularity, 3, 3))
    return [Work(tuple(map(tuple, prompts)), adapters, 4, k, merged=popularity in MERGED)]


def halves_the_values(y, x, table, token_slots):
    whole = torch.zeros_like(y)
    bypass_add_(whole, x, table, token_slots)
    y += whole / 2
