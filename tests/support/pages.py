"""The pages that people read: README and docs/, and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (README, *sorted((ROOT / "docs").rglob("*.md")))
}
TEXT = "\n".join(PAGES.values())
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: str
    language: str
    text: str


BLOCKS = [Block(page, *found) for page, text in PAGES.items() for found in _FENCE.findall(text)]
PROSE = _FENCE.sub("", TEXT)


def blocks(language: str) -> list[str]:
    """Distinct blocks in a language. Pages repeat some."""
    return list(dict.fromkeys(block.text for block in BLOCKS if block.language == language))


def block_with(words: str, language: str = "bash") -> str:
    """The one block that contains some words."""
    (found,) = (text for text in blocks(language) if words in text)
    return found
