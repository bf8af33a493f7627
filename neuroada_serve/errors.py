"""Exceptions that this package raises on purpose.

NeuroAdaError
├── UsageError                  the caller's mistake; the message carries the fix
│   ├── RequestError            a request that cannot be run (bad parameter, too long, empty)
│   ├── ModelError              a base model that is absent, unreadable or of an unsupported kind
│   ├── DataError               training or evaluation rows that do not fit
│   ├── AdapterError            an adapter that cannot be used
│   │   ├── AdapterFormatError  its files break the format; `.faults` lists the faults found
│   │   ├── AdapterNotFoundError
│   │   ├── AdapterConflictError  its name is taken
│   │   └── AdapterInUseError   requests still run with it; `.num_leases` says how many
│   └── ShapeError              tensors that disagree; the message names both shapes
├── Unavailable                 no request is accepted now: full, stopping, or the engine is dead
│   └── AdapterUnavailable      none for this adapter: its files are gone, or there is no room
└── EngineError                 an internal failure; the process should stop serving
    ├── DeviceError             the device works no more for this process
    └── DirtyWeightsError       base weights could not be restored after a failed merge
"""

from collections.abc import Sequence

MAX_FAULTS = 20  # kept by one error
_MOST_SHOWN = 5  # faults in its message


class NeuroAdaError(Exception):
    """Root of every exception raised on purpose by this package."""


class UsageError(NeuroAdaError):
    """The caller's mistake. The message says what is wrong and what would be right."""


class RequestError(UsageError):
    """A request that cannot be run; `param` is the field at fault, if there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelError(UsageError):
    """A base model that is absent, unreadable or of an unsupported kind."""


class DataError(UsageError):
    """Training or evaluation rows that do not fit."""


class AdapterError(UsageError):
    """An adapter that cannot be used."""


class AdapterFormatError(AdapterError):
    """An adapter whose files break the format, or that belongs to another base."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults[:MAX_FAULTS])
        super().__init__(f"adapter {source}: {listed_faults(faults)}")


def listed_faults(faults: Sequence[str]) -> str:
    """List the first faults, and how many more there are."""
    more = len(faults) - _MOST_SHOWN
    return "; ".join([*faults[:_MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])])


class AdapterNotFoundError(AdapterError):
    """No adapter of this name, or no files at this path."""


class AdapterConflictError(AdapterError):
    """The name is taken by another adapter, or by the base model."""


class AdapterInUseError(AdapterError):
    """An adapter that cannot be unloaded yet, as `num_leases` requests run with it."""

    def __init__(self, name: str, num_leases: int) -> None:
        super().__init__(
            f"adapter {name!r} is in use by {num_leases} request{'s' * (num_leases != 1)}; it is "
            "served as before. Wait longer, or have them aborted"
        )
        self.num_leases = num_leases


class ShapeError(UsageError):
    """Tensors whose shapes or dtypes disagree."""


class Unavailable(NeuroAdaError):
    """No request is accepted now: the queue is full, the server stops, or its engine is dead."""


class AdapterUnavailable(Unavailable):
    """A known adapter that cannot be used now, while others can."""


class EngineError(NeuroAdaError):
    """An internal failure; the process should stop serving."""


class DeviceError(EngineError):
    """The device has failed for good; start a new process."""


class DirtyWeightsError(EngineError):
    """The base weights could not be restored after a failed merge; restart the process."""
