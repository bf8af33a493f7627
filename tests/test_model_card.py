"""Model cards: what they say, and that no config can say more with them than it should."""

import re

import pytest

from neuroada_serve.adapters.card import CARD_FILE, model_card, write_card
from neuroada_serve.adapters.format import AdapterConfig

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
    assert "base_model: org/tiny\n" in card
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
    card = re.sub(r"^```bash\n.*?^```$", "", card, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", card)


def test_card_shows_hostile_text_as_text():
    hostile = config(
        base=EVIL,
        selection=EVIL,
        recipe={EVIL: EVIL, "list": [EVIL]},
        scores={"evaluated": {EVIL: {"rows": 3, "adapter": {EVIL: SCORE}}}},
    )
    card = model_card(hostile, EVIL)
    text = without_code(card)
    assert "<script" not in text
    assert "](http" not in text
    assert "https:" not in text
    assert "\u202e" not in card
    assert "\n# Title" not in card
    assert card.count("\n```") == 2
    assert card.count("\n<!-- neuroada: end -->") == 1
    (row,) = [line for line in card.splitlines() if line.startswith("| &#60;")]
    assert row.count("|") == 6


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
