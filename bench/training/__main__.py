"""Measure a training step: time and peak memory of ours beside other ways to train.

    neuroada    values inside the weights (train/inplace.py), the output head at the answers alone
    official    the authors' forward: every weight a scatter_add of its values, autograd through it
    mask        the weights themselves are trained, their gradients masked to the same entries
    lora        PEFT, rank by parameters closest to k=8's; and r=1, PEFT's smallest
    shira       PEFT's sparse tuner, r=1
    full        full fine-tuning

All methods take the same batch of random tokens, of which the last quarter of each row is trained
on, and AdamW. Those that are not ours take the loss as transformers computes it from its labels;
"all positions" gives ours that loss too. "recompute" drops what is cheap to compute again
(train/recompute.py), and "compiled" has torch.compile take each decoder layer.

On the CPU, one process per method: methods take their steps in turn, round by round, so that all
see the same machine. The peak is that of the resident set above what was there once model and
method were loaded, over two steps of another process, whose freed memory goes back at once. On
CUDA (--llama-8b: random weights of Llama-3-8B's shape in bf16), one after the other in this
process, by the allocator's peak.

Writes training.json (training_gpu.json) and a plot. Not measured: quality (bench/quality), several
GPUs, quantized bases.

    python -m bench.training [MODEL] [--rounds 9] [--dtype bfloat16]
    python -m bench.training --llama-8b [--minutes 3]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from bench.harness import RESULTS, new_parser, result_of, write
from bench.training.check import check
from bench.training.cpu import measure_cpu, work
from bench.training.cuda import measure_cuda
from bench.training.methods import ANSWER_SHARE, CPU_METHODS, GPU_METHODS, Method
from bench.training.report import plot, show, summary


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 1 where a gradient is wrong."""
    parser = new_parser("training", __doc__)
    parser.set_defaults(out=None)
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, float32, bfloat16")
    parser.add_argument("--rows", type=int, help="rows per batch; 4, or 8 on CUDA")
    parser.add_argument("--width", type=int, help="tokens per row; 128, or 512 on CUDA")
    parser.add_argument("--llama-8b", action="store_true", help="that shape, on --device")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="with --llama-8b, to try the script")
    parser.add_argument("--minutes", type=float, default=5, help="with --llama-8b, when to stop")
    parser.add_argument("--no-check", action="store_true", help="leave the gradients unchecked")
    parser.add_argument("--only", default="", help="methods, by name, separated by semicolons")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    chosen = GPU_METHODS if args.llama_8b else CPU_METHODS
    wanted = {name for name in args.only.split(";") if name}
    if unknown := wanted - {method.name for method in chosen}:
        parser.error(f"unknown methods {unknown}; known: {[method.name for method in chosen]}")
    args.methods = [method for method in chosen if not wanted or method.name in wanted]
    args.rows = args.rows or (8 if args.llama_8b else 4)
    args.width = args.width or (512 if args.llama_8b else 128)
    if args.work:
        work(args.model, Method(**json.loads(args.work)), args.dtype, args.rows, args.width)
        return 0
    console = Console(stderr=True, width=140)
    checks = {} if args.no_check else check(args.device if args.llama_8b else "cpu", args.methods)
    console.print("errors of gradients", checks)
    measure: Callable[..., dict[str, Any]] = measure_cuda if args.llama_8b else measure_cpu
    methods = measure(args, console)
    made = summary(methods)
    show(methods, made, console)
    settings = {
        "model": "random, Llama-3-8B's shape" if args.llama_8b else args.model,
        "dtype": "bfloat16" if args.llama_8b else args.dtype,
        "rows": args.rows,
        "width": args.width,
        "answer_share": ANSWER_SHARE,
        "threads": torch.get_num_threads(),
    }
    found = {"checks": checks, "methods": methods, "summary": made}
    out = args.out or RESULTS / ("training_gpu.json" if args.llama_8b else "training.json")
    write(result_of("training", settings, found), out, plot)
    return 0 if all(one["ok"] for one in checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
