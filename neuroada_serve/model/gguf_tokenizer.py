"""The tokenizer in a GGUF file, as transformers builds it, and checked against the file."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from neuroada_serve.model.gguf_config import special_ids
from neuroada_serve.model.gguf_file import GgufFile

# What transformers needs beside the tokens, by kind of tokenizer.
_NEEDED = {"gpt2": "tokenizer.ggml.merges", "llama": "tokenizer.ggml.scores"}


def tokenizer_of(file: GgufFile, path: Path) -> Any:
    """The file's tokenizer, with its chat template and its special tokens.

    Args:
        path: the file, or the first of its parts.

    Raises:
        ModelError: the file lacks what its kind of tokenizer needs, or a special token of it
            becomes another one.
    """
    needed = _NEEDED.get(file.metadata.get("tokenizer.ggml.model", ""))
    if needed is not None and not isinstance(file.metadata.get(needed), list):
        raise file.refusal(f"it lacks key {needed}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    if len(tokenizer) > len(tokens):
        tokenizer = _without_tokens_from(len(tokens), tokenizer)
    for name, token_id in special_ids(file).items():
        if tokenizer.convert_tokens_to_ids(tokens[token_id]) != token_id:
            raise file.refusal(
                f"its {name} {token_id}, {tokens[token_id]!r}, becomes another token"
            )
    return tokenizer


def _without_tokens_from(size: int, tokenizer: Any) -> Any:
    """The same tokenizer less the tokens that transformers' classes add where a file has none of
    these names, `<|endoftext|>` say. The model has no embeddings for them."""
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
