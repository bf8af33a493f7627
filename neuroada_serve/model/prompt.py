"""Encode text and conversations as token ids, the same way for serving, training and evaluation.

Text inside prompts and messages may name special tokens, such as <|im_end|>: they are read as the
tokens, wherever the text comes from, as vLLM reads them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from neuroada_serve.errors import DataError, RequestError
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.template import INSTEAD, render

Message = Mapping[str, Any]

_ROLES = {"developer": "system"}  # the newer name of one role


def encode_text(base: BaseModel, text: str) -> list[int]:
    """Encode a plain prompt, with the special tokens that the tokenizer adds in front.

    Raises:
        RequestError: the text is none, or has tokens that the base does not know.
    """
    ids = _tokens(base, _valid(text, "prompt", "prompt"), add_special_tokens=True)
    return _known(base, ids, "prompt")


def encode_chat(base: BaseModel, messages: Sequence[Message]) -> list[int]:
    """Encode a conversation, up to where the assistant's next answer begins.

    Args:
        messages: as OpenAI's clients write them, see `normalized`.

    Raises:
        RequestError: the base has no chat template, or it refuses these messages; or they have
            tokens that the base does not know.
    """
    check_template(base)
    text = _rendered(base, normalized(messages), add_generation_prompt=True)
    return _known(base, _tokens(base, text), "messages")


def encode_exchange(
    base: BaseModel, messages: Sequence[Message], answer: str
) -> tuple[list[int], list[int]]:
    """Encode a conversation, as `encode_chat` does, and an answer to it.

    The answer is rendered by the chat template, up to and with the token that ends it: prompt and
    answer together are the template's own text. Where the template writes something between them
    that its prompt for an answer lacks, such as Qwen 3's empty <think> block, the answer follows
    the prompt at once, since a served model begins there.

    Raises:
        RequestError: see `encode_chat`.
        DataError: nothing is known to end an answer.
    """
    check_template(base)
    conversation = normalized(messages)
    prompt = _rendered(base, conversation, add_generation_prompt=True)
    prompt_ids = _known(base, _tokens(base, prompt), "messages")
    text = _as_rendered(base, conversation, prompt, _valid(answer, "answer", "messages"))
    end = base.turn_end
    text += "" if end is None else end.ending
    # One text gives the tokens of the template's own; two would begin the answer as a new text,
    # with the space that some tokenizers put there. Unless the answer melts into the prompt.
    answer_ids = _tokens(base, prompt + text)
    if answer_ids[: len(prompt_ids)] == prompt_ids:
        answer_ids = answer_ids[len(prompt_ids) :]
    else:
        answer_ids = _tokens(base, text)
    if end is None or end.token_id is None:
        answer_ids.append(end_token_id(base))
    return prompt_ids, _known(base, answer_ids, "messages")


def encode_continuation(base: BaseModel, text: str, answer: str) -> tuple[list[int], list[int]]:
    """Encode a plain prompt, as `encode_text` does, and an answer with its end.

    Raises:
        RequestError: see `encode_text`.
        DataError: nothing is known to end an answer.
    """
    answer_ids = _tokens(base, _valid(answer, "answer", "prompt"))
    return encode_text(base, text), _known(base, [*answer_ids, end_token_id(base)], "prompt")


def renders_chats(base: BaseModel, prompt_format: str) -> bool:
    """Tell whether prompts go through the chat template: they are meant to, and the base has one.

    Args:
        prompt_format: "chat" or "plain".

    Raises:
        RequestError: they are meant to, and the base's template cannot render anything.
    """
    if prompt_format != "chat" or not base.has_chat_template:
        return False
    check_template(base)
    return True


def check_template(base: BaseModel) -> None:
    """Check that the base can render conversations.

    Raises:
        RequestError: the base has no chat template that could render a conversation.
    """
    fault = base.template_fault
    if fault is None and not base.has_chat_template:
        fault = "has no chat template"
    if fault is not None:
        raise RequestError(
            f"base {base.spec.name!r} {fault}; {INSTEAD} (its name, or a file)", "messages"
        )


def end_token_id(base: BaseModel) -> int:
    """Return the token that ends a plain answer: the tokenizer's own, else the first of the
    model's.

    Raises:
        DataError: the base has none, so it could not learn where to stop.
    """
    if base.tokenizer.eos_token_id is not None:
        return int(base.tokenizer.eos_token_id)
    if not base.eos_token_ids:
        raise DataError(
            f"base {base.spec.name!r} has no end token (eos_token_id in its tokenizer or "
            "generation config), so answers would have no end"
        )
    return min(base.eos_token_ids)


def _as_rendered(base: BaseModel, conversation: Sequence[Message], prompt: str, answer: str) -> str:
    """Return the answer as the template writes it behind its prompt: trimmed, or after a space;
    unchanged if the template writes anything else."""
    if base.turn_end is None:
        return answer
    turn = {"role": "assistant", "content": answer}
    try:
        whole = _rendered(base, [*conversation, turn], add_generation_prompt=False)
    except RequestError:
        return answer
    after = base.turn_end.text
    if not (whole.startswith(prompt) and whole.endswith(after)):
        return answer
    text = whole[len(prompt) : len(whole) - len(after)]
    return text if text.strip() == answer.strip() else answer


def _rendered(base: BaseModel, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    return render(base.tokenizer, messages, add_generation_prompt, base.spec.name)


def _tokens(base: BaseModel, text: str, add_special_tokens: bool = False) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)


def _known(base: BaseModel, ids: list[int], field: str) -> list[int]:
    """Return the ids, after checking them.

    Raises:
        RequestError: the model has no embedding for one of them.
    """
    for token_id in ids:
        if token_id >= base.vocab_size:
            token = base.tokenizer.convert_ids_to_tokens(token_id)
            raise RequestError(
                f"the text has the token {token!r}, number {token_id} of the tokenizer, but base "
                f"{base.spec.name!r} has embeddings for {base.vocab_size} tokens only: leave it "
                "out, or resize the base's embeddings to its tokenizer",
                field,
            )
    return ids


# --- messages ----------------------------------------------------------------------------------


def normalized(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert messages to the form that templates know: `developer` becomes `system`, content
    becomes one text, and the arguments of tool calls become objects, which OpenAI has as JSON.
    Other keys stay, unless they are null.

    Raises:
        RequestError: names the message that is none.
    """
    conversation = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f'{where} must be an object {{"role", "content"}}, not {message!r:.80}', "messages"
            )
        role, content = message["role"], message.get("content")
        if content is None and role != "assistant":  # who may have called a tool instead
            raise RequestError(
                f"{where}.content is null, which only an assistant's may be", "messages"
            )
        text = message_text(content, f"{where}.content")
        turn = {key: value for key, value in message.items() if value is not None}
        turn |= {"role": _ROLES.get(role, role), "content": text}
        if isinstance(calls := turn.get("tool_calls"), list):
            turn["tool_calls"] = [_with_arguments(call) for call in calls]
        conversation.append(turn)
    return conversation


def message_text(content: Any, where: str = "content") -> str:
    """Return the text of a message's content: a text; text parts, joined by line breaks; or null,
    which is empty.

    Raises:
        RequestError: it is something else, or holds half of a surrogate pair.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return _valid(content, where, "messages")
    parts = content if isinstance(content, Sequence) else [None]
    texts = [p.get("text") for p in parts if isinstance(p, Mapping) and p.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise RequestError(
            f'{where} must be a text or a list of {{"type": "text", "text": ...}} parts; others '
            "are not supported",
            "messages",
        )
    return _valid("\n".join(map(str, texts)), where, "messages")


def _with_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call  # the template gets what the model once wrote
    return {**call, "function": {**function, "arguments": arguments}}


def _valid(text: Any, where: str, field: str) -> str:
    """Return the text, after checking it.

    Raises:
        RequestError: it is none, or holds half of a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(text, str):
        raise RequestError(f"{where} must be a text, not {type(text).__name__}", field)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half of a surrogate pair", field) from None
    return text
