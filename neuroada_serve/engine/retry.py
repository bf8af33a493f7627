"""Pauses before something that has failed is tried again."""


class Retry:
    """Says when something may be tried again: after a pause, which doubles with every failure.

    Args:
        first, longest: pauses, in turns.

    num_failed: failures so far.
    """

    def __init__(self, first: int, longest: int) -> None:
        self.num_failed = 0
        self._pause = first
        self._longest = longest
        self._left = 0

    @property
    def is_due(self) -> bool:
        """True if nothing has failed yet, or the pause is over."""
        return not self._left

    def pass_turn(self) -> None:
        """Let one turn of the pause go by."""
        self._left = max(0, self._left - 1)

    def fail(self) -> None:
        """Count a failure and begin the next pause."""
        self.num_failed += 1
        self._left = self._pause
        self._pause = min(self._longest, 2 * self._pause)

    def __str__(self) -> str:
        return f"in {self._left} turns"
