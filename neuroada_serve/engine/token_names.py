"""Names of single tokens in reported probabilities, made of their own bytes.

A token may be a piece of a character, or several; decoded alone it would read as U+FFFD, and all
such tokens alike. OpenAI's name for it is used: bytes:\\xf0\\x9f.
"""

import json
from typing import Any

from neuroada_serve.engine.sampler import Sampled
from neuroada_serve.request import TokenLogprob, name_of_bytes


class TokenNames:
    """Name a tokenizer's tokens; `request.bytes_of_name` turns the names back into bytes.

    Args:
        tokenizer: of transformers. Of one without a decoder whose form is known, names are what it
            decodes single tokens to.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}
        steps = _decoder_steps(tokenizer)
        self._bytes_of_char = _bytes_of_char() if "ByteLevel" in steps else {}
        self._has_byte_tokens = "ByteFallback" in steps
        self._space = next((steps[s] for s in ("Metaspace", "Replace") if steps.get(s)), None)
        self._is_known = bool(self._bytes_of_char or self._space)
        self._added = {i: str(t) for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items()}

    def __call__(self, token_id: int) -> str:
        """Return the token's text if it has one, leading space included; else its bytes."""
        name = self._names.get(token_id)
        if name is None:
            name = self._names[token_id] = self._name(token_id)
        return name

    def describe(self, token: Sampled, text_offset: int = 0) -> TokenLogprob:
        """Return a scored token with its name and bytes."""
        assert token.logprob is not None
        top = tuple((i, self(i), logprob) for i, logprob in token.top)
        return TokenLogprob(token.token_id, self(token.token_id), token.logprob, top, text_offset)

    def _name(self, token_id: int) -> str:
        token = self._tokenizer.convert_ids_to_tokens(token_id) if self._is_known else None
        if token is None:
            return str(self._tokenizer.decode([token_id]))
        return name_of_bytes(self._bytes(token_id, token))

    def _bytes(self, token_id: int, token: str) -> bytes:
        if self._bytes_of_char:
            if all(char in self._bytes_of_char for char in token):
                return bytes(self._bytes_of_char[char] for char in token)
            return token.encode()
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._has_byte_tokens and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace(self._space or "", " ").encode()


def _decoder_steps(tokenizer: Any) -> dict[str, str]:
    """Return the kinds of steps of a tokenizer's decoder, and for some what stands for a space."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return {}
    state = json.loads(decoder.__getstate__())
    steps: dict[str, str] = {}
    for step in state.get("decoders", [state]):
        space = step.get("replacement", "")
        if step["type"] == "Replace":
            space = step["pattern"].get("String", "") if step["content"] == " " else ""
        steps.setdefault(step["type"], space)
    return steps


def _bytes_of_char() -> dict[str, int]:
    """Return byte-level BPE's alphabet: each byte that can be printed stands for itself, the
    others are written as the characters from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}
