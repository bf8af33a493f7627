"""Readiness: the obstacle between an adapter and the next step."""

from enum import Enum


class Readiness(Enum):
    """The place of a version's values, as the scheduler needs to know it."""

    READY = "ready"  # on the device
    COMING = "coming"  # on their way
    NO_ROOM = "no room"  # the adapters in use leave none
    FAILED = "failed"  # they cannot be had
