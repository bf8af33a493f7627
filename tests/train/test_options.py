"""Options of training."""

import json
import math

import pytest
import torch

from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.train import lr_finder, trainer
from neuroada_serve.train.batches import collate, collate_packed, packs, predict
from neuroada_serve.train.ending import Course, scores_without_fall
from neuroada_serve.train.examples import Example
from neuroada_serve.train.loop import LengthGroupedBatches
from neuroada_serve.train.trainer import LOG_FILE, LR_FILE, train_adapter
from tests.support.training import QUICK, ROWS, make_base, write_rows

replace = trainer.replace


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "tiny", "llama")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def values_of(report):
    return {name: part.bypass.float() for name, part in report.adapter.modules.items()}


def test_accumulated_batches_are_one_batch(base, rows, tmp_path):
    """Rows have one length and all go into one step, so that both runs take the same rows."""
    write_rows(rows, ROWS[:8])
    one = replace(QUICK, batch_size=8, max_steps=3, eval_fraction=0)
    whole = train_adapter(base, rows, tmp_path / "one", one)
    parts = replace(one, batch_size=2, gradient_accumulation=4)
    accumulated = train_adapter(base, rows, tmp_path / "four", parts)
    assert accumulated.steps == 3
    torch.testing.assert_close(accumulated.losses, whole.losses)
    for name, values in values_of(whole).items():
        torch.testing.assert_close(values_of(accumulated)[name], values, atol=1e-3, rtol=1e-2)


def test_batches_come_in_whole_steps_and_can_be_skipped():
    lengths = [n % 7 for n in range(23)]
    whole, resumed = (LengthGroupedBatches(lengths, 4, 0, multiple=4) for _ in range(2))
    assert (whole.per_pass, len(whole)) == (6, 8)
    taken = [batch for _ in range(3) for batch in whole]
    resumed.skip(11)
    assert [batch for _ in range(3) for batch in resumed][: 24 - 11] == taken[11:]
    assert sorted(row for batch in taken[:6] for row in batch) == list(range(23))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rates_rise_and_fall(schedule):
    course = Course(TrainConfig(schedule=schedule, warmup_ratio=0.2), 50)
    shares = [course(step) for step in range(50)]
    assert max(shares) == shares[10] == 1.0
    assert all(a < b for a, b in zip(shares[:10], shares[1:11], strict=True))
    falling = zip(shares[10:], shares[11:], strict=False)
    assert all(a > b for a, b in falling) is (schedule != "constant")
    assert min(shares) > 0


def test_the_best_score_is_kept_and_patience_ends_the_run(base, rows, tmp_path):
    """A learning rate at which the held-out loss soon rises."""
    config = replace(QUICK, lr=1.0, max_steps=60, eval_steps=2, patience=3, warmup_ratio=0)
    told = []
    report = train_adapter(base, rows, tmp_path / "out", config, told.append)
    losses = {one.step: one.score.loss for one in report.evaluations}
    assert report.best_step == min(losses, key=losses.get)
    assert report.after.loss == min(losses.values())
    assert report.steps < 60
    counts = [
        scores_without_fall(report.before.loss, list(losses.values())[:n]) for n in (-1, None)
    ]
    assert counts == [2, 3]
    assert any("keeping the values of step" in message for message in told)
    lines = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == list(report.losses)
    assert [line["step"] for line in lines if "heldout" in line] == [0, *losses]


def test_a_learning_rate_is_found(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(lr_finder, "_STEPS", 5)
    monkeypatch.setattr(lr_finder, "_FACTORS", (0.25, 1.0, 4.0))
    config = replace(QUICK, lr="auto", max_steps=10)
    report = train_adapter(base, rows, tmp_path / "a", config)
    recipe = report.adapter.config.metadata["recipe"]
    search = recipe["lr_search"]
    known = [loss for loss in search["losses"] if loss is not None]
    assert search["losses"][search["tried"].index(recipe["lr"])] == min(known)
    assert (tmp_path / "a" / LR_FILE).read_bytes().startswith(b"\x89PNG")
    given = train_adapter(base, rows, tmp_path / "b", replace(config, lr=recipe["lr"]))
    assert given.losses == report.losses, "the search leaves no trace"


def test_diverging_learning_rates_are_passed_over(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(lr_finder, "_STEPS", 3)
    monkeypatch.setattr(lr_finder, "_FACTORS", (0.25, 1.0, 2.0, 4.0))
    config = replace(QUICK, lr="auto", max_steps=3)
    scored = lr_finder.score

    def score(model, rows, batch_size, objective):
        found = scored(model, rows, batch_size, objective)
        score.calls += 1
        return replace(found, loss=math.nan) if score.calls > 2 else found

    score.calls = 0
    monkeypatch.setattr(lr_finder, "score", score)
    report = train_adapter(base, rows, tmp_path / "out", config)
    search = report.adapter.config.metadata["recipe"]["lr_search"]
    assert [loss is None for loss in search["losses"]] == [False, False, True, True]
    score.calls = 9
    with pytest.raises(UsageError, match="every learning rate"):
        train_adapter(base, rows, tmp_path / "none", config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_rows_have_the_loss_of_padded_ones(kind, tmp_path):
    model = make_base(tmp_path / "packed", kind).model.eval()
    rows = [Example((5, 6, 7), (8, 1)), Example((9,), (3, 4, 1)), Example((2, 2, 2, 2), (1,))]
    packed, padded = (predict(model, make(rows)).logits for make in (collate_packed, collate))
    assert packs(model)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


def test_a_base_whose_rows_would_see_each_other_is_refused(
    base,
    rows,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(trainer, "packs", lambda model: False)
    with pytest.raises(UsageError, match="without --packing"):
        train_adapter(base, rows, tmp_path / "out", replace(QUICK, packing=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True},
        {"recompute": "cheap"},
        {"recompute": "all"},
        {"bypass": True},
        {"bf16": True},
    ],
    ids=str,
)
def test_ways_to_train_learn_the_same(base, rows, tmp_path, options):
    plain = train_adapter(base, rows, tmp_path / "plain", replace(QUICK, max_steps=12))
    other = train_adapter(base, rows, tmp_path / "other", replace(QUICK, max_steps=12, **options))
    bound = 0.05 if "bf16" in options else 2e-3
    torch.testing.assert_close(other.losses, plain.losses, atol=bound, rtol=bound)
    assert load_adapter(tmp_path / "other", base.spec).digest == other.adapter.digest


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_base_is_trained_beside_and_served_unquantized(rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = make_base(tmp_path / "tiny", "llama")
    config = replace(QUICK, quantize="int8", max_steps=12, lr=0.05)
    report = train_adapter(base, rows, tmp_path / "out", config)
    assert report.after.loss < report.before.loss
    fresh = make_base(tmp_path / "again", "llama")
    assert (
        load_adapter(tmp_path / "out", fresh.spec).config.metadata["recipe"]["quantize"] == "int8"
    )
