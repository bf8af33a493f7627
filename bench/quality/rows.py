"""Rows of the quality benchmark: drawn once, as token ids, and batches made of them."""

import argparse
import gzip
import json
import os
import random
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.errors import DataError
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.quiet import quiet_transformers
from neuroada_serve.train.examples import encode_row
from neuroada_serve.train.shapes import Row

_WINDOW = 4  # batches whose rows are sorted by length together
_FORMAT = re.compile(r"Answer format: (\S+)\s*$")


@dataclass(frozen=True)
class Task:
    """File to train on, and those to score on: name -> (file, kind of score)."""

    train: str
    evals: dict[str, tuple[str, str]]


TASKS = {
    "math": Task(
        "math_10k.train",
        {
            "math_10k": ("math_10k.train", "loss"),
            "MultiArith": ("MultiArith.test", "number"),
            "AddSub": ("AddSub.test", "number"),
        },
    ),
    "commonsense": Task(
        "commonsense_15k.train",
        {
            "commonsense": ("commonsense_15k.validation", "choice"),
            "BoolQ": ("boolq.test", "choice"),
            "ARC-Easy": ("ARC-Easy.test", "choice"),
        },
    ),
}


def prepare(base: BaseModel, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Draw the rows that are trained or scored on, once, and encode them.

    Returns:
        A JSON document: "base", "fingerprint", "sizes", and per task "train" and "tune" (rows of
        "p", "a": ids of prompt and answer) and "evals": name -> "kind", "majority", "chance",
        "rows". Rows to choose in have "at", "o", "y": where in the answer the options part, each
        option's token there, and which is right; word problems have "n", the number.
    """
    tasks: dict[str, Any] = {}
    for name, task in TASKS.items():
        drawn = _draw(read_jsonl(data / f"{task.train}.jsonl.gz"), task.train)
        count = args.train_rows + args.tune_rows
        own = args.eval_rows if any(f == task.train for f, _ in task.evals.values()) else 0
        encoded = _encode_rows(base, drawn, "loss", args.max_length, count + own)
        train, spare = encoded[:count], encoded[count:]
        trained = {row["instruction"] for row in drawn}
        evals = {}
        for eval_name, (file, kind) in task.evals.items():
            rows = spare
            if file != task.train:
                raw = _draw(read_jsonl(data / f"{file}.jsonl.gz"), file)
                raw = [row for row in raw if row["instruction"] not in trained]
                rows = _encode_rows(base, raw, kind, args.max_length, args.eval_rows)
            if not rows:
                raise DataError(f"no rows are left to score {eval_name}; lower --train-rows")
            evals[eval_name] = {"kind": kind, **_guesses(rows, kind), "rows": rows}
        tune, rest = train[: args.tune_rows], train[args.tune_rows :]
        if not tune or not rest:
            raise DataError(f"{task.train} has too few rows of {args.max_length} tokens to train")
        tasks[name] = {"train": rest, "tune": tune, "evals": evals}
    sizes = {name: getattr(args, name) for name in ("train_rows", "tune_rows", "eval_rows")}
    sizes["max_length"] = args.max_length
    return {
        "base": base.spec.name,
        "fingerprint": base.spec.fingerprint,
        "sizes": sizes,
        "tasks": tasks,
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a gzipped file of one JSON object a line."""
    try:
        with gzip.open(path, "rt") as file:
            return [json.loads(line) for line in file]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); name its folder by --data") from error


def _draw(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Shuffle rows by the file's name alone; keep each prompt once."""
    once = list({row["instruction"]: row for row in rows}.values())
    random.Random(name).shuffle(once)
    return once


def _encode_rows(
    base: BaseModel, rows: Sequence[dict[str, Any]], kind: str, most: int, count: int
) -> list[dict[str, Any]]:
    """Encode the first `count` rows of at most `most` tokens."""
    found: list[dict[str, Any]] = []
    with quiet_transformers():
        for row in rows:
            if len(found) == count:
                break
            encoded = encode(base, row, kind)
            if len(encoded["p"]) + len(encoded["a"]) <= most:
                found.append(encoded)
    return found


def encode(base: BaseModel, row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Encode a row as `prepare` describes it."""

    def ids(answer: str) -> tuple[list[int], list[int]]:
        messages = ({"role": "user", "content": row["instruction"]},)
        example = encode_row(base, Row(0, messages, row["instruction"] + "\n", answer), "chat")
        return list(example.prompt_ids), list(example.answer_ids)

    prompt, answer = ids(row["output"])
    encoded: dict[str, Any] = {"p": prompt, "a": answer}
    if kind == "number":
        encoded["n"] = float(row["answer"])
    if kind == "choice":
        options = options_of(row["instruction"])
        right, output = str(row["answer"]), str(row["output"])
        if right not in options or not output.endswith(right):
            raise DataError(f"answer {right!r} is none of {options} at the end of {output!r}")
        stem = output.removesuffix(right)
        answers = [ids(stem + option)[1] for option in options]
        at = len(os.path.commonprefix(answers))
        encoded |= {"at": at, "o": [a[at] for a in answers], "y": options.index(right)}
        if len(set(encoded["o"])) < len(options):
            raise DataError(f"options {options} do not part at one token in this tokenizer")
    return encoded


def options_of(instruction: str) -> list[str]:
    """Answers that an instruction allows, by its last line, such as true/false."""
    if (found := _FORMAT.search(instruction)) is None:
        raise DataError(f"no 'Answer format: a/b' at the end of {instruction[-80:]!r}")
    return found[1].split("/")


def _guesses(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, float | None]:
    """Accuracy without reading the question.

    Returns:
        majority: always the commonest answer among rows of the same options.
        chance: guessing.
    """
    if kind == "number":
        [(_, most)] = Counter(row["n"] for row in rows).most_common(1)
        return {"majority": most / len(rows), "chance": None}
    if kind == "loss":
        return {"majority": None, "chance": None}
    groups: dict[tuple[int, ...], Counter[int]] = {}
    for row in rows:
        groups.setdefault(tuple(row["o"]), Counter())[row["y"]] += 1
    return {
        "majority": sum(max(group.values()) for group in groups.values()) / len(rows),
        "chance": statistics.fmean(1 / len(row["o"]) for row in rows),
    }


def load_prepared(path: Path) -> Any:
    """Read the rows that `prepare` made."""
    try:
        with gzip.open(path, "rt") as file:
            return json.load(file)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); make it by --prepare") from error


# --- batches ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; no mask is needed, since no token sees the padding behind it.

    input_ids: [rows, width] int64.
    predicting: [answer_tokens] int64, flat positions whose logits predict the targets.
    targets: [answer_tokens] int64, row after row.
    starts: of each row, where its answer begins in `targets`.
    """

    input_ids: Tensor
    predicting: Tensor
    targets: Tensor
    starts: list[int]


def make_batch(rows: Sequence[Mapping[str, Any]], device: torch.device) -> Batch:
    """Pad rows to the longest."""
    width = max(len(row["p"]) + len(row["a"]) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    predicting, targets, starts = [], [], []
    for i, row in enumerate(rows):
        start, stop = len(row["p"]), len(row["p"]) + len(row["a"])
        input_ids[i, :stop] = torch.tensor(row["p"] + row["a"])
        starts.append(len(targets))
        predicting += range(i * width + start - 1, i * width + stop - 1)
        targets += row["a"]
    flat = torch.tensor(predicting), torch.tensor(targets)
    return Batch(input_ids.to(device), flat[0].to(device), flat[1].to(device), starts)


def batches_of(
    rows: Sequence[Mapping[str, Any]], size: int, steps: int, seed: int
) -> list[list[Mapping[str, Any]]]:
    """Draw `steps` batches: passes over the rows in random order, similar lengths together."""
    draw = random.Random(seed)
    batches: list[list[Mapping[str, Any]]] = []
    while len(batches) < steps:
        shuffled = draw.sample(rows, len(rows))
        one_pass = []
        for start in range(0, len(shuffled), _WINDOW * size):
            window = shuffled[start : start + _WINDOW * size]
            window.sort(key=lambda row: len(row["p"]) + len(row["a"]))
            one_pass += [window[i : i + size] for i in range(0, len(window), size)]
        draw.shuffle(one_pass)
        batches += one_pass
    return batches[:steps]
