"""Token ids to text, one token at a time, up to a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_CONTEXT = 6  # tokens decoded again in front of new ones, so that spaces and bytes join up


@dataclass
class Detokenizer:
    """Turns a growing answer into text.

    Text is given out when it can no longer change: not while it may be the beginning of a stop
    string, nor inside a character whose bytes are not all there.
    """

    tokenizer: Any
    prompt_token_ids: Sequence[int]
    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    text: str = ""  # decoded so far
    stop_reason: str | None = None
    _ids: list[int] = field(default_factory=list)
    _decoded: int = 0  # _ids[:_decoded] are in text
    _context: int = 0  # where decoding starts again
    _given: int = 0  # text[:_given] has been handed out

    def __post_init__(self) -> None:
        self._ids = list(self.prompt_token_ids[-_CONTEXT:])
        self._decoded = len(self._ids)

    def add(self, token_id: int, may_stop: bool = True) -> bool:
        """Append a token. True if a stop string now ends the text (never without may_stop)."""
        self._ids.append(token_id)
        before = self._decode(self._context, self._decoded)
        after = self._decode(self._context, len(self._ids))
        if len(after) <= len(before):
            return False  # nothing to show
        searched, new = len(self.text), after[len(before) :]
        if after.endswith("�"):  # an unfinished character; a stop string may stand before it
            text, self.text = self.text, self.text + new.rstrip("�")
            if may_stop and self._find_stop(searched):
                return True
            self.text = text
            return False
        self.text += new
        self._context, self._decoded = self._decoded, len(self._ids)
        return may_stop and self._find_stop(searched)

    def take(self, final: bool) -> str:
        """The text that is new since the last call and can no longer change; all of it if final."""
        if final and self.stop_reason is None and self._decoded < len(self._ids):
            before = self._decode(self._context, self._decoded)
            self.text += self._decode(self._context, len(self._ids))[len(before) :]
            self._decoded = len(self._ids)
        stop = len(self.text) if final else len(self.text) - self._held_back()
        new = self.text[self._given : stop]
        self._given = max(self._given, stop)
        return new

    def _decode(self, start: int, stop: int) -> str:
        text: str = self.tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=self.skip_special_tokens
        )
        return text

    def _find_stop(self, searched: int) -> bool:
        """Cut the text at the first stop string that ends beyond `searched`."""
        found = []
        for stop in self.stop_strings:
            at = self.text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0:
                found.append((at, stop))
        if not found:
            return False
        at, self.stop_reason = min(found)
        self.text = self.text[: at + len(self.stop_reason) if self.include_stop else at]
        return True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self.stop_reason is not None:
            return 0
        longest = 0
        for stop in self.stop_strings:
            for length in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
