"""python -m neuroada_serve is the neuroada command."""

from neuroada_serve.cli import main

main()
