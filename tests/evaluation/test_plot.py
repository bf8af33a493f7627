"""Pictures: one style, and nothing that covers what it explains. Drawn without a display."""

import ast
from pathlib import Path

import pytest

from neuroada_serve import plots
from neuroada_serve.benchmark.plot import plot as benchmark_plot
from neuroada_serve.evaluation import plot as evaluation_plot
from neuroada_serve.evaluation.run import Score
from neuroada_serve.train import plot as training_plot
from neuroada_serve.train.lr_finder import LearningRates

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def drawn(monkeypatch):
    """Figures, as they were before they became bytes."""
    figures = []

    def keep(figure):
        figures.append(figure)
        return plots.png(figure)

    for module in (evaluation_plot, training_plot):
        monkeypatch.setattr(module, "png", keep)
    monkeypatch.setattr("neuroada_serve.benchmark.plot.png", keep)
    return figures


def boxes(artists):
    return [artist.get_window_extent() for artist in artists]


@pytest.mark.parametrize("subjects", [1, 2, 9])
def test_the_legend_covers_no_bar(drawn, subjects):
    scores = {
        f"an adapter of a long name, number {n}": {"exact_match": Score(0.98, 0.9, 1.0, 100, "")}
        for n in range(subjects)
    }
    assert evaluation_plot.score_bars(scores, "costs $5").startswith(b"\x89PNG")
    [axes] = drawn[0].axes
    [legend] = boxes([axes.get_legend()])
    assert not any(legend.overlaps(box) for box in boxes(axes.patches))
    colours = {patch.get_facecolor() for patch in axes.patches}
    assert len(colours) == subjects


def test_labels_of_learning_rates_do_not_overlap(drawn):
    tried = [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08]
    searched = LearningRates(tried, [1.2, 0.9, 0.6, 0.5, 0.7, None], 20, "held-out", 0.02)
    training_plot.learning_rate_plot(searched)
    [axes] = drawn[0].axes
    labels = [t for t in axes.get_xticklabels(which="both") if t.get_text()]
    assert [label.get_text() for label in labels] == [f"{lr:.2g}" for lr in tried]
    found = sorted(boxes(labels), key=lambda box: box.x0)
    assert all(a.x1 < b.x0 for a, b in zip(found, found[1:], strict=False))


def test_numbers_of_a_benchmark_stand_behind_its_bars(drawn):
    case = {"phase": "decode", "concurrency": 1, "engine": "neuroada", "popularity": "base"}
    case |= {"k": None, "median": {"tokens_per_s": 1.0}, "samples": {"tokens_per_s": [0.9, 1.1]}}
    assert benchmark_plot({"benchmark": "throughput", "cases": [case]})
    [axes] = drawn[0].axes
    [bar], [number] = boxes(axes.patches), boxes(axes.texts)
    assert number.x0 >= bar.x1
    assert number.x1 <= axes.get_window_extent().x1


def test_all_pictures_are_made_in_one_style():
    """Nobody but the style module asks matplotlib for a figure."""
    for folder in ("neuroada_serve", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            names = {
                name
                for node in ast.walk(ast.parse(file.read_text()))
                for name in (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
            }
            uses = any(name.partition(".")[0] == "matplotlib" for name in names)
            assert not uses or file.name == "plots.py", file
