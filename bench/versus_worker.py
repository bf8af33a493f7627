"""Process of bench/versus.py: run cases of `neuroada bench throughput` in one checkout.

It imports the checkout that PYTHONPATH names, and nothing else of this folder. One JSON document
per line each way:

    in   {"root", "model", "config": fields of OfflineConfig}
    out  {"commit", "modified", "threads", "cases": [label, ...]}
    in   {"case": number, "round": number}
    out  {figure: value, ...}      or {"error": "..."}
"""

import json
import sys
import time
import traceback
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

    from neuroada_serve.benchmark.cases import Workload, num_adapters_needed, throughput_cases
    from neuroada_serve.benchmark.measure import OurEngine
    from neuroada_serve.benchmark.offline import FIGURES
    from neuroada_serve.benchmark.report import environment
    from neuroada_serve.benchmark.settings import OfflineConfig
    from neuroada_serve.model.source import resolve_model

    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in setup["config"].items()
    }
    config = OfflineConfig(**given)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = resolve_model(setup["model"])
    engine = OurEngine(source, config, config.dtype, num_adapters_needed(config))
    specials = set(engine.base.tokenizer.all_special_ids)
    vocab = int(engine.base.model.config.get_text_config().vocab_size)
    ids = [i for i in range(min(vocab, len(engine.base.tokenizer))) if i not in specials]
    workload, cases = Workload(config, ids, None), throughput_cases(config)

    facts = environment()
    say(
        {
            "commit": facts["commit"],
            "modified": facts["modified"],
            "threads": torch.get_num_threads(),
            "cases": [f"{case.phase}, {case.label}" for case in cases],
        }
    )
    for line in sys.stdin:
        asked = json.loads(line)
        case = cases[asked["case"]]
        works = workload.works(case, asked["round"])
        started = time.process_time()
        try:
            calls = [engine.run(work) for work in works]
        except Exception:
            say({"error": traceback.format_exc()})
            continue
        figures = {name: figure(calls) for name, figure in FIGURES[case.phase].items()}
        say({**figures, "processor_s": time.process_time() - started})


def say(document: dict[str, Any]) -> None:
    """Answer one line."""
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main()
