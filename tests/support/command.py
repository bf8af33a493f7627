"""Run `neuroada` in this process."""

from typer.testing import CliRunner

from neuroada_serve.cli.main import app


def run(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])
