"""Swaps of the merged adapter: their time beside PEFT's, and whether the weights survive."""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.harness import interleaved, ratio
from bench.merge.engines import BATCH
from neuroada_serve.benchmark.adapters import save_random_lora
from neuroada_serve.benchmark.report import progress_bar
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import ModelSource

NUM_ROTATING = 64
LARGE_K = 8
SWAPPED = [
    *(f"k1-{number}" for number in range(NUM_ROTATING)),
    *(f"k{LARGE_K}-{number}" for number in range(BATCH + 1)),
]


def timed_ms(action: Callable[[], object]) -> float:
    """Milliseconds of a call."""
    started = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - started)


def swap(engine: Engine, source: ModelSource, rounds: int, console: Console) -> dict[str, Any]:
    """Milliseconds of every round; a swap of ours is the median of eight in a row."""
    peft = peft_model(source)

    def ours(kind: str, _: int) -> float:
        engine.adapters.merging.merge(f"{kind}-0")
        swaps = [partial(engine.adapters.merging.merge, f"{kind}-{i}") for i in range(1, 9)]
        eight = [timed_ms(action) for action in swaps]
        engine.adapters.merging.unmerge()
        return statistics.median(eight)

    def theirs(_: int) -> float:
        return timed_ms(peft.merge_adapter) + timed_ms(peft.unmerge_adapter)

    kinds = ("k1", f"k{LARGE_K}")
    ways: dict[str, Callable[[int], float]] = {kind: partial(ours, kind) for kind in kinds}
    times = interleaved({**ways, "peft": theirs}, rounds, console, "swap")
    peft_ms = times.pop("peft")
    return {
        "ours_ms": {kind: statistics.median(ours_ms) for kind, ours_ms in times.items()},
        "peft_lora_r8_ms": statistics.median(peft_ms),
        "times_faster": {kind: ratio(peft_ms, ours_ms) for kind, ours_ms in times.items()},
        "rounds": {"ours_ms": times, "peft_ms": peft_ms},
    }


def peft_model(source: ModelSource) -> Any:
    """The model in PEFT, with a random LoRA of rank 8."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load_base(source)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=base.dtype)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a name transformers gives up
        save_random_lora(base.spec, 8, 0, Path(folder) / "lora")
        return PeftModel.from_pretrained(
            model, str(Path(folder) / "lora"), autocast_adapter_dtype=False
        ).eval()


def rotations(engine: Engine, count: int, digest: str, console: Console) -> dict[str, Any]:
    """Swap over all adapters of k=1, with one of k=8 (another index) now and then."""
    started = time.perf_counter()
    with progress_bar(console) as progress:
        task = progress.add_task("rotations", total=count)
        for number in range(count):
            k = LARGE_K if number % 97 == 0 else 1
            engine.adapters.merging.merge(
                f"k{k}-{number % (BATCH if k == LARGE_K else NUM_ROTATING)}"
            )
            if number % 500 == 0:
                progress.update(task, completed=number, refresh=True)
    duration_s = time.perf_counter() - started
    while_merged = engine.base_digest()
    engine.adapters.merging.unmerge()
    return {
        "swaps": count,
        "adapters": NUM_ROTATING,
        "duration_s": duration_s,
        "digest_before": digest,
        "digest_while_merged_differs": while_merged != digest,
        "digest_after": engine.base_digest(),
        "bit_exact": engine.base_digest() == digest,
    }
