"""What the largest stop strings that are allowed cost everybody's step.

--batch requests answer greedily, in turn without stop strings and with 16 of 1,024 characters each.
Two kinds: strings that the text never begins, and the worst ones: each request's own answer up to
another last character, so that all 16 match all the time and everything is held back. Rounds are
interleaved; a ratio is the median of the rounds' own ratios of median step times: of all steps, and
of the second half of the answers against the first. Writes stops.json to --out; the last line of
stdout is that JSON. Not measured: HTTP, a GPU.

    python bench/stops.py [MODEL] [--batch 8] [--tokens 256] [--rounds 7]
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuroada_serve.benchmark.report import environment
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
        return statistics.median(self.steps_ms)

    @property
    def growth(self) -> float:
        """Of the second half's steps against the first half's."""
        half = len(self.steps_ms) // 2
        first, second = self.steps_ms[:half], self.steps_ms[half:]
        return statistics.median(second) / statistics.median(first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()

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
    rounds: dict[str, list[Round]] = {"none": [], **{kind: [] for kind in kinds}}
    for _ in range(args.rounds):
        rounds["none"].append(_run(engine, without))
        for kind, params in kinds.items():
            rounds[kind].append(_run(engine, params))
            assert rounds[kind][-1].texts == texts, "a stop string stopped, or changed the text"
    result: dict[str, Any] = {
        "environment": environment(),
        "batch": args.batch,
        "tokens": args.tokens,
        "stops": [MAX_STOP_STRINGS, MAX_STOP_CHARS],
        "step_ms": {kind: [r.median_ms for r in found] for kind, found in rounds.items()},
        "growth": {
            kind: statistics.median(r.growth for r in found) for kind, found in rounds.items()
        },
        "ratio": {
            kind: statistics.median(
                ours.median_ms / base.median_ms
                for ours, base in zip(rounds[kind], rounds["none"], strict=True)
            )
            for kind in kinds
        },
    }
    for kind, ratio in result["ratio"].items():
        print(f"{kind}: a step takes {ratio:.3f} of its time without stop strings")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stops.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _unlike() -> list[str]:
    return [chr(0x4E00 + i) * MAX_STOP_CHARS for i in range(MAX_STOP_STRINGS)]


def _almost(text: str) -> list[str]:
    """Strings that begin as the text does and go on otherwise where it ends."""
    begun = text[: MAX_STOP_CHARS - 2]
    rest = "\u4e00" * (MAX_STOP_CHARS - 1 - len(begun))
    return [begun + rest + chr(0x4E01 + i) for i in range(MAX_STOP_STRINGS)]


def _run(engine: Engine, params: list[SamplingParams]) -> Round:
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
