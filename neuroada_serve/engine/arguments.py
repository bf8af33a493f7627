"""The arguments of `LLM`'s methods in one shape: one prompt, parameter set and adapter name per
request."""

import operator
import os
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from neuroada_serve.adapters.format import Adapter
from neuroada_serve.adapters.store import mix_name
from neuroada_serve.errors import RequestError, UsageError
from neuroada_serve.request import SamplingParams

Prompt = str | Seq[int] | Mapping[str, Any]
AdapterChoice = str | Mapping[str, float] | None
Folder = str | os.PathLike[str]


def prompt_list(prompts: Prompt | Seq[Prompt]) -> list[tuple[str | None, list[int] | None]]:
    """Return (text, token ids) of each prompt; the ids are None for a prompt given as text.

    Raises:
        RequestError: something is no prompt.
    """
    batch: Any = prompts
    if isinstance(batch, str | Mapping) or _is_token_ids(batch):
        return [_prompt(batch)]
    if not isinstance(batch, Iterable) or isinstance(batch, bytes):
        raise RequestError(f"prompts must be a list of prompts, not {_kind(batch)}", "prompts")
    return [_prompt(prompt) for prompt in batch]


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, Seq) and bool(value) and all(map(_is_integer, value))


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _prompt(prompt: Any) -> tuple[str | None, list[int] | None]:
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        unknown = sorted(map(str, prompt.keys() - {"prompt", "prompt_token_ids"}))
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if unknown or not isinstance(text, str | None) or (text is None and ids is None):
            found = f"has {unknown[0]!r}" if unknown else "has neither"
            raise RequestError(
                'a prompt given as a dict is {"prompt": text} or {"prompt_token_ids": ids}; '
                f"this one {found}",
                "prompts",
            )
        return text, None if ids is None else _token_ids(ids)
    return None, _token_ids(prompt)


def _token_ids(ids: Any) -> list[int]:
    found: list[Any] = (
        list(ids) if isinstance(ids, Iterable) and not isinstance(ids, bytes) else [None]
    )
    if not all(map(_is_integer, found)):
        raise RequestError(
            f"a prompt must be a text or a list of token ids, not {_kind(ids)}", "prompts"
        )
    return [operator.index(token_id) for token_id in found]


def conversation_list(messages: Any) -> list[list[Mapping[str, Any]]]:
    """Return the conversations as a list, whether one or several were given.

    Raises:
        RequestError: something is no conversation.
    """
    batch: list[Any] = list(messages) if isinstance(messages, Iterable) else [None]
    if batch and all(isinstance(message, Mapping) for message in batch):
        return [batch]
    if isinstance(messages, str) or not all(
        isinstance(each, Seq) and each and all(isinstance(m, Mapping) for m in each)
        for each in batch
    ):
        raise RequestError(
            'messages must be a conversation, a list such as [{"role": "user", "content": "Hi"}], '
            "or a list of conversations",
            "messages",
        )
    return [list(each) for each in batch]


def params_list(params: Any, num: int) -> list[SamplingParams]:
    """Return one SamplingParams per prompt.

    Raises:
        UsageError: there are more or fewer than prompts, or something is none.
    """
    each = [SamplingParams()] * num if params is None else _one_each(params, num, SamplingParams)
    if each is None or not all(isinstance(one, SamplingParams) for one in each):
        raise UsageError(
            f"sampling_params must be a SamplingParams, or one per prompt, not {_kind(params)}"
        )
    return _checked(each, num, "sampling_params")


def adapter_list(adapters: Any, num: int) -> list[str | None]:
    """Return the name of each prompt's adapter or mix.

    Raises:
        UsageError: there are more or fewer than prompts, or something is no name.
    """
    each = _one_each(adapters, num, str | Mapping | None)
    if each is None:
        raise UsageError(
            'adapters must be a name, a mix such as {"sql": 0.7, "json": 0.3} or None for the '
            f"base, or a list with one of these per prompt, not {_kind(adapters)}"
        )
    names = [None if one is None else adapter_name(one) for one in each]
    return _checked(names, num, "adapters")


def adapter_name(adapter: Any) -> str:
    """Return the name of an adapter, or of a mix given by its weights.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(adapter, str):
        return adapter
    numbers = isinstance(adapter, Mapping) and all(
        isinstance(name, str) and isinstance(weight, int | float)
        for name, weight in adapter.items()
    )
    if not numbers or not adapter:
        raise UsageError(
            'an adapter is chosen by its name, or a mix such as {"sql": 0.7, "json": 0.3}, not '
            f"{adapter!r}"
        )
    return mix_name(adapter)


def adapters_by_name(adapters: Any) -> dict[str, Folder | Adapter]:
    """Return the folder to load under each name; folders given without a name keep their own.

    Raises:
        UsageError: two have one name, or something is no folder.
    """
    if adapters is None:
        return {}
    if isinstance(adapters, Mapping):
        return dict(adapters)
    folders = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
    if not isinstance(folders, Iterable) or isinstance(folders, bytes):
        folders = [folders]
    named: dict[str, Folder | Adapter] = {}
    for folder in folders:
        if not isinstance(folder, str | os.PathLike):
            raise UsageError(
                'adapters must be {"NAME": folder, ...}, or a list of folders, each named after '
                f"itself; {_kind(folder)} has no name"
            )
        name = Path(folder).resolve().name
        if name in named:
            raise UsageError(
                f'two adapters are called {name!r}; name them: adapters={{"NAME": folder, ...}}'
            )
        named[name] = folder
    return named


def _one_each(value: Any, num: int, single: Any) -> list[Any] | None:
    """Return one value for each of `num`, from a list or from one for all; None if it is
    neither."""
    if isinstance(value, single):
        return [value] * num
    return list(value) if isinstance(value, Seq) and not isinstance(value, bytes) else None


def _checked(each: list[Any], num: int, what: str) -> list[Any]:
    if len(each) != num:
        raise UsageError(f"{len(each)} {what} for {num} prompts; give one, or one per prompt")
    return each


def _kind(value: Any) -> str:
    return (
        f"a list of {type(value[0]).__name__}"
        if isinstance(value, list) and value
        else ("an empty list" if isinstance(value, list) else type(value).__name__)
    )
