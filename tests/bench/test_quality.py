"""bench/quality: its rows, its methods and its plan on a toy model; once the whole script."""

import copy
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.quality import __main__ as quality
from bench.quality import plan as plans
from bench.quality import rows as quality_rows
from bench.quality.jobs import Job, Settings
from bench.quality.methods import METHODS, as_weights, last_number, score, train
from neuroada_serve.errors import DataError, UsageError
from neuroada_serve.model.loader import adaptable_modules, load_base, matrix_shape
from tests.support.tiny import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = ["--train-rows", "12", "--tune-rows", "4", "--eval-rows", "4"]
RUN = ["--steps", "2", "--tune-steps", "1", "--batch", "4", "--eval-batch", "4", "--device", "cpu"]
SHORT = ["--seeds", "2", "--lr-values", "2", "--max-new-tokens", "3"]


def choice_row(number: int, answer: str, options: str = "true/false") -> dict:
    return {
        "instruction": f"Is {number} even?\n\nAnswer format: {options}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def sum_row(number: int) -> dict:
    text = f"{number} and one are {number + 1}"
    return {"instruction": f"{number} + 1?", "input": "", "output": text, "answer": f"{number + 1}"}


def save_data(folder: Path) -> Path:
    folder.mkdir()
    files = {task.train for task in quality_rows.TASKS.values()}
    files |= {file for task in quality_rows.TASKS.values() for file, _ in task.evals.values()}
    for file in files:
        start = 0 if file.endswith("train") else 100
        math_rows = quality_rows.TASKS["math"].train
        is_sum = file in math_rows or file in (
            "MultiArith.test",
            "AddSub.test",
        )
        rows = [
            sum_row(i) if is_sum else choice_row(i, "false" if i % 2 else "true")
            for i in range(start, start + 30)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{file}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = folder / "rows.json.gz"
    data = save_data(folder / "data")
    flags = ["--base", str(source.path), "--data", str(data), "--prepare", str(rows)]
    assert quality.main([*flags, *SIZES]) == 0
    return rows


def rows_of(prepared: Path) -> list[dict]:
    return quality_rows.load_prepared(prepared)["tasks"]["commonsense"]["train"]


def test_options_part_where_their_answers_do(source):
    base = load_base(source, device="cpu")
    row = quality_rows.encode(base, choice_row(1, "ending2", "ending1/ending2/ending3"), "choice")
    text = base.tokenizer.decode(row["a"][: row["at"]])
    assert text == "the correct answer is ending"
    assert base.tokenizer.decode(row["o"]) == "123"
    assert row["a"][row["at"]] == row["o"][row["y"]]


def test_answer_outside_its_options_is_refused(source):
    base = load_base(source, device="cpu")
    with pytest.raises(DataError, match="none of"):
        quality_rows.encode(base, choice_row(1, "maybe"), "choice")


@pytest.mark.parametrize(
    ("text", "number"), [("so 1,234.5 in all", 1234.5), ("3 - 5 is -2.", -2.0), ("none", None)]
)
def test_last_number_is_the_answer(text, number):
    assert last_number(text) == number


def test_choice_is_what_full_scoring_of_every_option_prefers(source, prepared):
    base = load_base(source, device="cpu")
    rows = quality_rows.load_prepared(prepared)["tasks"]["commonsense"]["evals"]["BoolQ"]["rows"]
    right = 0
    for row in rows:
        scores = []
        for option in row["o"]:
            ids = torch.tensor([row["p"] + row["a"][: row["at"]] + [option]])
            logits = base.model(ids).logits.float().log_softmax(-1)
            scores.append(logits[0, -2, option].item())
        right += scores.index(max(scores)) == row["y"]
    assert score(base.model, rows, 3)["accuracy"] == right / len(rows)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_lowers_the_loss_of_what_it_trains_on(source, prepared, name):
    base = load_base(source, device="cpu")
    rows = rows_of(prepared)[:4]
    before = score(base.model, rows, 4)["loss"]
    method = METHODS[name]
    for count, losses in train(base.model, method, [rows] * 12, 1, method.usual_lr):
        after = score(base.model, rows, 4)["loss"]
        assert count > 0
        assert losses[0] == pytest.approx(before, rel=0.02)
    assert after < before - 0.05


def test_lora_has_about_the_parameters_of_its_k(source):
    modules = adaptable_modules(load_base(source, device="cpu").model)
    shapes = [matrix_shape(module) for module in modules.values()]
    wanted = 64 * sum(d_out for d_out, _ in shapes)
    found = METHODS["lora-8x-k8"].rank(modules) * sum(map(sum, shapes))
    assert found == pytest.approx(wanted, rel=0.05)


def test_same_seed_gives_the_same_batches_and_another_does_not(prepared):
    rows = rows_of(prepared)
    one, same, other = (quality_rows.batches_of(rows, 4, 7, seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert len(one) == 7


def test_lr_is_the_best_tuned_and_failed_runs_do_not_count():
    plan = plans.Plan([("math", "full")], settings())
    low, high = settings().grid("full")
    assert plan.best_lr("math", "full") is None
    for lr, loss in ((low, None), (high, 2.0)):
        job = Job("math", "full", "tune", plans.TUNING_SEED, lr, 1)
        plan.records[job.key] = {"tune_loss": loss}
    assert plan.best_lr("math", "full") == high
    assert high / low == pytest.approx(4)


def test_final_runs_wait_for_tuning():
    plan = plans.Plan([("math", "full")], settings())
    taken = []
    while (job := plan.next_job()) is not None:
        taken.append(job.phase)
    assert taken == ["base", "tune", "tune"]
    assert sum(math.isnan(job.lr) for job in plan.jobs()) == 2


def settings() -> Settings:
    return Settings(2, 1, 4, 4, 2, 2, 4.0, 3, "auto")


def test_runs_file_survives_a_cut_line_and_refuses_other_settings(tmp_path):
    path = tmp_path / "runs.jsonl"
    plans.RunsFile(path, {"identity": 1}).append({"key": "a"})
    with path.open("a") as file:
        file.write('{"key": "b", "tu')
    runs = plans.RunsFile(path, {"identity": 1})
    runs.append({"key": "c"})
    assert [record["key"] for record in plans.read_runs(path)[0].records] == ["a", "c"]
    with pytest.raises(UsageError, match="other settings"):
        plans.RunsFile(path, {"identity": 2})


def test_runs_file_keeps_apart_what_each_machine_did(tmp_path):
    path = tmp_path / "runs.jsonl"
    machines = [{"identity": 1, "hardware": {"cpu": cpu}} for cpu in ("a", "b")]
    plans.RunsFile(path, machines[0]).append({"key": "first"})
    for number in range(2):
        plans.RunsFile(path, machines[1]).append({"key": number})
    parts = plans.read_runs(path)
    assert [part.header for part in parts] == machines
    assert [[record["key"] for record in part.records] for part in parts] == [["first"], [0, 1]]


def test_parts_stop_resume_and_merge_into_one_report(source, prepared, tmp_path, capsys):
    common = ["--base", source.path, "--prepared", prepared, *RUN, *SHORT]
    common += ["--methods", "neuroada-k8,lora-r1", "--tasks", "math,commonsense"]
    outs = [tmp_path / "first.json", tmp_path / "second.json"]
    assert quality.main([str(flag) for flag in [*common, "--out", outs[0], "--minutes", 0]]) == 0
    none = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert none["runs"] == []
    assert len(none["left_out"]) == 2 + 4 * (2 + 2)
    for number, out in enumerate(outs, 1):
        flags = [*common, "--part", f"{number}/2", "--out", out]
        if number == 1:
            assert quality.main([str(flag) for flag in flags]) == 0
            continue
        command = [sys.executable, "-m", "bench.quality", *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    parts = [str(out.with_suffix(".runs.jsonl")) for out in outs]
    assert quality.main(["--merge", *parts, "--out", str(tmp_path / "both.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "both.json").read_text())
    assert result["errors"] == {}
    assert result["left_out"] == []
    assert (tmp_path / "both.png").stat().st_size > 0
    trained = [row for row in result["summary"] if row["method"] != "base"]
    assert len(trained) == 4
    for row in trained:
        assert row["seeds"] == 2
        assert row["lr"] in row["grid"]
        assert row["edge"]
        scores = row["evals"]["MultiArith" if row["task"] == "math" else "BoolQ"]
        assert 0 <= scores["accuracy"]["min"] <= scores["accuracy"]["max"] <= 1


@pytest.mark.parametrize("name", ["neuroada-k8", "lora-as-k8", "full"])
def test_words_are_scored_on_the_weights_as_trained(source, prepared, name):
    base = load_base(source, device="cpu")
    model = copy.deepcopy(base.model)
    batch = rows_of(prepared)[:2]
    for _ in train(model, METHODS[name], [batch] * 4, seed=1, lr=0.05):
        served = as_weights(base.model, model)
        input_ids = torch.tensor([batch[0]["p"]])
        with torch.no_grad():
            expected = model(input_ids=input_ids).logits.float()
            found = served(input_ids=input_ids).logits.float()
            untrained = base.model(input_ids=input_ids).logits.float()
    assert all(parameter.dtype == torch.bfloat16 for parameter in served.parameters())
    error, change = (found - expected).abs().max(), (untrained - expected).abs().max()
    assert error < 0.1 * change
