"""The promises on the real model: the demo base and the shipped adapters, float32 and bfloat16.

The full sizes are marked slow; CI runs the same tests on fewer prompts, with shorter answers.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from neuroada_serve import LLM, SamplingParams, load_adapter
from neuroada_serve.model.export import export_merged
from neuroada_serve.model.source import resolve_model
from neuroada_serve.train.shapes import read_rows

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MIX = [None, "sql", "json", "sql", "triage"]
FEW, ALL = 2, 20
TOKENS = {FEW: 24, ALL: 64}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """`count` mixed batches in one: held-out questions, and the adapter of each."""
    out = tmp_path_factory.mktemp("rows")
    rows = {}
    tasks = {"sql": "sql", "json": "json_record", "triage": "triage", None: "pirate"}
    for name, task in tasks.items():
        script = EXAMPLES / "data" / f"{task}.py"
        subprocess.run([sys.executable, script, "--out", out], check=True, capture_output=True)
        rows[name] = [row.messages for row in read_rows(out / f"{task}.heldout.jsonl").rows]

    def make(count: int):
        return [rows[name][i] for i in range(count) for name in MIX], MIX * count

    return make


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=TOKENS[count])


@pytest.fixture(scope="module")
def llm():
    adapters = {name: EXAMPLES / "adapters" / name for name in ("sql", "json", "triage")}
    return LLM("demo", adapters, dtype="float32", max_num_seqs=5)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Per adapter what `neuroada merge` writes, loaded in plain transformers; None: the base."""
    source = resolve_model("demo")
    folders = {None: source.path}
    for name in ("sql", "json", "triage"):
        folders[name] = tmp_path_factory.mktemp("merged") / name
        export_merged(source, EXAMPLES / "adapters" / name, folders[name], "float32")
    load = AutoModelForCausalLM.from_pretrained
    return {name: load(path, dtype=torch.float32) for name, path in folders.items()}


@pytest.mark.parametrize("count", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_mixed_batch_equals_one_by_one_and_the_merged_checkpoint(llm, checkpoints, asked, count):
    questions, adapters = asked(count)
    params = greedy(count)
    mixed = llm.chat(questions, params, adapters)
    for question, adapter, answer in zip(questions, adapters, mixed, strict=True):
        alone = llm.chat(question, params, adapter)[0]
        assert answer.token_ids == alone.token_ids, (adapter, question)
        prompt = torch.tensor([answer.prompt_token_ids])
        plain = checkpoints[adapter].generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=params.max_tokens,
            pad_token_id=2,
        )
        expected = tuple(plain[0, prompt.shape[1] :].tolist())
        assert answer.token_ids == expected, (adapter, question)


@pytest.mark.parametrize("count", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
@torch.no_grad()
def test_logits_agree_with_the_merged_checkpoint(llm, checkpoints, asked, count):
    questions, adapters = asked(count)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20)
    for answer in llm.chat(questions, params, adapters):
        ids = torch.tensor([answer.prompt_token_ids])
        logprobs = checkpoints[answer.adapter](ids).logits[0, :-1].log_softmax(-1)
        assert answer.prompt_logprobs is not None
        for row, measured in zip(logprobs, answer.prompt_logprobs, strict=True):
            for token_id, _, logprob in measured.top:
                assert abs(float(row[token_id]) - logprob) < 1e-4


def test_while_sql_is_merged_all_others_answer_as_before(llm, asked):
    questions, adapters = asked(FEW)
    expected = [answer.token_ids for answer in llm.chat(questions, greedy(FEW), adapters)]
    llm.merge("sql")
    merged = [answer.token_ids for answer in llm.chat(questions, greedy(FEW), adapters)]
    llm.unmerge()
    assert merged == expected


@pytest.mark.parametrize("merges", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_rotating_merges_leave_the_base_digest(merges):
    llm = LLM("demo", {n: EXAMPLES / "adapters" / n for n in ("sql", "json", "triage")})
    assert llm.engine.base.dtype is torch.bfloat16
    digest = llm.base_digest()
    names = ("sql", "json", "triage")
    for i in range(merges):
        llm.merge(names[i % 3])  # a swap, but for the first of every five
        if i % 5 == 4:
            llm.unmerge()
    assert llm.merged is None
    assert llm.base_digest() == digest


@pytest.mark.parametrize("name", ["sql", "json", "triage", "pirate"])
def test_shipped_adapter_fits_the_demo_and_carries_its_scores(llm, name):
    folder = EXAMPLES / "adapters" / name
    adapter = load_adapter(folder, llm.engine.base.spec)
    scores = adapter.config.metadata["scores"]
    assert scores["after"]["exact_match"] > scores["before"]["exact_match"] + 0.5
    assert sum(f.stat().st_size for f in folder.iterdir()) < 6_000_000
