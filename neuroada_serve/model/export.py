"""Write a base with one adapter merged in as a plain Hugging Face checkpoint."""

import json
import shutil
import tempfile
from pathlib import Path

from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.adapters.values import ValuesReader
from neuroada_serve.errors import UsageError
from neuroada_serve.model.bypass_linear import plain_layers
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.merge import WeightMerger
from neuroada_serve.model.source import ModelSource

RECORD_FILE = "neuroada_merge.json"


def export_merged(source: ModelSource, adapter: Path, out: Path, dtype: str = "auto") -> None:
    """Merge the adapter into a copy of the base and save it, tokenizer and all, in `out`.

    Any runtime can load the result. RECORD_FILE in it names base and adapter. `out` appears only
    once it is whole.

    Args:
        source: the base.
        adapter: an adapter directory.
        out: a folder that does not exist yet, or is empty.
        dtype: of the saved weights; auto is as stored. Weights are cast first, then merged.

    Raises:
        UsageError: its subclasses name what is wrong.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; name a new one")
    base = load_base(source, dtype, "cpu")
    loaded = load_adapter(adapter, base.spec)
    merger = WeightMerger(plain_layers(base.model))
    merger.merge(ValuesReader(merger.order, base.spec, base.dtype).of(loaded))
    record = {
        "base": base.spec.name,
        "base_fingerprint": base.spec.fingerprint,
        "adapter": adapter.name,
        "adapter_digest": loaded.digest,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.tmp-"))
    try:
        base.model.save_pretrained(scratch)
        base.tokenizer.save_pretrained(scratch)
        (scratch / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        scratch.chmod(0o755)
        for file in scratch.iterdir():
            file.chmod(0o644)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
