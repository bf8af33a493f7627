"""Signals that come before the server runs. Standard library only, as this is imported first."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

RESCAN_SIGNAL = getattr(signal, "SIGHUP", None)  # Windows has none
_TERMINATED = 128 + signal.SIGTERM


class EarlySignals:
    """While entered, remember a SIGHUP for the server, and exit at SIGTERM, which process 1 of a
    container would otherwise ignore. The server later replaces these handlers by its own.

    Args:
        notify: gets the reason before the process exits.
    """

    def __init__(self, notify: Callable[[str], None] = lambda message: None) -> None:
        self.hung_up = False
        self._notify = notify
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
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
        self._notify("Stopped before the server was ready.")
        raise SystemExit(_TERMINATED)
