"""A first-fit allocator of extents in one memory; neighbouring holes are joined."""

from bisect import bisect_left


class Extents:
    """Extents of a memory of `size` units, handed out and taken back."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._starts = [0] if size else []  # of the free stretches, in order
        self._sizes = [size] if size else []
        self._taken: dict[int, int] = {}  # start -> size
        self.num_taken = 0

    @property
    def num_free(self) -> int:
        """Free units, not necessarily in one piece."""
        return self.size - self.num_taken

    def take(self, size: int) -> int | None:
        """Return where an extent of this size begins; None if no hole is that large."""
        assert size > 0
        for at, free in enumerate(self._sizes):
            if free >= size:
                start = self._starts[at]
                if free == size:
                    del self._starts[at], self._sizes[at]
                else:
                    self._starts[at] += size
                    self._sizes[at] -= size
                self._taken[start] = size
                self.num_taken += size
                return start
        return None

    def free(self, start: int) -> None:
        """Take an extent back."""
        size = self._taken.pop(start)
        self.num_taken -= size
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and start + size == self._starts[at]:
            size += self._sizes[at]
            del self._starts[at], self._sizes[at]
        if at and self._starts[at - 1] + self._sizes[at - 1] == start:
            self._sizes[at - 1] += size
        else:
            self._starts.insert(at, start)
            self._sizes.insert(at, size)

    def shrink(self, start: int, size: int) -> None:
        """Take back the part of an extent beyond this size."""
        before = self._taken[start]
        assert 0 < size <= before
        if size < before:
            self._taken[start] = size
            self._taken[start + size] = before - size
            self.free(start + size)

    def close_holes(self) -> dict[int, int]:
        """Move all extents to the beginning, in order; return old start -> new start, rising."""
        moves, end = {}, 0
        for start, size in sorted(self._taken.items()):
            moves[start] = end
            end += size
        self._taken = {moves[start]: size for start, size in self._taken.items()}
        self._starts, self._sizes = ([end], [self.size - end]) if end < self.size else ([], [])
        return moves
