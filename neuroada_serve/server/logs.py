"""The server's log on stderr: one line per event, and repeated warnings limited."""

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MOST_KINDS = 256
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class FloodFilter(logging.Filter):
    """Pass at most `most` warnings of a kind per period; the first one afterwards says how many
    were left out. A kind is a logger's message before its arguments are filled in.

    Args:
        clock: returns seconds.
    """

    def __init__(
        self, most: int = 5, period_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._most = most
        self._period_s = period_s
        self._clock = clock
        self._seen: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:  # one line each was asked for
            return True
        kind, now = (record.name, str(record.msg)[:200]), self._clock()
        since, count = self._seen.get(kind, (now, 0))
        num_left_out = 0
        if now - since >= self._period_s:
            num_left_out, since, count = max(0, count - self._most), now, 0
        self._seen[kind] = since, count + 1
        self._seen.move_to_end(kind)
        if len(self._seen) > _MOST_KINDS:
            self._seen.popitem(last=False)
        if num_left_out:
            record.msg = f"{record.getMessage()} ({num_left_out} more like it were left out)"
            record.args = None
        return count < self._most


class LineFormatter(logging.Formatter):
    """Write level, time and message on one line, control characters escaped; tracebacks below."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(lambda found: repr(found[0])[1:-1], super().formatMessage(record))


@contextmanager
def logged(level: str) -> Iterator[None]:
    """Send this package's messages from `level` on, and others' warnings, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    handler.addFilter(FloodFilter())
    root, own = logging.getLogger(), logging.getLogger("neuroada_serve")
    before = own.level
    root.addHandler(handler)
    own.setLevel(level.upper())
    try:
        yield
    finally:
        own.setLevel(before)
        root.removeHandler(handler)
