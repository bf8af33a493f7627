"""What stands between an adapter and the next step."""

from enum import Enum


class Readiness(Enum):
    """Where a version's values are, as the scheduler needs to know it."""

    READY = "ready"  # on the device
    COMING = "coming"  # on their way
    NO_ROOM = "no room"  # the adapters in use leave none
    FAILED = "failed"  # they cannot be had
