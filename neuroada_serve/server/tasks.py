"""Tasks of the event loop that run beside the requests, and whose result nobody waits for."""

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


def heard(
    task: asyncio.Task[T], name: str, on_failure: Callable[[], None] = lambda: None
) -> asyncio.Task[T]:
    """Log what a task fails with, when it does: asyncio would say nothing of a task that is kept.

    Args:
        name: of what it does, as the subject of a sentence.
        on_failure: called then.
    """

    def ended(task: asyncio.Task[T]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            cause = f"{type(error).__name__}: {error}"
            logger.critical("%s failed: %s", name, cause, exc_info=error)
            on_failure()

    task.add_done_callback(ended)
    return task
