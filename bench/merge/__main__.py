"""Measure merging: the time of a swap, whether the weights survive, and when merging pays.

    swap       one merged adapter taking the place of another (k=1 and k=8, all projections), beside
               PEFT's merge_adapter + unmerge_adapter of a LoRA r=8 of the same modules, which is
               what a swap takes there; round by round in one process
    rotations  --rotations swaps over 64 adapters of two sizes, then unmerged: is the digest of all
               weights what it was
    costs      a decode step of 16 requests that differ, with nothing merged, with an adapter merged
               that none of them uses, and on the base with it merged: the constants of
               engine/merge_policy.py; an engine for each, in turn
    modes      never, one adapter kept merged, and auto, on loads of five adapters of one k: all
               requests for one (identical), nearly all (skewed), as often each (uniform), and
               nearly all for one that changes (shifting); 20 requests outstanding at all times.
               Three engines take a step each in turn, and each has the time of its own steps, so
               that all see the same machine

Not measured: a GPU.

    python -m bench.merge [MODEL] [--rounds 7] [--rotations 10000]
"""

from collections.abc import Sequence

import torch
from rich.console import Console

from bench.harness import new_parser, result_of, settings_of, write
from bench.merge.costs import costs
from bench.merge.engines import new_engine
from bench.merge.modes import modes
from bench.merge.report import plot, show
from bench.merge.swap import SWAPPED, rotations, swap
from neuroada_serve.model.source import resolve_model

MODE_KS = (8, 20)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure all parts; end with an error where unmerging has changed a weight."""
    parser = new_parser("merge", __doc__)
    parser.add_argument("--rotations", type=int, default=10_000)
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    source = resolve_model(args.model)
    engine = new_engine(source, SWAPPED)
    digest = engine.base_digest()
    found = {
        "swap": swap(engine, source, args.rounds, console),
        "rotations": rotations(engine, args.rotations, digest, console),
        "costs": {f"k={k}": costs(source, k, args.rounds, console) for k in MODE_KS},
        "modes": {f"k={k}": modes(source, k, args.rounds, console) for k in MODE_KS},
    }
    engine.adapters.merging.unmerge()
    assert engine.base_digest() == digest
    show(found, console)
    write(result_of("merge", settings_of(args), found), args.out, plot)


if __name__ == "__main__":
    main()
