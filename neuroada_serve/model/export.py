"""Write a base with one adapter merged in as a plain Hugging Face checkpoint."""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from neuroada_serve.adapters.durable import check_new_folder
from neuroada_serve.adapters.format import Adapter
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.adapters.values import ValuesReader
from neuroada_serve.errors import UsageError
from neuroada_serve.model.bypass_linear import plain_layers
from neuroada_serve.model.loader import BaseModel, load_base
from neuroada_serve.model.merge import WeightMerger
from neuroada_serve.model.source import ModelSource

RECORD_FILE = "neuroada_merge.json"


def export_merged(source: ModelSource, adapter: Path, out: Path, dtype: str = "auto") -> None:
    """Merge the adapter into a copy of the base and save it, tokenizer and all, in `out`.

    Any runtime can load the result; a classifier becomes transformers' own kind for sequences,
    which AutoModelForSequenceClassification loads. RECORD_FILE in it names base and adapter. `out`
    appears only once it is whole.

    Args:
        source: the base.
        adapter: an adapter directory.
        out: a folder that does not exist yet, or is empty.
        dtype: of the saved weights; auto is as stored. Weights are cast first, then merged.

    Raises:
        UsageError: its subclasses name what is wrong.
    """
    check_new_folder(out)
    base = load_base(source, dtype, "cpu")
    loaded = load_adapter(adapter, base.spec)
    merger = WeightMerger(plain_layers(base.model))
    merger.merge(ValuesReader(merger.order, base.spec, base.dtype).of(loaded))
    model = base.model if loaded.head is None else _with_head(base, loaded)
    _end_as_served(base)
    record = {
        "base": base.spec.name,
        "base_fingerprint": base.spec.fingerprint,
        "adapter": adapter.name,
        "adapter_digest": loaded.digest,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.tmp-"))
    try:
        model.save_pretrained(scratch)
        base.tokenizer.save_pretrained(scratch)
        (scratch / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        scratch.chmod(0o755)
        for file in scratch.iterdir():
            file.chmod(0o644)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _end_as_served(base: BaseModel) -> None:
    """Let the checkpoint's answers end where ours do: generation configs often lack the token by
    which the chat template, and so a trained answer, ends."""
    config = base.model.generation_config
    known = config.eos_token_id
    ends = {known} if isinstance(known, int) else set(known or ())
    if not base.eos_token_ids <= ends:
        config.eos_token_id = sorted(ends | base.eos_token_ids)


def _with_head(base: BaseModel, adapter: Adapter) -> Any:
    """Return transformers' own classifier with the base's weights and the adapter's head."""
    config = copy.deepcopy(base.model.config)
    config.id2label = dict(enumerate(adapter.config.labels))
    config.label2id = {label: i for i, label in enumerate(adapter.config.labels)}
    config.problem_type = adapter.config.task.problem_type
    tokenizer = base.tokenizer
    pad = tokenizer.pad_token_id
    # By it transformers finds a text's last token in a batch.
    config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=base.dtype)
    except ValueError as error:
        raise UsageError(f"transformers has no classifier for {config.model_type}") from error
    model.base_model.load_state_dict(base.model.base_model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(adapter.head)
    return model
