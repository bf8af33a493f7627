"""Handle Ctrl-C while training: the step under way is finished, so that its result can be kept."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from neuroada_serve.train.loop import Notify


@contextmanager
def between_steps(notify: Notify) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C inside a block only set a flag; the second acts as usual.

    Yields:
        A function that tells whether Ctrl-C was pressed. Outside the main thread, and where the
        program has a handler of its own, nothing changes.
    """
    asked = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        notify("Stopping after this step; Ctrl-C again stops at once.")

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
