"""Choose and examine a tokenizer's chat template: what it writes, and what ends an answer in it.

A template is its author's program. It may refuse messages on purpose, and fail or never end by
accident; in every case users get one sentence.
"""

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from neuroada_serve.errors import ModelError, RequestError

_ANSWER = "Zyxwv"  # no template writes this by itself
_PROBE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": _ANSWER})
_TIME_LIMIT_S = 10.0  # of a conversation of a few words, which takes less than a millisecond
_TEMPLATE_FILE = "<template>"  # what Jinja calls the code of a template from a text
INSTEAD = "use plain prompts, or another template by --chat-template"
_MOST_TOLD = 300  # characters of a template's own message


@dataclass(frozen=True)
class TurnEnd:
    """The text that a template writes after an assistant's answer.

    text: all of it, such as "<|im_end|>\\n". ending: its part up to and with the first end token,
        which is what a model must give to end its turn. token_id: that token; None, and an empty
        ending, where the template writes no token that could end an answer.
    """

    text: str
    ending: str
    token_id: int | None


def choose_template(tokenizer: Any, wanted: str | None) -> None:
    """Let the tokenizer use one template: the one of this name, or the text of a file.

    Raises:
        ModelError: neither names a template.
    """
    if wanted is None:
        return
    named = tokenizer.chat_template
    if isinstance(named, Mapping) and wanted in named:
        tokenizer.chat_template = named[wanted]
        return
    try:
        tokenizer.chat_template = Path(wanted).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        names = f"one of {', '.join(sorted(named))}, or " if isinstance(named, Mapping) else ""
        raise ModelError(
            f"chat_template {wanted!r} must be {names}a file that can be read ({error})"
        ) from error


def examine(tokenizer: Any, eos_token_ids: Collection[int]) -> tuple[TurnEnd | None, str | None]:
    """Find what ends an answer in the tokenizer's template, and whether the template can render
    anything.

    Renders short conversations, so that a template without end is known before it has requests.

    Args:
        eos_token_ids: ends that the model's configs name.

    Returns:
        turn_end: None where that cannot be found out.
        fault: a clause about the base; None if nothing is known against the template.
    """
    template = tokenizer.chat_template
    if not template:
        return None, None
    if isinstance(template, Mapping) and "default" not in template:
        names = ", ".join(sorted(template))
        return None, f"has chat templates by name and no default ({names})"
    try:
        with _time_limit(_TIME_LIMIT_S):
            _attempt(tokenizer, _PROBE[:1], add_generation_prompt=True)
            return _find_turn_end(tokenizer, eos_token_ids), None
    except TimeoutError:
        return None, f"has a chat template that takes over {_TIME_LIMIT_S:g} s for a few words"
    except TemplateSyntaxError as error:
        return None, f"has a chat template that is no Jinja: {_reason(error)}, line {error.lineno}"


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    base: str,
) -> str:
    """Render a conversation as text.

    Args:
        base: its name, for errors.

    Raises:
        RequestError: the template refuses the messages, or fails on them.
    """
    if not messages:
        raise RequestError("messages must not be empty", "messages")
    try:
        return _rendered(tokenizer, messages, add_generation_prompt)
    except Exception as error:  # whatever Jinja, its sandbox, or the template's own code raises
        if type(error) is TemplateError:  # by raise_exception: the template's own words
            told = f"the chat template refuses the messages: {_reason(error)}"
        else:
            told = (
                f"the chat template of base {base!r} fails with {type(error).__name__} "
                f"({_reason(error)}): {INSTEAD}"
            )
        raise RequestError(told, "messages") from error


def _find_turn_end(tokenizer: Any, eos_token_ids: Collection[int]) -> TurnEnd | None:
    """Find the token that ends an answer: the first special or other added token after it. Where
    the next turn's beginning is the end, as in GLM's template, the model's configs have to name
    that token."""
    if (text := _after_answer(tokenizer, _PROBE)) is None:
        return None
    added = tokenizer.added_tokens_decoder.items()
    ends = {i for i, token in added if not token.content.isspace()}  # Gemma adds line breaks
    if (found := _first_token(tokenizer, text, ends.union(eos_token_ids))) is not None:
        return found
    longer = _after_answer(tokenizer, (*_PROBE, _PROBE[0]))
    found = None if longer is None else _first_token(tokenizer, longer, eos_token_ids)
    return TurnEnd(text, "", None) if found is None else replace(found, text=text)


def _after_answer(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str | None:
    text = _attempt(tokenizer, messages, add_generation_prompt=False)
    _, found, after = (text or "").rpartition(_ANSWER)
    return after if found else None


def _attempt(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str | None:
    """Render a conversation; None if the template takes other conversations only."""
    try:
        return _rendered(tokenizer, messages, add_generation_prompt)
    except (TimeoutError, TemplateSyntaxError):
        raise
    except Exception:  # whoever sends such messages is told by `render`
        return None


def _rendered(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )
    )


def _first_token(tokenizer: Any, text: str, wanted: Collection[int]) -> TurnEnd | None:
    """Return the first of these tokens in a text, and the text up to it."""
    encoded = tokenizer(text, add_special_tokens=False)
    for token_id in encoded.input_ids:
        if token_id in wanted:
            token = tokenizer.decode([token_id])
            before, found, _ = text.partition(token)
            return TurnEnd(text, before + token, token_id) if found else None
    return None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return text if len(text) <= _MOST_TOLD else text[:_MOST_TOLD] + " ..."


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in templates that are rendered inside once the time is up. Compiled they
    are Python: a loop ends at its next line, and no thread is left behind.

    Watching lines slows them and, from Python 3.12 on, all other threads: use it once, not for each
    request.
    """
    end = time.monotonic() + seconds

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError
        return watch if frame.f_code.co_filename == _TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
