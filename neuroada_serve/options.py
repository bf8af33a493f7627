"""Fields of settings, each written once: name, type, default, help and form as text.

A field `max_num_seqs` is the flag `--max-num-seqs`, the key `max-num-seqs` of a file of settings
and the environment variable `NEUROADA_MAX_NUM_SEQS`; see `cli/flags.py`.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, Literal, get_args, get_origin

from neuroada_serve.errors import UsageError

GROUP = "Options"  # for fields that name none


def option(
    default: Any,
    help: str,
    group: str = GROUP,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    read: Callable[[Any], Any] | None = None,
    repeated: bool = False,
    sets: tuple[str, ...] = (),
) -> Any:
    """Make a field of a dataclass of settings.

    Args:
        group: heading of the field in `--help`.
        flag: the flag's long name if it differs from the field's; "" for a field without a flag.
        read: converts text, or a list of texts if `repeated`, to the value; raises UsageError.
        sets: the fields that get the values of `read`, if it returns several.
    """
    described = {
        "help": help,
        "group": group,
        "flag": flag,
        "metavar": metavar,
        "read": read,
        "repeated": repeated,
        "sets": sets,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=described)
    return field(default=default, metadata=described)


def redefined(config: type, name: str, default: Any = MISSING, **changes: Any) -> Any:
    """Copy a field of `config` with another default, or other arguments of `option`."""
    (before,) = (f for f in fields(config) if f.name == name)
    if default is MISSING:
        default = default_of(before)
    described = {**before.metadata, **changes}
    return option(default, described.pop("help"), described.pop("group"), **described)


def help_of(config: type, name: str) -> str:
    """Return the help text of one field, which the command line shows."""
    for f in fields(config):
        if f.name == name:
            return str(f.metadata["help"])
    raise KeyError(f"{config.__name__} has no field {name}")


def default_of(described: Field[Any]) -> Any:
    """Return the default of a field."""
    if described.default is not MISSING:
        return described.default
    assert described.default_factory is not MISSING
    return described.default_factory()


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_bytes(text: str) -> int:
    """Parse a size such as 512MiB, 4GB or 1000000.

    Raises:
        UsageError: the text is not a size.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None:
        raise UsageError(
            f"{text!r} is not a size; give a number of bytes, or one such as 512MiB or 4GB"
        )
    return int(float(found[1]) * unit)


def words(text: str) -> tuple[str, ...]:
    """Parse comma-separated words."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def integers(text: str) -> tuple[int, ...]:
    """Parse comma-separated integers."""
    try:
        return tuple(int(word) for word in words(text))
    except ValueError:
        raise UsageError(f"takes integers such as 1,4,16, got {text!r}") from None


def columns(text: str) -> dict[str, str]:
    """Parse our keys for columns: prompt=question,completion=reply."""
    found = {}
    for part in filter(None, text.split(",")):
        key, equals, column = part.partition("=")
        if not equals or not key or not column:
            raise UsageError(f"takes KEY=COLUMN,KEY=COLUMN, not {text!r}")
        found[key.strip()] = column.strip()
    return found


def weights(texts: Sequence[str]) -> dict[str, float]:
    """Parse shares by name, from texts NAME=WEIGHT."""
    found: dict[str, float] = {}
    for text in texts:
        name, separator, weight = text.rpartition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            separator = ""
        if not separator or not name:
            raise UsageError(f"takes NAME=WEIGHT, such as big-customer=2, got {text!r}")
    return found


def k_by_module(text: str) -> tuple[int, dict[str, int]]:
    """Parse 8, or q_proj|v_proj=8,1: k of modules that no pattern matches, and k by pattern."""
    *parts, last = text.split(",")
    if "=" in last:
        parts, last = [*parts, last], "0"
    found = [re.fullmatch(r"\s*(\S+?)\s*=\s*(\d+)\s*", part) for part in parts]
    if not last.strip().isdecimal() or None in found:
        raise UsageError(f"takes a number or PATTERN=K,PATTERN=K,K, not {text!r}")
    return int(last), {each[1]: int(each[2]) for each in found if each is not None}


def number_or_auto(text: str) -> float | str:
    """Parse a number, or the word auto."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"takes a number or auto, not {text!r}") from None


def at_least(config: object, **minimums: float) -> None:
    """Refuse fields that are not numbers or are below their minimum; None passes.

    Raises:
        UsageError: names the field.
    """
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UsageError(f"{name} must be a number, got {value!r}")
        if value is not None and not value >= minimum:  # refuses nan too
            raise UsageError(f"{name} must be at least {minimum}, got {value}")


def above_0(config: object, **most: float | None) -> None:
    """Refuse fields that are not finite numbers above 0, or are above their maximum, if they have
    one; None passes.

    Raises:
        UsageError: names the field.
    """
    for name, maximum in most.items():
        value = getattr(config, name)
        if value is None or (0 < value < math.inf if maximum is None else 0 < value <= maximum):
            continue
        bound = "" if maximum is None else f" and at most {maximum}"
        raise UsageError(f"{name} must be above 0{bound}, got {value}")


def one_of(config: object, **allowed: Sequence[str]) -> None:
    """Refuse fields that are none of their words.

    Raises:
        UsageError: names the field and its words.
    """
    for name, words in allowed.items():
        if (value := getattr(config, name)) not in words:
            raise UsageError(f"{name} must be one of {', '.join(words)}, got {value!r}")


def check_words(config: Any) -> None:
    """Refuse fields of a Literal type that have another value.

    Raises:
        UsageError: names the field and its words.
    """
    words = {f.name: get_args(f.type) for f in fields(config) if get_origin(f.type) is Literal}
    one_of(config, **words)
