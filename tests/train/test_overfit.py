"""One conversation, learnt by heart: trained, scored and served as the same tokens, over HTTP."""

import json

import httpx
import pytest

from neuroada_serve.config import EngineConfig, TrainConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.llm import LLM
from neuroada_serve.evaluation.run import EvalSettings, evaluate
from neuroada_serve.model.loader import load_base
from neuroada_serve.train import trainer
from neuroada_serve.train.trainer import train_adapter
from tests.support.chat_forms import FORMS, save_form
from tests.support.serving import serve_while

pytestmark = pytest.mark.timeout(120)

ANSWER = "Sure: four, é 🙂."
ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many stars?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "  Are you\nsure?"},
]
CONFIG = TrainConfig(k=8, lr=0.05, max_steps=120, batch_size=1, eval_fraction=0, save_steps=0)


class Noting(Engine):
    """An engine that keeps the prompts it was given."""

    prompts: list[list[int]]

    def add_requests(self, request_ids, prompts, *more, **options):
        self.prompts = [*getattr(self, "prompts", []), *map(list, prompts)]
        super().add_requests(request_ids, prompts, *more, **options)


@pytest.mark.parametrize("name", ["chatml", "llama 3"])
def test_row_that_was_learnt_by_heart_is_answered_word_for_word(name, tmp_path, monkeypatch):
    source = save_form(tmp_path / "base", FORMS[name])
    rows, out = tmp_path / "rows.jsonl", tmp_path / "adapters" / "row"
    messages = [*ASKED, {"role": "assistant", "content": ANSWER}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")

    # 1. What training learns.
    learnt, load = [], trainer.load_data
    monkeypatch.setattr(trainer, "load_data", lambda *a: learnt.append(load(*a)) or learnt[-1])
    train_adapter(load_base(source), rows, out, CONFIG)
    [example] = learnt[0].train
    prompt, answer = list(example.prompt_ids), list(example.answer_ids)
    tokenizer = load_base(source).tokenizer
    rendered = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt) == rendered
    assert tokenizer.decode(answer) == ANSWER + FORMS[name].end

    # 2. What is scored.
    llm, scored = LLM(str(source.path), {"row": out}), []
    generate = llm.generate
    monkeypatch.setattr(
        llm, "generate", lambda p, *a, **k: scored.extend(p) or generate(p, *a, **k)
    )
    settings = EvalSettings(metrics=("loss", "exact_match"))
    [result] = evaluate(llm, rows, ["row"], settings).results
    assert scored == [prompt + answer, prompt]
    assert result.scores["exact_match"].value == 1.0

    # 3. What is served.
    engine = Noting(load_base(source), EngineConfig())

    def visit(url: str) -> None:
        body = {"model": "row", "messages": ASKED, "temperature": 0, "max_tokens": 100}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        [choice] = reply["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")
        assert reply["usage"]["prompt_tokens"] == len(prompt)
        assert reply["usage"]["completion_tokens"] == len(answer)

    engine.adapters.load("row", out)
    assert serve_while(engine, visit) == 0
    assert engine.prompts == [prompt]
