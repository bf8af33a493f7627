"""Measure waiting: more adapters than fit, tenants that ask for too much, prompts that begin alike.

    turns      six adapters wanted at Poisson arrivals, at half of what 16 outstanding requests get
               answered, device room for three of them, and for all: time to first token (SGLang's
               case: median 83 ms, 99th percentile 39.5 s). 64 slots, since whoever waits for its
               turn keeps its own
    tenants    four tenants whose demands are 5:3:3:9, together twice what can be served, each above
               its share: tokens that each got, Jain's index of them, with equal shares, with shares
               2:1:1:1, and with equal shares and device room for three of the six adapters
    prefix     time to first token of a chat whose first 400 tokens, a system prompt, were computed
               for an earlier request of the same adapter, or were not

Not measured: a GPU, HTTP.

    python -m bench.sharing [MODEL] [--rounds 5]
"""

from collections.abc import Sequence

from rich.console import Console

from bench.harness import new_parser, result_of, settings_of, write
from bench.sharing.engines import BATCH, ROOM, TURN_SLOTS, WANTED
from bench.sharing.prefix import SYSTEM_TOKENS, prefix
from bench.sharing.report import plot, show
from bench.sharing.tenants import DEMANDS, tenants
from bench.sharing.turns import turns
from neuroada_serve.model.source import resolve_model


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the three parts, one after the other."""
    args = new_parser("sharing", __doc__, rounds=5).parse_args(argv)
    console = Console(stderr=True)
    source = resolve_model(args.model)
    found = {
        "turns": turns(source, args.rounds, console),
        "tenants": tenants(source, args.rounds, console),
        "prefix": prefix(source, args.rounds, console),
    }
    show(found, console)
    settings = settings_of(
        args,
        batch=BATCH,
        wanted=WANTED,
        room=ROOM,
        turn_slots=TURN_SLOTS,
        demands=DEMANDS,
        system_tokens=SYSTEM_TOKENS,
    )
    write(result_of("sharing", settings, found), args.out, plot)


if __name__ == "__main__":
    main()
