"""The time that the engine's thread has been in its current step."""

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)


class Heartbeat:
    """Tells a step that hangs from one that runs: its thread enters it for each step, and all
    other threads ask.

    Args:
        limit_s: a step that takes longer hangs.
        clock: returns seconds.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._step: tuple[int, float] | None = None  # thread, begin; replaced as a whole

    def __enter__(self) -> Self:
        self._step = threading.get_ident(), self._clock()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._step = None

    @property
    def hangs_s(self) -> float | None:
        """Seconds that a hanging step has taken so far; None while there is none."""
        return self._age(self._step)

    async def watch(self) -> None:
        """Log every step that hangs, once with the stack of its thread, and its end; until
        cancelled."""
        logged: tuple[int, float] | None = None
        while True:
            await asyncio.sleep(min(1.0, self._limit_s / 4))
            step = self._step
            if logged is not None and step is not logged:
                took_s = self._clock() - logged[1]
                logger.warning("the step that hung has ended after some %.0f s", took_s)
                logged = None
            age_s = self._age(step)
            if logged is None and step is not None and age_s is not None:
                self._log(step[0], age_s)
                logged = step

    def _age(self, step: tuple[int, float] | None) -> float | None:
        if step is None:
            return None
        age_s = self._clock() - step[1]
        return age_s if age_s > self._limit_s else None

    def _log(self, thread: int, age_s: float) -> None:
        frame = sys._current_frames().get(thread)
        stack = "Stack of the engine's thread:\n" + "".join(traceback.format_stack(frame))
        message = "a step of the engine hangs: it has taken %.0f s; /health is 503 until it ends"
        record = logger.makeRecord(
            logger.name, logging.ERROR, __file__, 0, message, (age_s,), None, sinfo=stack.rstrip()
        )
        if logger.isEnabledFor(logging.ERROR):
            logger.handle(record)
