"""Signals that come before there is a server. Standard library only: first thing in a process."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

RESCAN_SIGNAL = getattr(signal, "SIGHUP", None)  # Windows has none
_TERMINATED = 128 + signal.SIGTERM


class EarlySignals:
    """Keeps a SIGHUP until somebody can act on it, and ends the process at SIGTERM in an orderly
    way: as process 1 of a container it would otherwise not end at all. While entered; a server's
    own handlers take the place of these.

    Args:
        notify: told why the process ends.
    """

    def __init__(self, notify: Callable[[str], None] = lambda message: None) -> None:
        self.hung_up = False
        self._notify = notify
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._stop)
            if RESCAN_SIGNAL is not None:
                self._before[RESCAN_SIGNAL] = signal.signal(RESCAN_SIGNAL, self._keep)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _keep(self, sig: int, frame: FrameType | None) -> None:
        self.hung_up = True

    def _stop(self, sig: int, frame: FrameType | None) -> None:
        self._notify("Stopped before it served.")
        raise SystemExit(_TERMINATED)
