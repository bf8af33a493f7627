"""The `neuroada` command. Heavy imports wait until a command needs them."""

import os

from neuroada_serve.cli.common import app

# isort: off
from neuroada_serve.cli import serve, train, score, chat, ask, bench, convert  # noqa: F401  (help's order)
# isort: on

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    # OpenMP reads this when torch is imported. By default its threads spin for milliseconds while
    # they wait, which takes time from other work on the machine; sleeping at once costs even more
    # on an idle one. So they spin for about as long as Python needs between two operators:
    # bench/LOG.md.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
