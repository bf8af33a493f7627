"""Text to token ids, the same way for serving, training and evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from neuroada_serve.errors import RequestError
from neuroada_serve.model.loader import BaseModel

Message = Mapping[str, Any]


def encode_text(base: BaseModel, text: str) -> list[int]:
    """Token ids of a plain prompt, with the special tokens that the tokenizer adds in front."""
    ids: list[int] = base.tokenizer(text).input_ids
    return ids


def encode_chat(base: BaseModel, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next answer begins.

    Raises:
        RequestError: the base has no chat template, or it refuses these messages.
    """
    if not base.has_chat_template:
        raise RequestError(
            f"base {base.spec.name!r} has no chat template; send a plain prompt instead", "messages"
        )
    try:
        ids: list[int] = base.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise RequestError(
            f"the chat template refuses the messages: {error}", "messages"
        ) from error
    return ids
