"""Measure thousands of adapters: start, throughput, memory, the first token of a cold one.

Makes --counts adapters (k=1, all projections, random values) in a folder and measures

    start        a server process, from its call to the first answer, with each number of adapters
    throughput   requests at Poisson arrivals, faster than they can be served, adapters drawn by
                 Zipf-1.5 from all that are registered, which are read from disk when they are first
                 asked for; beside them one adapter for all, and 16 on the device, each request its
                 own. Every round runs all cases; a round's ratio is to its own cases
    memory       of the process, per adapter on the device
    cold         time to first token of one request whose adapter is on the device, in host memory
                 or on disk (once in the page cache, once not), on an idle engine and beside 15
                 requests that run; through the worker thread that serves HTTP, without HTTP

Not measured: a GPU, HTTP, other sizes of k.

    python -m bench.adapters [MODEL] [--counts 1,10,1000,10000] [--folder DIR] [--rounds 5]
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.adapters.cold import cold
from bench.adapters.files import BATCH, PROMPT_LEN, make_adapters, subset
from bench.adapters.report import plot, show
from bench.adapters.start import memory, start
from bench.adapters.throughput import OUTPUT_LEN, POPULARITY, throughput
from bench.harness import new_parser, result_of, settings_of, write
from neuroada_serve.model.source import resolve_model
from neuroada_serve.options import integers


def main(argv: Sequence[str] | None = None) -> None:
    """Make the adapters, then measure the four parts."""
    parser = new_parser("adapters", __doc__, rounds=5)
    parser.add_argument("--counts", type=integers, default=(1, 10, 1000, 10000))
    parser.add_argument("--folder", type=Path, help="keep the adapters there; default: nowhere")
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--probes", type=int, default=25)
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    args.counts = sorted(args.counts)
    most = args.counts[-1]
    source = resolve_model(args.model)

    with tempfile.TemporaryDirectory(prefix="neuroada-bench-") as scratch:
        root = args.folder or Path(scratch)
        make_adapters(source, root, most, console)
        folders = {count: subset(root, count) for count in args.counts}
        found = {
            "start": [start(args.model, folders[count], count) for count in args.counts],
            "throughput": throughput(source, folders, args.rounds, args.requests, console),
            "memory": memory(source, folders[most], most, console),
            "cold": cold(source, folders[most], args.probes, console),
        }
    show(found, console)
    settings = settings_of(
        args,
        popularity=POPULARITY,
        batch=BATCH,
        prompt_len=PROMPT_LEN,
        output_len=OUTPUT_LEN,
    )
    write(result_of("adapters", settings, found), args.out, plot)


if __name__ == "__main__":
    main()
