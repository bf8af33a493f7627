"""`neuroada generate`, `classify`, `merge` and `inspect`."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from neuroada_serve.cli.common import (
    GREEDY,
    Adapter,
    MaxTokens,
    Model,
    Plain,
    Seed,
    Temperature,
    command,
    llm_with,
    notify,
)
from neuroada_serve.cli.flags import Only
from neuroada_serve.config import EngineConfig


@command
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to answer.")],
    engine: Annotated[EngineConfig, Only("dtype", "chat_template", "deterministic")],
    adapter: Adapter = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = GREEDY,
    seed: Seed = None,
    plain: Plain = False,
) -> None:
    """Answer one prompt, token by token."""
    from neuroada_serve.request import Output, SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    llm, name = llm_with(model, adapter, replace(engine, max_num_seqs=1))

    def show(output: Output) -> None:
        sys.stdout.write(output.text)
        sys.stdout.flush()

    if plain or not llm.engine.base.has_chat_template:
        llm.generate(prompt, params, name, on_output=show)
    else:
        llm.chat([{"role": "user", "content": prompt}], params, name, on_output=show)
    print()


@command
def classify(
    model: Model,
    text: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Text to classify.")],
    adapter: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH", help="A classifier's folder, under NAME or its own name."
        ),
    ],
    engine: Annotated[EngineConfig, Only("dtype")],
) -> None:
    """Label texts with a classifier.

    Prints one line per text: its label and the probability of every label, or the number of a
    regression.
    """
    llm, name = llm_with(model, adapter, engine)
    for output in llm.classify(text, name, use_tqdm=False):
        shares = zip(output.labels, output.probs, strict=True)
        print(output.label, *(f"{label}={share:.4f}" for label, share in shares), sep="\t")


@command
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Checkpoint folder to write.")],
    engine: Annotated[EngineConfig, Only("dtype")],
) -> None:
    """Write base and adapter as one plain Hugging Face checkpoint."""
    from neuroada_serve.adapters.durable import check_new_folder
    from neuroada_serve.model.export import export_merged
    from neuroada_serve.model.source import resolve_model

    check_new_folder(out_dir)
    export_merged(resolve_model(model, notify), adapter, out_dir, engine.dtype)
    notify(f"Checkpoint written to {out_dir}")


@command
def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Show what an adapter holds, after checking its files."""
    import torch

    from neuroada_serve.adapters.format import WEIGHTS_FILE
    from neuroada_serve.adapters.reader import load_adapter

    loaded = load_adapter(adapter)
    config = loaded.config
    values = torch.cat([part.bypass.float().flatten() for part in loaded.modules.values()])
    dtypes = {str(part.bypass.dtype).removeprefix("torch.") for part in loaded.modules.values()}
    biased = [part.bias for part in loaded.modules.values() if part.bias is not None]
    found = {
        "base": config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "digest": loaded.digest,
        "k": config.k,
        "selection": config.selection,
        "task_type": config.task_type,
        "labels": list(config.labels),
        "target_modules": list(config.target_modules),
        "num_modules": len(loaded.modules),
        "num_values": values.numel(),
        "dtypes": sorted(dtypes),
        "num_biases": sum(map(len, biased)),
        "num_biased_modules": len(biased),
        "weights_file_bytes": (adapter / WEIGHTS_FILE).stat().st_size,
        "mean_abs_value": float(values.abs().mean()),
        "largest_abs_value": float(values.abs().max()),
        "share_of_zeros": float((values == 0).float().mean()),
        "metadata": dict(config.metadata),
    }
    if json_output:
        print(json.dumps(found, ensure_ascii=False))
        return
    for key, value in found.items():
        if value in ([], 0) and key in ("labels", "num_biases", "num_biased_modules"):
            continue
        if isinstance(value, dict):
            value = json.dumps(value, indent=2, ensure_ascii=False)
        elif isinstance(value, list):
            value = ", ".join(value)
        elif isinstance(value, float):
            value = f"{value:.4g}"
        shown = f"{value:,}" if isinstance(value, int) else value
        print(f"{key.replace('_', ' '):<18}  {shown}")
