"""Merge modes on several loads: never, one adapter kept merged, and auto."""

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from bench.harness import ratio
from bench.merge.engines import BATCH, PROMPT_LEN, new_engine
from neuroada_serve.benchmark.report import progress_bar
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.source import ModelSource
from neuroada_serve.request import SamplingParams

OUTPUT_LEN = 48
NUM_REQUESTS = 144
OUTSTANDING = BATCH + 4
MODE_ADAPTERS = 5
MODES = ("never", "named", "auto")
LOADS = ("identical", "skewed", "uniform", "shifting")
POPULAR = 0.9  # share of the popular adapter in skewed and shifting
SHIFTS = 3


def modes(source: ModelSource, k: int, rounds: int, console: Console) -> dict[str, Any]:
    """Measure tokens per second of every mode on every load; ratios within a round."""
    names = [f"k{k}-{number}" for number in range(MODE_ADAPTERS)]
    engines = {mode: new_engine(source, names) for mode in MODES}
    rates: dict[str, dict[str, list[float]]]
    rates = {load: {mode: [] for mode in MODES} for load in LOADS}
    switches: dict[str, list[int]] = {load: [] for load in LOADS}
    with progress_bar(console) as progress:
        task = progress.add_task(f"modes, k={k}", total=rounds * len(LOADS))
        for number in range(rounds):
            for load in LOADS:
                for mode, engine in engines.items():
                    engine.adapters.merging.unmerge()
                    engine.adapters.merging.set_mode(names[0] if mode == "named" else mode)
                metrics = engines["auto"].metrics
                before = metrics.num_merges + metrics.num_unmerges
                for mode, rate in side_by_side(engines, load_of(load, names, number)).items():
                    rates[load][mode].append(rate)
                switches[load].append(metrics.num_merges + metrics.num_unmerges - before)
                progress.update(task, advance=1, refresh=True)

    def of_auto(by_mode: dict[str, list[float]], other: str) -> float:
        return ratio(by_mode["auto"], by_mode[other])

    return {
        load: {
            "tokens_per_s": {mode: statistics.median(found) for mode, found in by_mode.items()},
            "auto_to_never": of_auto(by_mode, "never"),
            "auto_to_named": of_auto(by_mode, "named"),
            "auto_to_better_fixed": min(of_auto(by_mode, "never"), of_auto(by_mode, "named")),
            "auto_switches": switches[load],
            "rounds": by_mode,
        }
        for load, by_mode in rates.items()
    }


class ClosedLoop:
    """Engine that answers a list of requests, a fixed number of them outstanding."""

    def __init__(self, engine: Engine, adapters: Sequence[str]) -> None:
        self.engine = engine
        self.num_tokens = self.seconds = 0.0
        self._adapters = adapters
        self._prompts = random_prompts(len(adapters), PROMPT_LEN, range(1000), "modes")
        self._sent = self._ended = 0

    @property
    def has_ended(self) -> bool:
        """All requests are answered."""
        return self._ended == len(self._adapters)

    def step(self) -> None:
        """Add requests up to that number and take one step; only this is timed."""
        params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
        started = time.perf_counter()
        while self._sent < len(self._adapters) and self._sent - self._ended < OUTSTANDING:
            name, prompt = self._adapters[self._sent], self._prompts[self._sent]
            self.engine.add_request(f"m{self._sent}", prompt, params, name)
            self._sent += 1
        outputs = self.engine.step()
        self.seconds += time.perf_counter() - started
        for output in outputs:
            assert output.error is None, output.error
            self.num_tokens += len(output.token_ids)
            self._ended += output.finished


def side_by_side(engines: dict[str, Engine], adapters: Sequence[str]) -> dict[str, float]:
    """Step every engine in turn until all have answered: tokens per second of each."""
    loops = {mode: ClosedLoop(engine, adapters) for mode, engine in engines.items()}
    while not all(loop.has_ended for loop in loops.values()):
        for loop in loops.values():
            if not loop.has_ended:
                loop.step()
    return {mode: loop.num_tokens / loop.seconds for mode, loop in loops.items()}


def load_of(load: str, names: Sequence[str], seed: int) -> list[str]:
    """Draw the adapter of every request, in the order they come."""
    draw = random.Random(f"{load} {seed}")
    chosen = []
    for i in range(NUM_REQUESTS):
        favourite = 0 if load != "shifting" else i * SHIFTS // NUM_REQUESTS
        if load == "identical" or (load != "uniform" and draw.random() < POPULAR):
            chosen.append(favourite)
        else:
            chosen.append(draw.randrange(len(names)))
    return [names[number] for number in chosen]
