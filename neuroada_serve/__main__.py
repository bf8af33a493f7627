"""python -m neuroada_serve is the neuroada command."""

from neuroada_serve.cli.main import main

main()
