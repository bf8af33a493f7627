"""Workloads: adapters, arrival times and prompts of requests.

Pure functions of a seed: the same arguments give the same workload, for ours and for peers.
"""

import math
import random
from collections.abc import Sequence

from neuroada_serve.errors import UsageError

POPULARITIES = ("identical", "distinct", "uniform", "merged", "half-merged")
MERGED = frozenset({"merged", "half-merged"})  # adapter 0 is in the weights


def check_popularity(popularity: str) -> None:
    """Check the name of a distribution over adapters.

    Raises:
        UsageError: it is not one of POPULARITIES, nor zipf:A.
    """
    if popularity not in POPULARITIES and _zipf_exponent(popularity) is None:
        raise UsageError(
            f"popularity must be one of {', '.join(POPULARITIES)} or zipf:A with A above 0, got "
            f"{popularity!r}"
        )


def assign(
    popularity: str, num_requests: int, num_adapters: int, seed: int | str = 0
) -> list[int | None]:
    """Return the number of every request's adapter; None is the base.

    base: none. identical, merged: all use adapter 0. distinct: each its own, in turn if there are
    fewer adapters than requests. uniform: all equally likely. zipf:A: adapter i is drawn with a
    probability in proportion to 1 / (i + 1)**A. half-merged: every other request uses adapter 0,
    the rest the base.
    """
    if popularity == "base":
        return [None] * num_requests
    if popularity in ("identical", "merged"):
        return [0] * num_requests
    if popularity == "half-merged":
        return [0 if i % 2 == 0 else None for i in range(num_requests)]
    if popularity == "distinct":
        return [i % num_adapters for i in range(num_requests)]
    exponent = 0.0 if popularity == "uniform" else _zipf_exponent(popularity)
    assert exponent is not None, popularity
    weights = [(i + 1) ** -exponent for i in range(num_adapters)]
    drawn: list[int | None] = []
    drawn += random.Random(seed).choices(range(num_adapters), weights, k=num_requests)
    return drawn


def _zipf_exponent(popularity: str) -> float | None:
    kind, _, exponent = popularity.partition(":")
    try:
        value = float(exponent)
    except ValueError:
        return None
    return value if kind == "zipf" and 0 < value < math.inf else None


def arrivals(
    num_requests: int, request_rate: float, burstiness: float, seed: int | str = 0
) -> list[float]:
    """Return the time of each request, in seconds from the start.

    As in `vllm bench serve`: gaps are Gamma with shape `burstiness` and mean 1 / request_rate
    (shape 1 is a Poisson process), then stretched so that the last request always comes at
    num_requests / request_rate. An infinite rate sends all at once.
    """
    if math.isinf(request_rate):
        return [0.0] * num_requests
    generator = random.Random(seed)
    times, now = [], 0.0
    for _ in range(num_requests):
        now += (
            1.0
            if math.isinf(burstiness)
            else generator.gammavariate(burstiness, 1 / (request_rate * burstiness))
        )
        times.append(now)
    stretch = num_requests / request_rate / now
    return [time * stretch for time in times]


def random_prompts(
    num_prompts: int, length: int, token_ids: Sequence[int], seed: int | str = 0
) -> list[list[int]]:
    """Make prompts of ids drawn from `token_ids`."""
    generator = random.Random(seed)
    return [generator.choices(token_ids, k=length) for _ in range(num_prompts)]


def text_prompts(
    num_prompts: int, length: int, text_ids: Sequence[int], seed: int | str = 0
) -> list[list[int]]:
    """Cut prompts from one tokenised text, each at a place of its own, wrapping around at the end.

    Different beginnings keep prefix caches, ours and the peers', from saving work.
    """
    generator = random.Random(seed)
    starts = [generator.randrange(len(text_ids)) for _ in range(num_prompts)]
    return [[text_ids[(s + i) % len(text_ids)] for i in range(length)] for s in starts]
