"""The model card of an adapter: README.md in its folder, made from its config.

A config is anybody's text. In the card its strings stand in code spans and code blocks, in table
cells as character references, without control characters: they show as they are and are never
Markdown, HTML or shell.
"""

import json
import math
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from neuroada_serve.adapters.durable import write_durably
from neuroada_serve.adapters.format import AdapterConfig
from neuroada_serve.config import ADAPTER_NAME, DEMO, DEMO_HUB_ID
from neuroada_serve.intervals import wilson
from neuroada_serve.tasks import CardCase, Task

CARD_FILE = "README.md"

_BEGIN = "<!-- neuroada: written anew by training and by `neuroada eval --save`, up to the end -->"
_END = "<!-- neuroada: end -->"
# Lines of their own: within one a config may say the same.
_OURS = re.compile(rf"^{re.escape(_BEGIN)}$.*?^{re.escape(_END)}$", re.MULTILINE | re.DOTALL)
_MOST_CHARACTERS = 300  # shown of one string
_MOST_ENTRIES = 60  # shown of one mapping
_MAX_CARD_BYTES = 1 << 20
_MOST_SAMPLES = 5
_SAMPLE_KEYS = ("question", "expected", "got")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def model_card(config: AdapterConfig, name: str = "my-adapter") -> str:
    """Return a model card in Markdown: what the adapter is, its recipe and scores, how to serve
    it, and a licence section for its author to fill in.

    Args:
        name: of the adapter, for its heading and its command lines.
    """
    tag = config.task.pipeline_tag
    front = f"---\nlibrary_name: neuroada-serve\npipeline_tag: {tag}\ntags: [neuroada]\n"
    base = config.base_model_name_or_path
    base = DEMO_HUB_ID if base == DEMO else base
    if _HUB_ID.fullmatch(base):
        front += f"base_model: {base}\nbase_model_relation: adapter\n"
    licence = "Licence: *for the author to fill in; that of the base applies as well.*\n"
    return f"{front}---\n\n# {_cell(name)}\n\n{licence}\n{_made_part(config, name)}\n"


def write_card(folder: Path, config: AdapterConfig) -> bool:
    """Write an adapter folder's card, durably; return False if there is a README.md of the
    author's own.

    Of a card that is there only the part between the two comments is written anew: what its author
    has put around it stays. A README.md without them is left alone.
    """
    path, name = folder / CARD_FILE, folder.resolve().name
    card = model_card(config, name)
    if path.exists():
        if path.stat().st_size > _MAX_CARD_BYTES:
            return False
        try:
            old = path.read_text("utf-8")
        except UnicodeDecodeError:
            return False
        ours = _OURS.search(old)
        if ours is None:
            return False
        card = old[: ours.start()] + _made_part(config, name) + old[ours.end() :]
    write_durably(path, card.encode())
    return True


def _made_part(config: AdapterConfig, name: str) -> str:
    metadata = config.metadata
    parts = [_facts(config), _use(config, name), *_examples(metadata), *_scores(config)]
    parts += _recipe(metadata)
    return "\n\n".join([_BEGIN, *parts, _END])


def _facts(config: AdapterConfig) -> str:
    lines = [
        "A NeuroAda adapter: a few extra values in every neuron of a frozen base model.",
        "",
        f"- base: {_code(config.base_model_name_or_path)}",
        f"- base fingerprint: {_code(config.base_fingerprint)}",
        f"- k: {config.k} values per neuron",
        f"- selection: {_code(config.selection)}",
        f"- modules: {_code(', '.join(config.target_modules))}",
    ]
    if summary := config.task.summary():
        labels = f" {_code(', '.join(config.labels))}" if config.labels else ""
        lines.append(f"- task: {summary}{labels}")
    return "\n".join(lines)


# --- how to use it ----------------------------------------------------------------------------


def _use(config: AdapterConfig, name: str) -> str:
    """Return commands that run from the folder's parent, with a prompt from the adapter's own
    data."""
    base = _line(config.base_model_name_or_path)
    base = "BASE" if not base or base.startswith("-") else base
    folder = _line(name)
    served = folder if ADAPTER_NAME.fullmatch(folder) else "my-adapter"
    flag = f"{shlex.quote(base)} --adapter {shlex.quote(f'{served}=./{folder}')}"
    recipe = config.metadata.get("recipe")
    is_plain = isinstance(recipe, Mapping) and recipe.get("prompt_format") == "plain"
    samples = _samples(config.metadata)
    prompt = samples[0]["question"] if samples else config.task.example
    text, model = _literal(prompt), _literal(served)
    case = CardCase(flag, shlex.quote(_line(prompt)), model, text, is_plain)
    usage = config.task.usage(case)
    imports = "LLM, SamplingParams" if usage.params else "LLM"
    body = f'{{"model": {model}, {usage.fields}}}'.replace("'", "\\u0027")
    return f"""## Use

In the terminal, from the folder that has this one in it:

```bash
{usage.command}
```

Over HTTP; the adapter's name is the `model` of a request:

```bash
neuroada serve {flag}
curl -s http://127.0.0.1:8000/v1/{usage.route} -H 'Content-Type: application/json' -d '{body}'
```

In Python:

```python
from neuroada_serve import {imports}

llm = LLM({_literal(base)}, adapters={{{model}: {_literal(f"./{folder}")}}})
prompt = {text}
{usage.params}[answer] = {usage.call}
```"""


def _samples(metadata: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return held-out questions and the adapter's answers, as training left them in the config."""
    found = metadata.get("samples")
    return [
        {key: sample[key] for key in _SAMPLE_KEYS}
        for sample in (found if isinstance(found, list) else [])[:_MOST_SAMPLES]
        if isinstance(sample, Mapping)
        and all(isinstance(sample.get(key), str) for key in _SAMPLE_KEYS)
    ]


def _examples(metadata: Mapping[str, Any]) -> Iterator[str]:
    samples = _samples(metadata)
    if not samples:
        return
    lines = ["| prompt | right | answer |", "|---|---|---|"]
    lines += [f"| {' | '.join(_cell(sample[key]) for key in _SAMPLE_KEYS)} |" for sample in samples]
    yield "## Examples\n\nOf rows that were held out.\n\n" + "\n".join(lines)


# --- how it was made, and what it scores -------------------------------------------------------


def _recipe(metadata: Mapping[str, Any]) -> Iterator[str]:
    recipe = metadata.get("recipe")
    if not isinstance(recipe, Mapping) or not recipe:
        return
    entries = list(recipe.items())
    lines = [f"- {_code(key)}: {_code(value)}" for key, value in entries[:_MOST_ENTRIES]]
    if len(entries) > _MOST_ENTRIES:
        lines.append(f"- and {len(entries) - _MOST_ENTRIES} more in `adapter_config.json`")
    yield "## Training\n\n" + "\n".join(lines)


def _scores(config: AdapterConfig) -> Iterator[str]:
    scores = config.metadata.get("scores")
    if not isinstance(scores, Mapping):
        return
    rows = [*_training_scores(scores, config.task), *_evaluations(scores)][:_MOST_ENTRIES]
    if not rows:
        return
    lines = ["| data | rows | score | base | adapter |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    yield (
        "## Scores\n\nIn brackets: 95 % intervals, Wilson's of shares of rows, else bootstrap.\n\n"
        + "\n".join(lines)
    )


def _training_scores(scores: Mapping[str, Any], task: Task) -> Iterator[list[str]]:
    """Return the scores on the rows that training held out, as it left them in the config."""
    rows, before, after = (scores.get(key) for key in ("heldout_rows", "before", "after"))
    if not _is_count(rows) or not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return
    by = scores.get(f"{task.figure}_by")
    how = f" ({_cell(by)})" if isinstance(by, str) else ""
    for key, words, is_share in (
        ("loss", task.loss, False),
        (task.figure, f"{task.figure_words}{how}", task.figure_is_share),
    ):
        if _is_number(before.get(key)) and _is_number(after.get(key)):
            cells = [
                _share(value, rows) if is_share else _figure(value)
                for value in (before[key], after[key])
            ]
            yield ["held out in training", str(rows), words, *cells]


def _evaluations(scores: Mapping[str, Any]) -> Iterator[list[str]]:
    """Return the scores that `neuroada eval --save` left in the config."""
    evaluated = scores.get("evaluated")
    if not isinstance(evaluated, Mapping):
        return
    for data, found in evaluated.items():
        if not isinstance(found, Mapping) or not isinstance(found.get("adapter"), Mapping):
            continue
        base = found.get("base")
        for metric, score in found["adapter"].items():
            other = base.get(metric) if isinstance(base, Mapping) else None
            rows = found.get("rows")
            shown = str(rows) if _is_count(rows) else "?"
            name = _cell(str(metric).replace("_", " "))
            yield [_cell(data), shown, name, _with_interval(other), _with_interval(score)]


def _with_interval(score: Any) -> str:
    if not isinstance(score, Mapping) or not _is_number(score.get("value")):
        return "-"
    if not _is_number(score.get("low")) or not _is_number(score.get("high")):
        return _figure(score["value"])
    return f"{_figure(score['value'])} [{_figure(score['low'])}, {_figure(score['high'])}]"


def _share(value: float, rows: int) -> str:
    if not 0 <= value <= 1:
        return _figure(value)
    low, high = wilson(round(value * rows), rows)
    return f"{_figure(value)} [{_figure(low)}, {_figure(high)}]"


def _figure(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e300 and math.isfinite(value)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 53


# --- anybody's text ----------------------------------------------------------------------------


def _shown(text: str) -> str:
    """Return the text without control characters, direction marks and lone surrogates; lines
    stay."""
    return "".join(c for c in text if c == "\n" or not unicodedata.category(c).startswith("C"))


def _line(value: Any) -> str:
    """Return the text as one line, cut to a length."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = _shown(" ".join(text[: 4 * _MOST_CHARACTERS].split()))
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def _literal(text: str) -> str:
    """Return a string literal that is valid in JSON and in Python."""
    return json.dumps(_shown(text[: 4 * _MOST_CHARACTERS]), ensure_ascii=False)


def _code(value: Any) -> str:
    """Return a code span, in which nothing has a meaning but its own fence."""
    text = _line(value) or " "
    fence = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _cell(value: Any) -> str:
    """Return text for a heading or a table cell, with every special character as a character
    reference."""
    return re.sub(r"[^\w \-./+%=,]|_", lambda found: f"&#{ord(found[0])};", _line(value))
