"""vLLM as a peer of `neuroada bench`; the protocol is described in peers.py.

Runs in vLLM's own environment, so it must not import neuroada_serve.
"""

import json
import os
import sys
import time
from typing import Any

# Answers go to the real stdout; whatever libraries print goes to stderr.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def answer(message: dict[str, Any]) -> None:
    _answers.write(json.dumps(message) + "\n")
    _answers.flush()


def load(setup: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Load the engine, and its LoRA requests by number. Without adapters LoRA stays off."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    loras = [LoRARequest(f"lora-{i}", i + 1, path) for i, path in enumerate(setup["loras"])]
    options: dict[str, Any] = {}
    if loras:
        options["enable_lora"] = True
        # One slot for each adapter that can run at once.
        options["max_loras"] = min(len(loras), setup["max_num_seqs"])
        options["max_cpu_loras"] = len(loras)
        options["max_lora_rank"] = setup["lora_rank"]
    if setup["eager"] is not None:
        options["enforce_eager"] = setup["eager"]
    llm = LLM(
        model=setup["model"],
        dtype=setup["dtype"],
        max_num_seqs=setup["max_num_seqs"],
        max_model_len=setup["max_model_len"],
        enable_prefix_caching=False,  # prompts never repeat, so it would only cost time
        **options,
    )
    return llm, loras


def run(llm: Any, loras: list[Any], work: dict[str, Any]) -> dict[str, Any]:
    """Run the loop of LLM.generate, noting the time of every token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    token_s: dict[str, list[float]] = {}
    started = time.perf_counter()
    for i, (prompt, number) in enumerate(zip(work["prompts"], work["adapters"], strict=True)):
        params = SamplingParams(
            temperature=0,
            max_tokens=work["output_len"],
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        token_s[str(i)] = []
        lora = None if number is None else loras[number]
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params, lora_request=lora)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            token_s[output.request_id] += [now] * len(output.outputs[0].token_ids)
    return {"token_s": list(token_s.values()), "wall_s": time.perf_counter() - started}


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    llm, loras = load(setup)

    import torch
    import vllm

    names = [name for name in os.environ if name.startswith(("VLLM_", "OMP_", "KMP_"))]
    config = llm.llm_engine.vllm_config
    answer(
        {
            "ready": True,
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "settings": {
                "enforce_eager": config.model_config.enforce_eager,
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "max_loras": config.lora_config.max_loras if config.lora_config else 0,
                "environment": {name: os.environ[name] for name in sorted(names)},
            },
        }
    )
    for line in sys.stdin:
        try:
            answer(run(llm, loras, json.loads(line)))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
