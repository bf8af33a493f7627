"""Cases of a benchmark, and their work in one round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from neuroada_serve.benchmark.settings import OfflineConfig
from neuroada_serve.benchmark.workload import MERGED, assign, random_prompts, text_prompts


@dataclass(frozen=True)
class Case:
    """One kind of work to measure.

    phase: decode (short prompts, all at once), prefill (one long prompt, one new token) or latency
        (requests in groups of `concurrency`, one group after the other).
    k: of our adapters; None on the base, and on peers, whose adapters have a LoRA rank.
    """

    phase: str
    concurrency: int
    popularity: str  # base, or as in workload.assign
    k: int | None = None

    @property
    def base(self) -> "Case":
        """The same work without adapters."""
        return replace(self, popularity="base", k=None)

    @property
    def on_peer(self) -> "Case":
        """The same work on a peer, whose adapters have no k."""
        return replace(self, k=None)

    @property
    def label(self) -> str:
        """Description of the case, without phase and concurrency."""
        return self.popularity if self.k is None else f"{self.popularity}, k={self.k}"


@dataclass(frozen=True)
class Work:
    """The work of one call of an engine: one request per prompt, all submitted at once.

    adapters: number of each request's adapter; None is the base.
    merged: adapter 0 is merged into the weights during the call.
    """

    prompts: tuple[tuple[int, ...], ...]
    adapters: tuple[int | None, ...]
    output_len: int
    k: int | None = None
    merged: bool = False


def throughput_cases(config: OfflineConfig) -> list[Case]:
    """Return decode cases at every concurrency, and prefill of one request on base and adapter."""
    cases = []
    for concurrency in config.concurrency:
        cases += _with_adapters("decode", concurrency, config.popularity, config.k)
    if config.prefill_len:
        cases += _with_adapters("prefill", 1, ("identical",), config.k)
    return cases


def latency_cases(config: OfflineConfig) -> list[Case]:
    cases = []
    for concurrency in config.concurrency:
        cases += _with_adapters("latency", concurrency, config.popularity, config.k)
    return cases


def _with_adapters(
    phase: str, concurrency: int, popularities: Sequence[str], ks: Sequence[int]
) -> list[Case]:
    cases = [Case(phase, concurrency, "base")]
    for popularity in dict.fromkeys(popularities):
        cases += [Case(phase, concurrency, popularity, k) for k in dict.fromkeys(ks)]
    return cases


def num_adapters_needed(config: OfflineConfig) -> int:
    """Return how many adapters of each k the cases need; at least two, to swap them."""
    needed = 2
    for popularity in config.popularity:
        if popularity == "distinct":
            needed = max(needed, *config.concurrency)
        elif popularity != "identical" and popularity not in MERGED:
            needed = max(needed, config.num_adapters)
    return needed


class Workload:
    """Makes the work of cases. All cases of one phase, concurrency and round share their prompts.

    Args:
        token_ids: ids that random prompts draw from.
        text_ids: a tokenised text to cut prompts from instead.
    """

    def __init__(
        self, config: OfflineConfig, token_ids: Sequence[int], text_ids: Sequence[int] | None
    ) -> None:
        self._config = config
        self._token_ids = token_ids
        self._text_ids = text_ids
        self._num_adapters = num_adapters_needed(config)

    def works(self, case: Case, round_number: int) -> list[Work]:
        """Return the calls of one case in one round, in order."""
        config = self._config
        prefill = case.phase == "prefill"
        length = config.prefill_len if prefill else config.prompt_len
        total = config.num_prompts if case.phase == "latency" else case.concurrency
        seed = f"{config.seed} {case.phase} {case.concurrency} {round_number}"
        prompts = (
            random_prompts(total, length, self._token_ids, seed)
            if self._text_ids is None
            else text_prompts(total, length, self._text_ids, seed)
        )
        adapters = assign(case.popularity, total, self._num_adapters, seed)
        return [
            Work(
                prompts=tuple(map(tuple, prompts[start : start + case.concurrency])),
                adapters=tuple(adapters[start : start + case.concurrency]),
                output_len=1 if prefill else config.output_len,
                k=case.k,
                merged=case.popularity in MERGED,
            )
            for start in range(0, total, case.concurrency)
        ]
