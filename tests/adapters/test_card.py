"""Model cards: what they say, and that no config can say more with them than it should."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neuroada_serve.adapters.card import CARD_FILE, model_card, write_card
from neuroada_serve.adapters.format import AdapterConfig, save_adapter
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.cli.main import app
from neuroada_serve.config import DEMO_HUB_ID
from tests.support.tiny import random_adapter, save_tiny_model

EVIL = (
    "</td><script>x()</script>`|`](https://e.vil)\n\n# Title\n"
    "<!-- neuroada: end -->\n```\n$(rm)\u202e"
)
SCORE = {"value": 0.75, "low": 0.5, "high": 0.9, "rows": 8, "interval": "wilson"}


def config(base="org/tiny", selection="magnitude", **metadata):
    return AdapterConfig(base, "ab" * 32, 8, ("q_proj", "v_proj"), selection, metadata=metadata)


def test_card_says_what_it_is_how_it_was_made_and_how_to_serve_it():
    scores = {
        "heldout_rows": 120,
        "before": {"loss": 1.5, "exact_match": 0.0},
        "after": {"loss": 0.5, "exact_match": 0.9},
        "exact_match_by": "teacher forcing",
        "evaluated": {
            "rows.jsonl": {
                "rows": 8,
                "adapter": {"f1": SCORE},
                "base": {"f1": SCORE | {"value": 0}},
            }
        },
    }
    recipe = {"data": "train.jsonl", "lr": 0.005, "versions": {"torch": "2"}}
    card = model_card(config(recipe=recipe, scores=scores), "sql")
    assert card.startswith("---\nlibrary_name: neuroada-serve\n")
    assert "base_model: org/tiny\nbase_model_relation: adapter\n" in card
    assert "pipeline_tag: text-generation\n" in card
    assert "# sql" in card
    assert "`" + "ab" * 32 + "`" in card
    assert "k: 8" in card
    assert "`data`: `train.jsonl`" in card
    assert "exact match (teacher forcing)" in card.replace("&#40;", "(").replace("&#41;", ")")
    assert "0.900 [0.833, 0.942]" in card
    assert "| rows.jsonl | 8 | f1 | 0.000 [0.500, 0.900] | 0.750 [0.500, 0.900] |" in card
    assert "neuroada serve org/tiny --adapter sql=./sql" in card
    assert "Licence: " in card


def test_card_of_an_adapter_without_metadata_has_no_empty_parts():
    card = model_card(config(base="/models/x"))
    assert "## Scores" not in card
    assert "## Training" not in card
    assert "base_model" not in card  # no hub has it


def without_code(card):
    """Markdown with its code blocks and code spans taken out, which mean nothing."""
    card = re.sub(r"^```\w+\n.*?^```$", "", card, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", card)


def test_card_shows_hostile_text_as_text():
    hostile = config(
        base=EVIL,
        selection=EVIL,
        recipe={EVIL: EVIL, "list": [EVIL]},
        scores={"evaluated": {EVIL: {"rows": 3, "adapter": {EVIL: SCORE}}}},
        samples=[{"question": EVIL, "expected": EVIL, "got": EVIL}],
    )
    card = model_card(hostile, EVIL)
    text = without_code(card)
    assert "<script" not in text
    assert "](http" not in text
    assert "https:" not in text
    assert "\u202e" not in card
    assert "\n# Title" not in card
    assert card.count("\n```") == model_card(config()).count("\n```") == 6
    assert card.count("\n<!-- neuroada: end -->") == 1
    example, score = [line for line in card.splitlines() if line.startswith("| &#60;")]
    assert (example.count("|"), score.count("|")) == (4, 6)


def blocks(card: str) -> list[str]:
    return re.findall(r"^```\w+\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("question", ["One\nline, isn't it?", EVIL])
@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
def test_examples_are_commands_that_run(tmp_path, monkeypatch, capsys, question, prompt_format):
    source = save_tiny_model(tmp_path / "model")
    save_adapter(random_adapter(source, seed=1), tmp_path / "fr")
    samples = [{"question": question, "expected": "a", "got": "b"}]
    of = config("./model", recipe={"prompt_format": prompt_format}, samples=samples)
    terminal, http, python = blocks(model_card(of, "fr"))
    monkeypatch.chdir(tmp_path)
    exec(python, {})
    assert capsys.readouterr().out
    answered = CliRunner().invoke(app, shlex.split(terminal)[1:], input="hello")
    assert answered.exit_code == 0, answered.output
    serve, curl = http.splitlines()
    assert serve == "neuroada serve ./model --adapter fr=./fr"
    body = json.loads(shlex.split(curl)[-1])
    assert body["model"] == "fr"
    text = body["prompt"] if prompt_format == "plain" else body["messages"][0]["content"]
    assert text == "".join(c for c in question if c != "\u202e")


def test_classifiers_card_asks_it_for_a_label():
    of = AdapterConfig(
        "org/tiny", "ab" * 32, 8, ("q_proj",), task_type="SEQ_CLS", labels=("a", "b")
    )
    card = model_card(of, "mood")
    terminal, http, python = blocks(card)
    assert shlex.split(terminal)[:2] == ["neuroada", "classify"]
    assert json.loads(shlex.split(http)[-1]) == {"model": "mood", "input": "A text."}
    assert 'prompt = "A text."\n[answer] = llm.classify(prompt, "mood")' in python
    assert "pipeline_tag: text-classification\n" in card


@pytest.mark.parametrize("name", ["sql", "json", "triage", "pirate"])
def test_cards_of_the_shipped_adapters_are_current(tmp_path, name):
    folder = Path(__file__).resolve().parent.parent.parent / "examples" / "adapters" / name
    shutil.copytree(folder, tmp_path / name)
    assert write_card(tmp_path / name, load_adapter(folder).config)
    card = (tmp_path / name / CARD_FILE).read_text()
    assert card == (folder / CARD_FILE).read_text()
    assert f"base_model: {DEMO_HUB_ID}\n" in card
    assert "license: apache-2.0\n" in card
    assert "## Examples" in card


def test_samples_of_another_make_are_passed_over():
    for samples in ("x", [1], [{"question": 1}], {"question": "a"}):
        assert "## Examples" not in model_card(config(samples=samples))


@pytest.mark.parametrize(("base", "shown"), [("a; rm -rf b", "'a; rm -rf b'"), ("--help", "BASE")])
def test_command_lines_take_a_base_as_one_word(base, shown):
    assert f"neuroada serve {shown} --adapter" in model_card(config(base=base))


@pytest.mark.parametrize(
    "scores",
    [
        [],
        "good",
        {"evaluated": []},
        {"evaluated": {"x": 1, "y": {"adapter": 2}}},
        {"heldout_rows": True, "before": {}, "after": {}},
        {"heldout_rows": 3, "before": {"exact_match": 1e308}, "after": {"exact_match": "1"}},
        {"evaluated": {"x": {"rows": -1, "adapter": {"f1": {"value": 10**400}, "g": None}}}},
    ],
)
def test_card_passes_over_scores_of_another_make(scores):
    assert "## Use" in model_card(config(recipe=[1], scores=scores))


def test_card_is_renewed_between_its_marks_alone(tmp_path):
    assert write_card(tmp_path, config())
    path = tmp_path / CARD_FILE
    path.write_text(path.read_text().replace("for the author to fill in", "MIT") + "\nMine.\n")
    assert write_card(tmp_path, config(recipe={"lr": 0.25}))
    card = path.read_text()
    assert "MIT" in card
    assert "Mine." in card
    assert "`0.25`" in card
    assert card.count("## Use") == 1


def test_card_of_hostile_text_is_renewed_whole(tmp_path):
    hostile = config(base=EVIL, recipe={"data": EVIL})
    assert write_card(tmp_path, hostile)
    once = (tmp_path / CARD_FILE).read_bytes()
    assert write_card(tmp_path, hostile)
    assert (tmp_path / CARD_FILE).read_bytes() == once


@pytest.mark.parametrize("content", [b"my own words", b"\xff\xfe", b"<!-- neuroada: end -->"])
def test_a_readme_of_another_make_is_left_alone(tmp_path, content):
    (tmp_path / CARD_FILE).write_bytes(content)
    assert not write_card(tmp_path, config())
    assert (tmp_path / CARD_FILE).read_bytes() == content
