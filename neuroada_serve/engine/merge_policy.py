"""Which adapter is worth keeping merged. Pure Python."""

from collections import Counter
from collections.abc import Iterable

_ADVANTAGE = 2  # sequences by which another group must be larger
_PATIENCE = 4  # steps in a row


class AutoMerge:
    """Keeps the largest group of sequences free of bypass work.

    With nothing merged the base's sequences are the free ones; with A merged those of A are, and
    all others, the base's among them, pay one correction each. So the group to free is simply the
    largest one. A switch costs a part of a step, so it takes a clear advantage that lasts.
    """

    def __init__(self) -> None:
        self._candidate: str | None = None
        self._steps = 0

    def choose(self, running: Iterable[str | None], merged: str | None) -> str | None:
        """The adapter to have merged during the next step, None for none.

        Args:
            running: the adapter of every running or waiting sequence, None for the base.
            merged: the adapter that is merged now.
        """
        counts = Counter(running)
        if not counts:
            return merged
        best = max(counts, key=lambda name: (counts[name], name == merged))
        if best == merged or counts[best] < counts[merged] + _ADVANTAGE:
            self._candidate, self._steps = None, 0
            return merged
        if self._steps == 0 or self._candidate != best:
            self._candidate, self._steps = best, 0
        self._steps += 1
        if self._steps < _PATIENCE:
            return merged
        self._candidate, self._steps = None, 0
        return best
