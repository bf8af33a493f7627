"""Incremental detokenizer: token ids to text, one token at a time, up to a stop string.

A token costs the same however long the text is, and whatever the stop strings are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_CONTEXT = 6  # tokens decoded again in front of new ones, so that spaces and bytes join up
_MOST_PENDING = 16  # tokens that end within a character; a character has at most four bytes
_TAIL = 8  # of them, so many may be those of a last character


class _StopString:
    """A stop string, and how much of it the text ends with (Knuth, Morris and Pratt). The table
    of borders grows only as far as the text has ever matched."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = [0]  # of text[: i + 1]: its longest end that is also its beginning

    @property
    def held_back(self) -> int:
        """Length of the longest end of the text that may become the stop string."""
        return self._shorter() if self.matched == len(self.text) else self.matched

    def read(self, new: str) -> int | None:
        """Continue with new text; return where in it the stop string first ends, if it does."""
        if not self.matched and self.text[0] not in new:
            return None
        stop, found = self.text, None
        for place, char in enumerate(new):
            while self.matched and (self.matched == len(stop) or char != stop[self.matched]):
                self.matched = self._shorter()
            if char == stop[self.matched]:
                self.matched += 1
                self._extend()
                if self.matched == len(stop) and found is None:
                    found = place + 1
        return found

    def _shorter(self) -> int:
        return self._borders[self.matched - 1]

    def _extend(self) -> None:
        """Extend the table by the border of the text matched so far."""
        last = self.matched - 1
        if last < len(self._borders):
            return
        border = self._borders[last - 1]
        while border and self.text[last] != self.text[border]:
            border = self._borders[border - 1]
        self._borders.append(border + (self.text[last] == self.text[border]))


@dataclass
class Detokenizer:
    """Turn a growing list of token ids into text.

    Text is given out when it can no longer change: not while it may be the beginning of a stop
    string, nor inside a character whose bytes are not all there.
    """

    tokenizer: Any
    prompt_token_ids: Sequence[int]
    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    stop_reason: str | None = None
    num_chars: int = 0  # of the text so far, given out or not
    _text: str = ""  # decoded and not given out yet
    _stops: list[_StopString] = field(default_factory=list)
    # Tokens that may be decoded again: the first _decoded of them are in the text.
    _ids: list[int] = field(default_factory=list)
    _decoded: int = 0

    def __post_init__(self) -> None:
        self._ids = list(self.prompt_token_ids[-_CONTEXT:])
        self._decoded = len(self._ids)
        self._stops = [_StopString(stop) for stop in self.stop_strings]

    def add(self, token_id: int, may_stop: bool = True) -> bool:
        """Append a token. True if a stop string now ends the text (never without may_stop)."""
        self._ids.append(token_id)
        new = self._new_text()
        if not new:
            return False
        if new.endswith("\ufffd"):  # an unfinished character; a stop string may stand before it
            begun = [stop.matched for stop in self._stops]
            if self._read(new.rstrip("\ufffd"), may_stop):
                return True
            for stop, matched in zip(self._stops, begun, strict=True):
                stop.matched = matched
            return self._settle(may_stop)
        # What was decoded last is the context of what comes next.
        del self._ids[: self._decoded]
        self._decoded = len(self._ids)
        return self._read_and_keep(new, may_stop)

    def take(self, final: bool) -> str:
        """Return the new text that can no longer change; all of it if final."""
        if final and self.stop_reason is None:
            self._text += self._new_text()
            self._decoded = len(self._ids)
        held = 0 if final or self.stop_reason is not None else self._held_back()
        stop = len(self._text) - held
        new, self._text = self._text[:stop], self._text[stop:]
        return new

    def _new_text(self) -> str:
        """Return the text of the tokens that are not in the text yet."""
        if self._decoded == len(self._ids):
            return ""
        before, after = self._decode(0, self._decoded), self._decode(0, len(self._ids))
        return after[len(before) :]

    def _settle(self, may_stop: bool) -> bool:
        """Take all but the end of a long run of tokens that makes no whole character, and never
        may, into the text, so that it is not decoded again with every token."""
        if (len(self._ids) - self._decoded) % _MOST_PENDING:
            return False
        whole = self._decode(0, len(self._ids))
        for cut in range(len(self._ids) - 1, len(self._ids) - _TAIL, -1):
            first = self._decode(0, cut)
            if first + self._decode(cut, len(self._ids)) == whole:  # not within a character
                new = first[len(self._decode(0, self._decoded)) :]
                del self._ids[:cut]
                self._decoded = 0
                return self._read_and_keep(new, may_stop)
        return False

    def _decode(self, start: int, stop: int) -> str:
        text: str = self.tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=self.skip_special_tokens
        )
        return text

    def _read_and_keep(self, new: str, may_stop: bool) -> bool:
        if self._read(new, may_stop):
            return True
        self._text += new
        self.num_chars += len(new)
        return False

    def _read(self, new: str, may_stop: bool) -> bool:
        """Look for stop strings that end in new text. Cut it at the one that begins first."""
        found = []
        for stop in self._stops:
            end = stop.read(new)
            if end is not None:
                found.append((end - len(stop.text), stop.text))
        if not found or not may_stop:
            return False
        at, self.stop_reason = min(found)
        end = len(self._text) + (at + len(self.stop_reason) if self.include_stop else at)
        self._text = (self._text + new)[:end]
        return True

    def _held_back(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        return max((stop.held_back for stop in self._stops), default=0)
