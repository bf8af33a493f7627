"""The `neuroada` command. Heavy imports wait until a command needs them."""

import os

from neuroada_serve.cli.common import app

# isort: off
from neuroada_serve.cli import serve, train, score, chat, ask, bench, convert  # noqa: F401  (help's order)
# isort: on

__all__ = ["app", "main"]


def main() -> None:
    """Console entry point."""
    # Read by OpenMP when torch is imported. Its threads otherwise spin for milliseconds while they
    # wait, which beside other work takes the time from each other; putting them to sleep at once
    # costs more still on an idle machine. So they spin for about as long as Python needs between
    # two operators: bench/LOG.md.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
