"""Process of bench/contexts.py: decode steps of one checkout on running sequences.

It imports the checkout that PYTHONPATH names, and nothing else of this folder. One JSON document
per line each way:

    in   {"root", "model", "threads", "most_requests", "most_tokens"}
    out  {"commit", "modified", "threads", "vocab"}
    in   {"prompts": token ids of each request}       aborts what runs, and computes these prompts
    out  {}
    in   {"steps": number}
    out  {"step_ms": median}      or {"error": "..."}
"""

import json
import statistics
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer lines until the input ends."""
    setup = json.loads(sys.stdin.readline())
    import neuroada_serve

    root = Path(setup["root"])
    found = Path(neuroada_serve.__file__).parent.parent
    if found != root:
        raise SystemExit(f"imported from {found}, not from {root}")

    import torch

    from neuroada_serve.benchmark.report import environment
    from neuroada_serve.config import EngineConfig
    from neuroada_serve.engine.engine import Engine
    from neuroada_serve.model.loader import load_base
    from neuroada_serve.model.source import resolve_model

    if setup["threads"] is not None:
        torch.set_num_threads(setup["threads"])
    base = load_base(resolve_model(setup["model"]))
    config = EngineConfig(
        max_num_seqs=setup["most_requests"],
        max_model_len=min(setup["most_tokens"], base.max_model_len),
        max_num_batched_tokens=512,
        prefix_cache_memory=0,
    )
    engine = Engine(base, config)
    facts = environment()
    vocab = int(base.model.config.get_text_config().vocab_size)
    say(
        {
            "commit": facts["commit"],
            "modified": facts["modified"],
            "threads": torch.get_num_threads(),
            "vocab": vocab,
        }
    )
    names: list[str] = []
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            if "prompts" in asked:
                names = restart(engine, names, asked["prompts"])
                say({})
            else:
                say({"step_ms": statistics.median(timed(engine) for _ in range(asked["steps"]))})
        except Exception:
            say({"error": traceback.format_exc()})


def restart(engine: Any, names: list[str], prompts: list[list[int]]) -> list[str]:
    """Abort what runs, start these prompts, and step until all have a token; return their names."""
    from neuroada_serve.request import SamplingParams

    for name in names:
        engine.abort(name)
    engine.step()  # hands out their final outputs
    assert not engine.has_unfinished
    names = [str(number) for number in range(len(prompts))]
    waiting = set(names)
    for name, prompt in zip(names, prompts, strict=True):
        left = engine.max_model_len - len(prompt)
        params = SamplingParams(temperature=0, max_tokens=left, ignore_eos=True)
        engine.add_request(name, prompt, params)
    # In whole chunks, so that the first ones get no further than they must meanwhile.
    pace = getattr(engine, "pace", None)  # older checkouts have none
    with nullcontext() if pace is None else pace.unbounded():
        while waiting:
            for output in engine.step():
                assert not output.finished, "ended before all prompts were computed"
                waiting.discard(output.request_id)
    return names


def timed(engine: Any) -> float:
    """Milliseconds of one step."""
    started = time.perf_counter()
    outputs = engine.step()
    took_ms = 1e3 * (time.perf_counter() - started)
    assert not any(output.finished for output in outputs), "ended while it was timed"
    return took_ms


def say(document: dict[str, Any]) -> None:
    """Answer one line."""
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main()
