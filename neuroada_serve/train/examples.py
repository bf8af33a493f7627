"""Rows as token ids."""

from dataclasses import dataclass, field

from neuroada_serve.errors import RequestError
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.prompt import (
    encode_chat,
    encode_continuation,
    encode_exchange,
    encode_text,
    renders_chats,
)
from neuroada_serve.train.shapes import Row


@dataclass(frozen=True)
class Example:
    """A row as token ids; only the answer is trained on.

    answer_ids: end with the base's end token; of a task with labels, the label's number alone.
    target: the number to learn, where the task learns one.
    question: the row's text, for people.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    target: float | None = None
    question: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.prompt_ids, "the first answer token needs one before it"
        assert self.answer_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def encode_prompt(base: BaseModel, row: Row, prompt_format: str) -> list[int]:
    """Return the token ids of a row's prompt, up to where its answer begins.

    Args:
        prompt_format: "chat" or "plain"; chat falls back on plain where the base has no template.

    Raises:
        RequestError: the chat template refuses the messages, nothing is left of the prompt, or it
            has tokens that the base does not know.
    """
    chats = renders_chats(base, prompt_format)
    ids = encode_chat(base, row.messages) if chats else encode_text(base, row.text)
    if not ids:
        raise RequestError("the prompt has no tokens")
    return ids


def encode_row(base: BaseModel, row: Row, prompt_format: str) -> Example:
    """Return a row's prompt, and its answer with the end token.

    Raises:
        RequestError: see `encode_prompt`.
    """
    if renders_chats(base, prompt_format):
        prompt_ids, answer_ids = encode_exchange(base, row.messages, row.answer)
    else:
        prompt_ids, answer_ids = encode_continuation(base, row.text, row.answer)
    if not prompt_ids:
        raise RequestError("the prompt has no tokens")
    return Example(tuple(prompt_ids), tuple(answer_ids))
