"""A reader of pickles as data: nothing in them is ever run.

`pickle` builds whatever a file names, so a file can run any program. Here the few instructions that
tensors and containers need are carried out on plain Python values, and a name in the file only
chooses among the functions that the caller gives. All else is refused where it stands.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
    "SHORT_BINBYTES",
    "BINBYTES",
    "BINBYTES8",
}
_EMPTY: dict[str, Callable[[], object]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class InertPickleError(Exception):
    """The pickle is broken, or asks for more than data."""


class Stateful:
    """A stand-in for an object to which the pickle gives a state."""

    state: object = None


class _Name:
    """A global that the pickle names."""

    def __init__(self, dotted: str) -> None:
        self.dotted = dotted


def read_pickle(data: bytes, functions: Mapping[str, Callable[..., object] | None]) -> Any:
    """Return the value that a pickle describes.

    Args:
        data: the pickle.
        functions: by dotted name, what the pickle may call; None for a name that it may mention.
            A `Stateful` that one returns gets its state. They see hostile arguments.

    Returns:
        Made of None, bool, int, str, bytes, tuple, list, dict with str keys, and of what the
        functions return.

    Raises:
        InertPickleError: anything else is in it.
    """
    try:
        return _run(data, functions)
    except InertPickleError:
        raise
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise InertPickleError(f"it is not a whole pickle ({error})") from error


def _run(data: bytes, functions: Mapping[str, Callable[..., object] | None]) -> Any:
    stack: list[Any] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[Any, object] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, arg, _ in pickletools.genops(data):
        kind = opcode.name
        if kind in ("PROTO", "FRAME"):
            pass
        elif kind in _LITERALS:
            stack.append(arg)
        elif kind in _CONSTANTS:
            stack.append(_CONSTANTS[kind])
        elif kind in _EMPTY:
            stack.append(_EMPTY[kind]())
        elif kind in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[kind])]
            stack.append(tuple(reversed(items)))
        elif kind == "MARK":
            marks.append(len(stack))
        elif kind == "TUPLE":
            stack.append(tuple(since_mark()))
        elif kind == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif kind in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif kind in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif kind in ("APPEND", "APPENDS"):
            items = since_mark() if kind == "APPENDS" else [stack.pop()]
            _of_type(stack[-1], list).extend(items)
        elif kind in ("SETITEM", "SETITEMS"):
            pairs = since_mark() if kind == "SETITEMS" else [stack.pop(-2), stack.pop()]
            target = _of_type(stack[-1], dict)
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                target[_of_type(key, str)] = value  # other keys could hash without end
        elif kind in ("GLOBAL", "STACK_GLOBAL"):
            parts = str(arg).split() if kind == "GLOBAL" else [stack.pop(-2), stack.pop()]
            dotted = ".".join(_of_type(part, str) for part in parts)
            if dotted not in functions:
                raise InertPickleError(f"it names {dotted[:80]!r}, which no such file needs")
            stack.append(_Name(dotted))
        elif kind == "REDUCE":
            arguments = _of_type(stack.pop(), tuple)
            name = _of_type(stack.pop(), _Name)
            function = functions[name.dotted]
            if function is None:
                raise InertPickleError(f"it calls {name.dotted!r}")
            stack.append(function(*arguments))
        elif kind == "BUILD":
            state = stack.pop()
            _of_type(stack[-1], Stateful).state = state
        elif kind == "STOP":
            return stack.pop()
        else:
            raise InertPickleError(f"it has the instruction {kind}, which no such file needs")
    raise InertPickleError("it has no end")


def _of_type(value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise InertPickleError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value
