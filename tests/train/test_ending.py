"""Endings of training runs, and their messages."""

import math

import pytest

from neuroada_serve.config import TrainConfig
from neuroada_serve.train.ending import (
    MOST_PASSES,
    MOST_STEPS,
    Course,
    plan_of,
    reason,
    rise,
    scores_without_fall,
)
from neuroada_serve.train.trainer import LOG_FILE, replace, train_adapter
from tests.support.interrupted import train_interrupted
from tests.support.training import ROWS, make_base, write_rows

OPEN = TrainConfig(k=2, batch_size=4, eval_fraction=0.25, lr=0.05, warmup_ratio=0.02)


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "tiny", "llama")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


# --- the plan ----------------------------------------------------------------------------------


def test_without_a_length_passes_and_steps_are_bounded():
    small = plan_of(TrainConfig(), train_rows=108, heldout_rows=12)
    assert small.is_open
    assert (small.steps, small.eval_steps) == (14 * MOST_PASSES, 14)
    middle = plan_of(TrainConfig(), train_rows=1000, heldout_rows=100)
    assert (middle.steps, middle.eval_steps) == (MOST_STEPS, 125)


def test_large_data_is_one_pass_at_most_and_scored_within():
    large = plan_of(TrainConfig(), train_rows=100_000, heldout_rows=100)
    assert (large.steps, large.eval_steps) == (12_500, 3_125)
    assert plan_of(TrainConfig(epochs=3), 100_000, 100).eval_steps == 3_125


def test_steps_take_accumulation_and_processes_into_account():
    plan = plan_of(TrainConfig(gradient_accumulation=2), 160, 10, processes=2)
    assert (plan.per_pass, plan.steps, plan.eval_steps) == (5, 5 * MOST_PASSES, 5)


def test_without_heldout_rows_the_passes_are_fixed_and_that_is_said():
    plan = plan_of(TrainConfig(), train_rows=80, heldout_rows=0)
    assert (plan.is_open, plan.steps) == (False, 60)
    assert "No rows are held out" in str(reason(plan, 60, []))


@pytest.mark.parametrize("config", [TrainConfig(epochs=2), TrainConfig(max_steps=20)])
def test_a_given_length_is_kept_and_no_patience_added(config):
    plan = plan_of(config, train_rows=80, heldout_rows=8)
    assert (plan.is_open, plan.steps, plan.patience) == (False, 20, None)


def test_the_bound_is_said_at_the_start():
    words = plan_of(TrainConfig(), 108, 12).words()
    assert words.endswith("scored every 14 steps, at most 20 passes (280 steps)")


def test_a_loss_that_falls_by_next_to_nothing_falls_no_more():
    converged = [1.26, 0.0226, 0.0038, 0.0020, 0.0014, 0.0011]  # of five classes, the base at 10
    assert scores_without_fall(10.0, converged) == 3
    assert scores_without_fall(10.0, converged[:3]) == 0
    assert scores_without_fall(2.0, [1.5, 1.49, 1.48, 1.47]) == 0
    assert scores_without_fall(2.0, [1.5, 1.4995, 1.4985, 1.4975]) == 0  # many small ones add up
    assert scores_without_fall(0.02, [0.01, 0.009, 0.012]) == 1  # of a regression on small numbers
    assert scores_without_fall(2.0, []) == 0


# --- why it ended ------------------------------------------------------------------------------


def test_a_loss_that_still_falls_is_said_with_the_flag_that_would_go_on():
    falling = [(0, 3.0), (10, 2.0), (20, 1.0)]
    fixed = plan_of(TrainConfig(epochs=2), 80, 8)
    assert "still falling after 2 passes: --epochs 4 would go on" in str(reason(fixed, 20, falling))
    part = plan_of(TrainConfig(max_steps=4), 80, 8)
    assert "--max-steps 8 would" in str(reason(part, 4, [(0, 3.0), (4, 2.0)]))
    bounded = plan_of(TrainConfig(), 80, 8)
    told = str(reason(bounded, 200, [*falling, (200, 0.5)]))
    assert "bound of 20 passes" in told
    assert "--epochs 40 would go on" in told


def test_a_loss_that_fell_no_more_is_said_with_the_best_pass():
    scored = [(0, 3.0), (10, 2.0), (20, 1.0), (30, 1.1), (40, 1.2)]
    told = str(reason(plan_of(TrainConfig(), 80, 8), 40, scored))
    assert "hardly falls any more; keeping the values of step 20 (2 passes)" in told
    told = str(reason(plan_of(TrainConfig(epochs=4), 80, 8), 40, scored))
    assert "falls no more; keeping the values of step 20 (2 passes)" in told


# --- the learning rate -------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_open_course_stays_up_until_it_declines_to_zero(schedule):
    course = Course(TrainConfig(schedule=schedule), 240, is_open=True)
    assert [course(step) for step in (30, 100, 199)] == [1.0, 1.0, 1.0]
    assert course(239) < 0.1  # the bound, too, is reached with a small rate
    course.decline(100)
    rates = [course(step) for step in range(100, course.end)]
    assert course.end == 120
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.1


def test_a_constant_schedule_declines_by_ending():
    course = Course(TrainConfig(schedule="constant"), 240, is_open=True)
    course.decline(100)
    assert course.end == 100


# --- whole runs --------------------------------------------------------------------------------


def test_training_goes_on_until_the_heldout_loss_falls_no_more(base, rows, tmp_path):
    told = []
    report = train_adapter(base, rows, tmp_path / "out", OPEN, told.append)
    losses = [one.score.loss for one in report.evaluations]
    assert report.after.loss == min(losses)
    assert report.steps > 2 * 5  # one pass was the default once
    assert any("at most 20 passes" in sentence for sentence in told)
    assert any(sentence.startswith("Ended ") for sentence in told), told
    assert report.adapter.config.metadata["recipe"]["patience"] == 3


def test_an_open_run_returns_to_its_best_and_goes_on_alike_when_interrupted(
    base, rows, tmp_path, monkeypatch
):
    config = replace(OPEN, lr=0.3, patience=2, save_steps=4)
    told = []
    whole = train_adapter(base, rows, tmp_path / "whole", config, told.append)
    assert any("back to the values of step" in sentence for sentence in told), told
    assert whole.steps < 100
    train_interrupted(base, rows, tmp_path / "cut", config, monkeypatch)
    for name in ("adapter_model.safetensors", "adapter_config.json", LOG_FILE):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_interruption_within_the_decline_goes_on_alike(base, rows, tmp_path, monkeypatch):
    config = replace(OPEN, lr=0.3, patience=2, save_steps=1)
    whole = train_adapter(base, rows, tmp_path / "whole", config)
    monkeypatch.setattr("tests.support.interrupted._AT", whole.steps - 1)
    train_interrupted(base, rows, tmp_path / "cut", config, monkeypatch)
    one, other = ((tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "options",
    [{"packing": True}, {"gradient_accumulation": 2}, {"bypass": True}, {"lr": "auto"}],
    ids=str,
)
def test_open_runs_take_the_other_options(base, rows, tmp_path, options, monkeypatch):
    monkeypatch.setattr("neuroada_serve.train.lr_finder._STEPS", 2)
    config = replace(OPEN, **{"lr": 0.3, "patience": 1, **options})
    report = train_adapter(base, rows, tmp_path / "out", config)
    assert math.isfinite(report.after.loss)
    assert report.steps >= 1


@pytest.mark.parametrize("labels", [(), ("score",)], ids=["classes", "numbers"])
def test_classifiers_and_regressions_end_by_their_loss(base, tmp_path, labels):
    rows = [{"text": f"row {n}", "label": n % 3} for n in range(24)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = replace(OPEN, task_type="SEQ_CLS", labels=labels, lr=0.3, head_lr=0.3, patience=1)
    told = []
    report = train_adapter(base, data, tmp_path / "out", config, told.append)
    assert report.steps < 100
    assert any(sentence.startswith("Ended ") for sentence in told), told


def test_a_loss_that_rose_in_a_few_steps_asks_for_more_of_them_and_not_for_a_lower_lr():
    few, enough = plan_of(TrainConfig(max_steps=3), 80, 8), plan_of(TrainConfig(epochs=4), 80, 8)
    told = str(rise(few, 3, 2.0, 2.5, lr=0.02))
    assert "rose from 2.000 to 2.500 in 3 steps, too few to tell" in told
    assert "neither --epochs nor --max-steps" in told
    assert "--lr" not in told
    assert "--max-steps 20" in str(rise(plan_of(TrainConfig(), 8, 2), 4, 2.0, 2.5, lr=0.02))
    assert "try a --lr below 0.02, or more rows" in str(rise(enough, 40, 2.0, 2.5, lr=0.02))
    assert rise(few, 3, 2.0, 2.0, lr=0.02) is None
