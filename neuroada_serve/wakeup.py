"""Wakes the engine's thread."""

import threading


class Wakeup:
    """Tells one thread that there may be something new to do or to find. The thread waits before it
    looks, so that nothing said meanwhile is lost."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._event.set()  # whatever there was to do before anybody listened

    def notify(self) -> None:
        """End the wait that runs, or the next one. In any thread."""
        self._event.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until `notify` has been called since the last wait, or for so long; whether it
        has."""
        is_notified = self._event.wait(timeout_s)
        self._event.clear()
        return is_notified
