"""PEFT as a peer of `neuroada bench`; the protocol is described in peers.py.

The base runs transformers' plain `generate`. With LoRA, one adapter is set, or merged, for all
requests; a mixed batch names one per request (`adapter_names`).
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Answers go to the real stdout; whatever libraries print goes to stderr.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def answer(message: dict[str, Any]) -> None:
    _answers.write(json.dumps(message) + "\n")
    _answers.flush()


def load(setup: dict[str, Any]) -> Any:
    """Load the model with its adapters lora-0, lora-1, ...; plain transformers without any."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setup["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(
        setup["model"], dtype=getattr(torch, setup["dtype"]), local_files_only=True
    )
    model.to(setup["device"]).eval()
    model.generation_config.eos_token_id = None  # every request gets its full length
    if setup["loras"]:
        from peft import PeftModel

        first, *others = setup["loras"]
        options = {"autocast_adapter_dtype": False}  # the adapters stay in the model's dtype
        model = PeftModel.from_pretrained(model, first, adapter_name="lora-0", **options)
        for i, path in enumerate(others, start=1):
            model.load_adapter(path, adapter_name=f"lora-{i}", **options)
        model.eval()
    return model


@contextmanager
def adapted(model: Any, work: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Prepare the model for this work; yield the extra arguments of `generate`."""
    numbers = work["adapters"]
    if all(number is None for number in numbers):
        yield {}
    elif work["merged"]:
        model.set_adapter(f"lora-{numbers[0]}")
        model.merge_adapter()
        try:
            yield {}
        finally:
            model.unmerge_adapter()
    elif len(set(numbers)) == 1:
        model.set_adapter(f"lora-{numbers[0]}")
        yield {}
    else:
        yield {"adapter_names": ["__base__" if n is None else f"lora-{n}" for n in numbers]}


def run(model: Any, work: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import StoppingCriteriaList

    stamps: list[float] = []

    def clock(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Note the time of every new token of the batch, as a criterion that never stops."""
        stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids = torch.tensor(work["prompts"], device=model.device)  # all of one length: no padding
    with adapted(model, work) as options, torch.inference_mode():
        started = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=work["output_len"],
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
        wall_s = time.perf_counter() - started
    times = [stamp - started for stamp in stamps]
    return {"token_s": [times] * len(work["prompts"]), "wall_s": wall_s}


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    model = load(setup)

    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if setup["loras"]:
        import peft

        versions["peft"] = peft.__version__
    answer(
        {
            "ready": True,
            "versions": versions,
            "settings": {"threads": torch.get_num_threads(), "num_loras": len(setup["loras"])},
        }
    )
    for line in sys.stdin:
        try:
            answer(run(model, json.loads(line)))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
