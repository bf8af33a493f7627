"""Count answers that change when a prompt's beginning comes from the prefix cache.

The 200 tickets of `examples/data/tickets.csv` behind one system prompt, in turn on the base and
the shipped adapters, greedy, bfloat16, 16 at once: answered without a prefix cache, and again with
every beginning cached. Some are asked alone as well. As served by default, and with
`--deterministic`. Then what that costs: processor time of prompts and of decodes, both engines in
turn, medians.

Not measured: a GPU, HTTP.

    python -m bench.prefix_answers [MODEL] [--rounds 5] [--threads 1]
"""

import argparse
import csv
import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from bench.harness import ROOT, interleaved, new_parser, result_of, settings_of, write
from neuroada_serve import LLM, SamplingParams
from neuroada_serve.model.prompt import encode_chat
from neuroada_serve.request import RequestOutput

EXAMPLES = ROOT / "examples"
ADAPTERS = ("sql", "json", "pirate", "triage")
SYSTEM = (
    "You answer for the help desk of a shop that sells watches, phones and headphones. Read the "
    "ticket, say in one sentence what the customer wants, and name the team that should take "
    "it: billing, delivery, login, bug, praise or other. Be kind and "
    "short. Never promise a refund, a date or a discount; never ask for a "
    "password. If something is unclear, say what is missing."
)
BATCH = 16
CASES = {"default": False, "deterministic": True}
PROMPT_TOKENS = (16, 64, 256, 512)  # of one prompt alone
DECODES = (1, 4, 16)
DRAWN = (1000, 20000)  # token ids of those prompts


def main(argv: Sequence[str] | None = None) -> None:
    """Compare answers, then processor times."""
    parser = new_parser("prefix_answers", __doc__, rounds=5, seed=0)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--alone", type=int, default=20, help="of them, asked alone too")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = {
        "answers": {
            name: changed_answers(args, deterministic) for name, deterministic in CASES.items()
        },
        "cost": costs(args.model, args.rounds, args.seed),
    }
    write(result_of("prefix_answers", settings_of(args, batch=BATCH), found), args.out)


def new_llm(model: str, deterministic: bool, **config: Any) -> LLM:
    """LLM with the shipped adapters."""
    return LLM(
        model,
        {name: EXAMPLES / "adapters" / name for name in ADAPTERS},
        deterministic=deterministic,
        max_num_seqs=BATCH,
        **config,
    )


def questions(llm: LLM, count: int) -> list[list[int]]:
    """Token ids of chats that begin alike, one per ticket."""
    with open(EXAMPLES / "data" / "tickets.csv", newline="") as file:
        tickets = [row["ticket"] for row in csv.DictReader(file)][:count]
    system = {"role": "system", "content": SYSTEM}
    return [
        list(encode_chat(llm.engine.base, [system, {"role": "user", "content": ticket}]))
        for ticket in tickets
    ]


# --- answers -----------------------------------------------------------------------------------


def changed_answers(args: argparse.Namespace, deterministic: bool) -> dict[str, Any]:
    """Ask every prompt uncached, alone and cached; count answers that differ."""
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    uncached = new_llm(args.model, deterministic, prefix_cache_memory=0)
    prompts = questions(uncached, args.prompts)
    names = [(None, *ADAPTERS)[i % (len(ADAPTERS) + 1)] for i in range(len(prompts))]

    def ask(llm: LLM, params: SamplingParams) -> list[RequestOutput]:
        return llm.generate(prompts, params, names, use_tqdm=False)

    fresh = ask(uncached, params)
    alone = [
        uncached.generate([prompt], params, [name], use_tqdm=False)[0]
        for prompt, name in zip(prompts[: args.alone], names, strict=False)
    ]
    cached = new_llm(args.model, deterministic)
    ask(cached, SamplingParams(temperature=0, max_tokens=1))
    again = ask(cached, params)
    found = [answer.num_cached_tokens for answer in again]
    return {
        "asked": len(prompts),
        "prompt_tokens_mean": statistics.mean(map(len, prompts)),
        "cached_tokens_mean": statistics.mean(found),
        "with_cached_tokens": sum(n > 0 for n in found),
        "changed_by_the_cache": differing(fresh, again),
        "asked_alone": len(alone),
        "changed_alone": differing(fresh[: len(alone)], alone),
    }


def differing(some: Sequence[RequestOutput], others: Sequence[RequestOutput]) -> int:
    """Number of answers with other tokens."""
    pairs = zip(some, others, strict=True)
    return sum(a.outputs[0].token_ids != b.outputs[0].token_ids for a, b in pairs)


# --- cost --------------------------------------------------------------------------------------


def costs(model: str, rounds: int, seed: int) -> dict[str, Any]:
    """Processor milliseconds of a prompt's one token, and of a step of decodes."""
    llms = {name: new_llm(model, d, prefix_cache_memory=0) for name, d in CASES.items()}
    works = {f"prompt of {n}": (1, n, 1) for n in PROMPT_TOKENS}
    works |= {f"step of {n} decodes": (n, 1, 17) for n in DECODES}

    def run(work: str, name: str, number: int) -> float:
        count, length, tokens = works[work]
        draw = random.Random(f"{seed} {work} {number}")  # both have the same prompts
        prompts = [[draw.randrange(*DRAWN) for _ in range(length)] for _ in range(count)]
        names = [ADAPTERS[i % len(ADAPTERS)] for i in range(count)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start = time.process_time()
        llms[name].generate(prompts, params, names, use_tqdm=False)
        return 1e3 * (time.process_time() - start) / tokens

    ways = {(work, name): partial(run, work, name) for work in works for name in llms}
    taken = interleaved(ways, rounds, Console(stderr=True))
    return {
        work: {
            **{f"{name}_ms": statistics.median(taken[work, name]) for name in llms},
            "ratio": statistics.median(taken[work, "deterministic"])
            / statistics.median(taken[work, "default"]),
            "all_ms": {name: taken[work, name] for name in llms},
        }
        for work in works
    }


if __name__ == "__main__":
    main()
