"""Time steps under the largest stop strings that are allowed.

--batch requests answer greedily, in turn without stop strings and with 16 of 1,024 characters each.
Two kinds: strings that the text never begins, and the worst ones: each request's own answer up to
another last character, so that all 16 match all the time and everything is held back. Rounds are
interleaved; a ratio is the median of the rounds' own ratios of median step times: of all steps, and
of the second half of the answers against the first. Not measured: HTTP, a GPU.

    python -m bench.stops [MODEL] [--batch 8] [--tokens 256] [--rounds 7]
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console

from bench.harness import interleaved, new_parser, ratio, result_of, settings_of, write
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import resolve_model
from neuroada_serve.request import MAX_STOP_CHARS, MAX_STOP_STRINGS, SamplingParams


@dataclass(frozen=True)
class Round:
    """Times of the decode steps of one run, in order, and the answers' texts."""

    steps_ms: list[float]
    texts: list[str]

    @property
    def median_ms(self) -> float:
        """Median step."""
        return statistics.median(self.steps_ms)

    @property
    def growth(self) -> float:
        """Median step of the second half, over that of the first."""
        half = len(self.steps_ms) // 2
        first, second = self.steps_ms[:half], self.steps_ms[half:]
        return statistics.median(second) / statistics.median(first)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the three kinds in turn."""
    parser = new_parser("stops", __doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args(argv)

    engine = Engine(
        load_base(resolve_model(args.model)), EngineConfig(prefix_cache_memory=0, max_num_seqs=64)
    )
    greedy = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    without = [greedy] * args.batch
    texts = _run(engine, without).texts
    kinds = {
        "never begun": [replace(greedy, stop=_unlike())] * args.batch,
        "always begun": [replace(greedy, stop=_almost(text)) for text in texts],
    }
    ways = {"none": without, **kinds}
    rounds = interleaved(
        {kind: partial(_run, engine, params) for kind, params in ways.items()},
        args.rounds,
        Console(stderr=True),
    )
    for kind in kinds:
        assert all(one.texts == texts for one in rounds[kind]), "a stop string changed the text"
    step_ms = {kind: [one.median_ms for one in found] for kind, found in rounds.items()}
    found = {
        "stops": [MAX_STOP_STRINGS, MAX_STOP_CHARS],
        "step_ms": step_ms,
        "growth": {
            kind: statistics.median(one.growth for one in found) for kind, found in rounds.items()
        },
        "ratio": {kind: ratio(step_ms[kind], step_ms["none"]) for kind in kinds},
    }
    for kind in kinds:
        text = f"{kind}: a step takes {found['ratio'][kind]:.3f} of its time without stop strings"
        Console(stderr=True).print(text)
    write(result_of("stops", settings_of(args), found), args.out)


def _unlike() -> list[str]:
    """Strings that no text begins."""
    return [chr(0x4E00 + i) * MAX_STOP_CHARS for i in range(MAX_STOP_STRINGS)]


def _almost(text: str) -> list[str]:
    """Strings that begin as the text does and differ after its end."""
    begun = text[: MAX_STOP_CHARS - 2]
    rest = "\u4e00" * (MAX_STOP_CHARS - 1 - len(begun))
    return [begun + rest + chr(0x4E01 + i) for i in range(MAX_STOP_STRINGS)]


def _run(engine: Engine, params: list[SamplingParams], number: int = 0) -> Round:
    """Answer all requests; every round is the same."""
    for i, one in enumerate(params):
        engine.add_request(f"r{i}", [100 + 7 * i, 300 + i, 28], one)
    texts = [""] * len(params)
    steps: list[float] = []
    while engine.has_unfinished:
        start = time.perf_counter()
        outputs = engine.step()
        steps.append(1e3 * (time.perf_counter() - start))
        for output in outputs:
            texts[int(output.request_id[1:])] += output.text
    return Round(steps[1:], texts)


if __name__ == "__main__":
    main()
