"""Report an evaluation: table, JSON document, predictions by row, plots, scores in the adapter.

The document (`schema` is "neuroada-eval/1"):

    date, versions      date of the run, versions of the packages
    model, data, rows   the base, the data's name, rows scored
    metrics             as chosen
    scores              subject -> score name -> {"value", "low", "high", "rows", "interval"}; the
                        base is "base", adapters have their names
    digests             adapter -> digest of the version that answered
    confusion           subject -> choice metric -> {"labels", "counts"}, see `run.Confusion`

A line of predictions: {"number", "subject", "prompt", "right", "text", "chosen", "loglikelihoods",
"points", "loss", "value"}, see `run.Prediction`; number is the line or row. What a run did not need
is left out.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from neuroada_serve.adapters.card import write_card
from neuroada_serve.adapters.durable import check_writable, write_durably
from neuroada_serve.adapters.format import save_config
from neuroada_serve.adapters.reader import MAX_CONFIG_BYTES, AdapterReader
from neuroada_serve.errors import AdapterError, UsageError
from neuroada_serve.evaluation.plot import confusion_plot, score_bars
from neuroada_serve.evaluation.run import Evaluation, Result, Score
from neuroada_serve.train.rows import Data

SCHEMA = "neuroada-eval/1"
BASE = "base"


def score_table(evaluation: Evaluation, subjects: Sequence[str], title: str) -> Table:
    """Make a table with one line for each score of each subject."""
    table = Table("score", "model", "value", "95 % interval", title=title)
    names = evaluation.results[0].scores
    for name in names:
        for subject, result in zip(subjects, evaluation.results, strict=True):
            score = result.scores[name]
            words = evaluation.task.loss if name == "loss" else name.replace("_", " ")
            digits = 4 if name == "loss" else 3
            interval = f"{score.low:.{digits}f} to {score.high:.{digits}f}"
            last = subject == subjects[-1]
            table.add_row(words, subject, f"{score.value:.{digits}f}", interval, end_section=last)
    return table


def document(
    evaluation: Evaluation, subjects: Sequence[str], model: str, data: Data
) -> dict[str, Any]:
    """Return the run as one JSON object, without its predictions."""
    named = list(zip(subjects, evaluation.results, strict=True))
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {n: version(n) for n in ("neuroada-serve", "torch", "transformers")},
        "model": model,
        "data": data.name,
        "rows": evaluation.rows,
        "metrics": list(evaluation.metrics),
        "scores": {subject: scores_json(result.scores) for subject, result in named},
        "digests": {subject: result.digest for subject, result in named if result.digest},
        "confusion": {
            subject: {metric: asdict(found) for metric, found in result.confusions.items()}
            for subject, result in named
            if result.confusions
        },
    }


def scores_json(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: asdict(score) for name, score in scores.items()}


# --- files -------------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """Check that the results can be written, before an hour of scoring. Missing folders are made.

    Raises:
        UsageError: nothing can be written there.
    """
    if out.suffix != ".json":
        raise UsageError(f"--out takes a file name that ends in .json, got {str(out)!r}")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder")
    check_writable(out.parent, out)


def write_results(
    evaluation: Evaluation,
    subjects: Sequence[str],
    model: str,
    data: Data,
    out: Path,
    notify: Callable[[str], None],
) -> list[Path]:
    """Write the document to `out` and, beside it, predictions by row (.predictions.jsonl), a plot
    of the scores (.scores.png) and confusion matrices (.confusion-SUBJECT-METRIC.png).

    Without matplotlib there are no plots, and `notify` gets a message.

    Returns:
        The files written.
    """
    described = json.dumps(document(evaluation, subjects, model, data), indent=2)
    lines = _prediction_lines(evaluation, subjects)
    files = {
        out: (described + "\n").encode(),
        out.with_suffix(".predictions.jsonl"): "".join(lines).encode(),
    }
    if find_spec("matplotlib") is None:
        notify('No plots: they need matplotlib, of pip install "neuroada-serve[train]"')
    else:
        files |= _plots(evaluation, subjects, data, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            write_durably(path, content)
    except OSError as error:
        raise UsageError(f"results cannot be written to {out}: {error.strerror}") from error
    return list(files)


def _prediction_lines(evaluation: Evaluation, subjects: Sequence[str]) -> Iterator[str]:
    for subject, result in zip(subjects, evaluation.results, strict=True):
        for said in result.predictions:
            line = {
                "number": said.question.row.number,
                "subject": subject,
                "prompt": said.question.row.text,
                "right": said.question.right,
                "text": said.text,
                "chosen": said.chosen or None,
                "loglikelihoods": said.loglikelihoods or None,
                "points": said.points or None,
                "loss": said.loss,
                "value": said.value,
            }
            kept = {key: value for key, value in line.items() if value is not None}
            yield json.dumps(kept, ensure_ascii=False) + "\n"


def _plots(
    evaluation: Evaluation, subjects: Sequence[str], data: Data, out: Path
) -> dict[Path, bytes]:
    plots = {}
    named = dict(zip(subjects, evaluation.results, strict=True))
    title = f"{data.name}, {evaluation.rows} rows"
    if set(evaluation.results[0].scores) != {"loss"}:
        scores = {subject: result.scores for subject, result in named.items()}
        plots[out.with_suffix(".scores.png")] = score_bars(scores, title)
    for subject, result in named.items():
        for metric, confusion in result.confusions.items():
            path = out.with_suffix(f".confusion-{subject}-{metric}.png")
            words = f"{subject}, {metric.replace('_', ' ')}: {title}"
            plots[path] = confusion_plot(confusion, words)
    return plots


# --- into the adapter --------------------------------------------------------------------------


def save_scores(
    folder: Path,
    result: Result,
    base: Result | None,
    data: Data,
    notify: Callable[[str], None],
) -> None:
    """Put scores into an adapter's config, at metadata.scores.evaluated[data's name], and into its
    card. The weights stay, so the adapter keeps its digest; scores of the same data are replaced,
    and all other metadata stays.

    Raises:
        AdapterError: its weights are no longer those that were scored, or its metadata has no room.
        UsageError: the folder cannot be written to.
    """
    header = AdapterReader().header(folder)
    if header.digest != result.digest:
        raise AdapterError(f"adapter {folder} has changed since it was scored; score it again")
    metadata = dict(header.config.metadata)
    scores = metadata.get("scores", {})
    if not isinstance(scores, dict) or not isinstance(scores.get("evaluated", {}), dict):
        raise AdapterError(
            f"adapter {folder}: metadata.scores in its adapter_config.json is of another make; "
            "take it out to save scores there"
        )
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": len(result.predictions),
        "adapter": scores_json(result.scores),
    }
    if base is not None:
        found["base"] = scores_json(base.scores)
    evaluated = {**scores.get("evaluated", {}), data.name: found}
    metadata["scores"] = {**scores, "evaluated": evaluated}
    config = replace(header.config, metadata=metadata)
    if len(json.dumps(metadata, indent=2)) > MAX_CONFIG_BYTES // 2:
        raise AdapterError(
            f"adapter {folder} has no room for more scores; take some out of metadata.scores in "
            "its adapter_config.json"
        )
    try:
        save_config(config, folder)
        kept = not write_card(folder, config)
    except OSError as error:
        raise UsageError(f"scores cannot be saved in {folder}: {error.strerror}") from error
    if kept:
        notify(f"{folder / 'README.md'} is none of ours; it stays as it is.")
