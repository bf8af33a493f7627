"""Build the tokenizer in a GGUF file with transformers, and check it against the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import PreTrainedTokenizerFast

from neuroada_serve.model.gguf_config import special_ids
from neuroada_serve.model.gguf_file import GgufFile

# What transformers needs beside the tokens, by kind of tokenizer.
_NEEDED = {"gpt2": "tokenizer.ggml.merges", "llama": "tokenizer.ggml.scores"}


# How llama.cpp cuts texts before the merges, where transformers does not know: as GPT-2, which is
# what transformers takes for all it does not know; and the same with every digit by itself.
_AS_GPT2 = frozenset(
    {"gpt-2", "phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-code", "jina-v2-de"}
    | {"jina-v2-es", "gigachat", "a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "mpt"}
    | {"olmo", "jais", "trillion", "granite-docling", "exaone4"}
)
_WITH_LONE_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
)


def tokenizer_of(
    file: GgufFile, path: Path, notify: Callable[[str], None] = lambda message: None
) -> Any:
    """Return the file's tokenizer, with its chat template and its special tokens.

    Args:
        path: the file, or the first of its parts.
        notify: told if the file's way to cut texts is not known here.

    Raises:
        ModelError: the file lacks what its kind of tokenizer needs, a merge is none, or a special
            token of it becomes another one.
    """
    kind = file.metadata.get("tokenizer.ggml.model", "")
    needed = _NEEDED.get(kind)
    if needed is not None and not isinstance(file.metadata.get(needed), list):
        raise file.refusal(f"it lacks key {needed}")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    except Exception:
        _check_merges(file)  # tokenizers says neither which nor why
        raise
    if kind == "gpt2":
        _set_cut(file, tokenizer, notify)
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    if len(tokenizer) > len(tokens):
        tokenizer = _without_tokens_from(len(tokens), tokenizer)
    for name, token_id in special_ids(file).items():
        if tokenizer.convert_tokens_to_ids(tokens[token_id]) != token_id:
            raise file.refusal(
                f"its {name} {token_id}, {tokens[token_id]!r}, becomes another token"
            )
    return tokenizer


def _check_merges(file: GgufFile) -> None:
    """Check the merges of a tokenizer.

    Raises:
        ModelError: a merge is not two tokens whose union is one.
    """
    tokens = set(file.metadata["tokenizer.ggml.tokens"])
    for place, merge in enumerate(file.metadata.get("tokenizer.ggml.merges") or ()):
        parts = merge.split(" ") if isinstance(merge, str) else []
        if len(parts) != 2 or not all(parts):
            fault = "is not two tokens with a space between"
        elif strange := [token for token in (*parts, "".join(parts)) if token not in tokens]:
            fault = f"needs token {strange[0]!r}, which is not among tokenizer.ggml.tokens"
        else:
            continue
        raise file.refusal(f"tokenizer.ggml.merges[{place}], {merge!r}, {fault}")


def _set_cut(file: GgufFile, tokenizer: Any, notify: Callable[[str], None]) -> None:
    """Cut texts before the merges as llama.cpp does, if that way is known."""
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, ByteLevel):  # transformers knows how
        return
    name = file.metadata.get("tokenizer.ggml.pre")
    if name in _WITH_LONE_DIGITS:
        backend.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    elif name not in _AS_GPT2:
        found = "no pre-tokenizer" if name is None else f"pre-tokenizer {name!r}, unknown here"
        notify(
            f"{file.name} names {found}: texts are cut as GPT-2 does, and may become other tokens "
            "than those the model was trained on."
        )


def _without_tokens_from(size: int, tokenizer: Any) -> Any:
    """Remove the tokens that transformers' classes add where a file has none of these names, for
    example `<|endoftext|>`. The model has no embeddings for them."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["id"] < size]
    known = {token["content"] for token in backend["added_tokens"]} | set(backend["model"]["vocab"])
    if backend["model"].get("unk_token") not in known:
        backend["model"]["unk_token"] = None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: getattr(tokenizer, name) for name in names}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        chat_template=tokenizer.chat_template,
        **{name: token for name, token in special.items() if token in known},
    )
