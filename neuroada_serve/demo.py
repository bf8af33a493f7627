"""Run `neuroada demo`: the whole idea in a minute, with the shipped adapters."""

import json
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from rich.console import Console
from rich.table import Table

from neuroada_serve.config import DEMO
from neuroada_serve.errors import DirtyWeightsError, UsageError
from neuroada_serve.model.source import resolve_model
from neuroada_serve.request import RequestOutput, SamplingParams

_PROMPTS = "prompts.json"
_PARAMS = SamplingParams(temperature=0, max_tokens=48)


def find_examples() -> Path:
    """Return the folder of the shipped adapters and their prompts: beside the package in a clone,
    else where the wheel has put it.

    Raises:
        UsageError: it is in neither place.
    """
    beside = Path(__file__).resolve().parent.parent / "examples"
    if (beside / _PROMPTS).is_file():
        return beside
    try:
        files = distribution("neuroada-serve").files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.parts[-2:] == ("neuroada-serve", _PROMPTS):
            found = Path(str(file.locate())).resolve()
            if found.is_file():
                return found.parent
    raise UsageError(
        "the shipped adapters are neither beside the package nor installed with it; install the "
        "wheel again, or run the demo from a clone"
    )


def run_demo(console: Console, notify: Callable[[str], None]) -> None:
    """Answer one prompt per shipped adapter, with the adapter and on the base, in one batch; then
    merge one adapter, answer again, unmerge and compare the weights' sha256.

    Raises:
        UsageError: the base cannot be had, or the adapters are not beside the package.
    """
    from neuroada_serve.engine.llm import LLM

    examples = find_examples()
    prompts: dict[str, str] = json.loads((examples / _PROMPTS).read_text())
    source = resolve_model(DEMO, notify)
    if not source.exact:
        notify("Its weights differ a little from those the shipped adapters were trained on.")
    llm = LLM(
        DEMO,
        {name: examples / "adapters" / name for name in prompts},
        allow_other_base=not source.exact,
        notify=notify,
    )
    before = llm.base_digest()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    # 1. One mixed batch: every prompt with its adapter, and the same prompts on the base.
    questions = [[{"role": "user", "content": prompt}] for prompt in prompts.values()]
    started = time.perf_counter()
    answers = llm.chat([*questions, *questions], _PARAMS, [*prompts, *[None] * len(prompts)])
    elapsed_s = time.perf_counter() - started
    adapted, plain = answers[: len(prompts)], answers[len(prompts) :]
    table = Table(show_lines=True)
    for heading in ("adapter", "prompt", "base", "with its adapter"):
        table.add_column(heading, overflow="fold")  # a JSON record is one long word
    for (name, prompt), base_answer, answer in zip(prompts.items(), plain, adapted, strict=True):
        table.add_row(name, prompt, base_answer.text.strip(), answer.text.strip())
    console.print(table, markup=False)
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    say(
        f"One batch: {len(answers)} requests, {len(prompts)} adapters and the base, {num_tokens} "
        f"tokens in {elapsed_s:.1f} s = {num_tokens / elapsed_s:.0f} tokens/s."
    )

    # 2. Hot merge: the same answer at the base's speed, and the base back bit for bit.
    name, unmerged = next(iter(prompts)), adapted[0]
    started = time.perf_counter()
    llm.merge(name)
    merge_ms = (time.perf_counter() - started) * 1000
    merged: RequestOutput = llm.chat(questions[0], _PARAMS, name, use_tqdm=False)[0]
    llm.unmerge()
    after = llm.base_digest()
    say(f"{name} merged into the weights in {merge_ms:.0f} ms: {merged.text.strip()}")
    same = "the same answer" if merged.text == unmerged.text else "the answer differs by rounding"
    say(f"Merged and unmerged give {same}.")
    say(f"Base weights before: sha256 {before}")
    say(f"Base weights after:  sha256 {after}")
    if before != after:
        raise DirtyWeightsError("the base weights changed: please report this")
    say("Unmerged bit for bit.")
