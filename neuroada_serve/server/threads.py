"""Threads for what may wait long, or for ever."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def in_daemon_thread(run: Callable[[], T], name: str) -> asyncio.Future[T]:
    """The result of `run`, of the event loop. Its thread does not keep the process alive, as an
    executor's would."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if found.cancelled():
            return
        if error is None:
            found.set_result(result)
        else:
            found.set_exception(error)

    def main() -> None:
        result, failure = None, None
        try:
            result = run()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=main, name=name, daemon=True).start()
    return found
