"""Conversations within a row: OpenAI's messages, ShareGPT's turns, and variants of them.

{"role": "user", "content": "Hi"}            content may be a list of text parts, or null
{"from": "human", "value": "Hi"}             ShareGPT
{"role": ["user", ...], "content": [...]}    all of a conversation, as `datasets` may keep it
'[{"role": "user", ...}]'                    any of them as JSON, in a cell of a CSV
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuroada_serve.train.rows import RecordFault, is_blank

Message = dict[str, Any]

_ROLES = {  # other words for them
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_SHAREGPT_ROLES = _ROLES.keys() | {"system", "user", "assistant", "tool", "function_call"}
_OF_AN_ANSWER = {"role", "content", "weight", "name"}  # of these, only content is learnt


class LeftOut(Exception):
    """A row holds nothing to learn, which is not a fault; the message says why.

    is_gap: something is missing that other rows have; not if it was left out on purpose.
    """

    def __init__(self, reason: str, is_gap: bool = True) -> None:
        super().__init__(reason)
        self.is_gap = is_gap


@dataclass(frozen=True)
class Exchange:
    """A conversation and the answer to it.

    unlearnt: number of earlier answers. unused: keys of the answer's message that are not learnt.
    """

    messages: tuple[Message, ...]
    answer: str
    unlearnt: int
    unused: frozenset[str]


def exchange(messages: Sequence[Message]) -> Exchange:
    """Split a conversation into its last answer that counts and all before it.

    Raises:
        RecordFault: it has none.
        LeftOut: it has none that is a text, or none of weight 1.
    """
    last = len(messages) - 1
    if last < 1:
        raise RecordFault("a conversation must be a list of at least a question and an answer")
    if messages[last]["role"] != "assistant":
        role = messages[last]["role"]
        raise RecordFault(f"the last message must have role 'assistant', not {role!r}")
    weights = [message.get("weight", 1) for message in messages]
    while last >= 0 and not (messages[last]["role"] == "assistant" and weights[last]):
        last -= 1
    if last < 0:
        raise LeftOut("no answer of weight 1", is_gap=False)
    answer, before = messages[last], messages[:last]
    if answer.get("tool_calls"):
        raise LeftOut("an answer that is a tool call")
    if is_blank(answer["content"]):
        raise LeftOut("an empty answer")
    if not before:
        raise RecordFault("the only answer of weight 1 has no question before it")
    return Exchange(
        tuple({k: v for k, v in message.items() if k != "weight"} for message in before),
        answer["content"],
        sum(m["role"] == "assistant" and bool(m.get("weight", 1)) for m in before),
        frozenset(answer.keys() - _OF_AN_ANSWER),
    )


def messages_of(value: Any, path: str) -> list[Message]:
    """Return the messages of a conversation in any of the forms, each with a role and a text.

    Raises:
        RecordFault: names the message that is none.
        LeftOut: a question in it has no content.
    """
    value = from_json(value)
    if isinstance(value, dict) and all(isinstance(part, list) for part in value.values()):
        if len({len(part) for part in value.values()}) > 1:
            raise RecordFault(f"{path} has lists of different lengths")
        parts = zip(*value.values(), strict=True)
        value = [dict(zip(value, part, strict=True)) for part in parts]
    if not isinstance(value, list):
        raise RecordFault(f"{path} must be a list of messages, not {type(value).__name__}")
    return [_message(each, f"{path}[{number}]") for number, each in enumerate(value)]


def from_json(value: Any) -> Any:
    """Parse a list that a cell of a CSV holds as text; return anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def text_of(value: Any, path: str) -> str:
    """Convert a value to text; numbers and booleans as Python writes them, whole numbers without
    .0.

    Raises:
        RecordFault: it is something else.
    """
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float):
        if value - value != 0:
            raise RecordFault(f"{path} is {value}")
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else str(value)
    if not isinstance(value, str):
        raise RecordFault(f"{path} must be a text or a number, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordFault(f"{path} has half a surrogate pair, which is no text") from None
    return value


def weight_of(value: Any) -> bool:
    """Tell whether a row or an answer of this weight is learnt.

    Raises:
        RecordFault: it is to be learnt in part.
    """
    for weight, written in ((False, ("0", "0.0")), (True, ("1", "1.0"))):
        if str(value).strip() in written or value is weight:
            return weight
    raise RecordFault(f"weight must be 0 (left out) or 1, not {value!r:.40}")


def _message(raw: Any, path: str) -> Message:
    if not isinstance(raw, dict):
        raise RecordFault(f'{path} must be an object {{"role", "content"}}')
    raw = {key: value for key, value in raw.items() if value is not None}
    role, content = ("from", "value") if "from" in raw else ("role", "content")
    said = raw.pop(role, None)
    if not isinstance(said, str):
        raise RecordFault(f'{path} must be an object {{"role", "content"}}')
    if role == "from" and said not in _SHAREGPT_ROLES:
        raise RecordFault(f"{path}.from is {said!r:.40}, which must be human, gpt or system")
    if content not in raw and _ROLES.get(said, said) != "assistant":  # who may call a tool instead
        raise LeftOut("a message without content")
    text = _content(raw.pop(content, None), f"{path}.{content}")
    if said == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(text, path)}
    message = {"role": _ROLES.get(said, said), "content": text, **raw}
    if "weight" in raw:
        if message["role"] != "assistant":
            raise RecordFault(f"{path}.weight is for answers, not for role {message['role']!r:.40}")
        message["weight"] = weight_of(raw["weight"])
    if calls := message.pop("tool_calls", None):
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise RecordFault(f"{path}.tool_calls must be a list of objects")
        message["tool_calls"] = calls
    return message


def _content(value: Any, path: str) -> str:
    """Return the text of a message: parts one below the other; null, which stands beside tool
    calls, as an empty text."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return text_of(value, path)
    texts = []
    for number, part in enumerate(value):
        if isinstance(part, dict) and part.get("type", "text") != "text":
            kind = part["type"]
            raise RecordFault(f"{path}[{number}] is of type {kind!r:.40}; only text is read")
        text = part.get("text") if isinstance(part, dict) else part
        texts.append(text_of(text, f"{path}[{number}]"))
    return "\n".join(texts)


def _tool_calls(text: str, path: str) -> list[Any]:
    """Convert ShareGPT's {"name": ..., "arguments": {...}} to OpenAI's form."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise RecordFault(f'{path}.value must be a call {{"name", "arguments"}} as JSON')
    return [{"type": "function", "function": call}]
