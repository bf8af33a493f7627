"""Wakes the engine's thread."""

import threading


class Wakeup:
    """Wakes one thread when there may be new work. The thread waits before it looks for work, so
    that no wakeup is lost."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._event.set()  # whatever there was to do before anybody listened

    def notify(self) -> None:
        """End the current wait, or the next one; call in any thread."""
        self._event.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until `notify` is called, or was since the last wait, or until the timeout; return
        whether it was called."""
        is_notified = self._event.wait(timeout_s)
        self._event.clear()
        return is_notified
