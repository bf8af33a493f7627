"""Shared by the generators here: draw distinct rows for two splits and write them as JSON lines.

A generator supplies `draw(rng, split) -> Row`. The two splits draw from separate vocabularies, so
held-out scores measure the task and not memory. The same seed writes the same bytes.
"""

import argparse
import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any

Row = dict[str, Any]


class Split(Enum):
    """Which half of the vocabulary a row may use."""

    TRAIN = "train"
    HELDOUT = "heldout"


Draw = Callable[[Random, Split], Row]


# Parts of a made-up name, one syllable to an onset and a vowel.
_ONSETS = (
    "b",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "qu",
    "r",
    "s",
    "sh",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = (
    "n",
    "r",
    "l",
    "s",
    "nd",
    "ck",
    "rt",
    "m",
    "x",
    "t",
    "lan",
    "ber",
    "ton",
    "dor",
    "mi",
    "ra",
    "no",
)


def made_name(rng: Random) -> str:
    """A name that nobody has, such as "Drealan": a value that can be copied but not remembered."""
    syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 1, 2)))]
    return ("".join(syllables) + rng.choice(_CODAS)).capitalize()


def prompt_of(row: Row) -> str:
    """What the model is shown of a row, in any of the three shapes."""
    if "messages" in row:
        return str(row["messages"][0]["content"])
    if "prompt" in row:
        return str(row["prompt"])
    return f"{row['instruction']}\n{row['input']}"


def draw_rows(draw: Draw, rng: Random, split: Split, count: int) -> list[Row]:
    """Draw until there are `count` rows with distinct prompts.

    Raises:
        ValueError: the generator's vocabulary is too small for `count`.
    """
    rows: dict[str, Row] = {}
    for _ in range(200 * count):
        if len(rows) == count:
            break
        row = draw(rng, split)
        rows.setdefault(prompt_of(row), row)
    if len(rows) < count:
        raise ValueError(
            f"only {len(rows)} distinct {split.value} rows found for {count}; ask for fewer"
        )
    return list(rows.values())


def run(name: str, draw: Draw, train: int = 1200) -> None:
    """Command line of one generator: write NAME.train.jsonl and NAME.heldout.jsonl."""
    parser = argparse.ArgumentParser(description=f"Write rows for the '{name}' adapter.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write into; made if missing"
    )
    parser.add_argument("--train", type=int, default=train, help="training rows")
    parser.add_argument("--heldout", type=int, default=120, help="held-out rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    counts = {Split.TRAIN: args.train, Split.HELDOUT: args.heldout}
    # A string seed is hashed by content: stable across processes, and independent per split.
    splits = {
        split: draw_rows(draw, Random(f"{name}/{split.value}/{args.seed}"), split, count)
        for split, count in counts.items()
    }
    seen = {prompt_of(row) for row in splits[Split.TRAIN]}
    assert not any(prompt_of(row) in seen for row in splits[Split.HELDOUT]), (
        "a held-out prompt is in train"
    )

    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path = args.out / f"{name}.{split.value}.jsonl"
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        print(f"{path}: {len(rows)} rows")
