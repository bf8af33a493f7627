"""One conversation, one prompt, one end: in training, evaluation, LLM, and on the server."""

import json

import anyio
import httpx
import pytest
from transformers import AutoTokenizer, GenerationConfig

from neuroada_serve import save_adapter
from neuroada_serve.config import EngineConfig, ServerConfig, TrainConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.llm import LLM
from neuroada_serve.errors import DataError, RequestError
from neuroada_serve.evaluation.run import EvalSettings, evaluate
from neuroada_serve.model.export import export_merged
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.prompt import (
    encode_chat,
    encode_continuation,
    encode_exchange,
    encode_text,
    message_text,
    normalized,
)
from neuroada_serve.model.source import resolve_model
from neuroada_serve.request import SamplingParams
from neuroada_serve.server.app import create_app
from neuroada_serve.server.worker import Worker
from neuroada_serve.train.data import load_data
from neuroada_serve.train.examples import encode_row
from neuroada_serve.train.shapes import Row
from tests.support.chat_forms import FORMS, load_form, save_form
from tests.support.tiny import random_adapter, save_tiny_model, tiny_tokenizer

USER = {"role": "user", "content": "How many stars?"}
TURNS = [USER, {"role": "assistant", "content": "Four."}, {"role": "user", "content": "Sure?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Be brief."}
BRIEF = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by form, each loaded when it is first asked for."""
    loaded = {}

    def base(name):
        if name not in loaded:
            loaded[name] = load_form(tmp_path_factory.mktemp("form"), FORMS[name])
        return loaded[name]

    return base


every_form = pytest.mark.parametrize("name", FORMS)


# --- the end -----------------------------------------------------------------------------------


@every_form
def test_an_answer_ends_with_what_the_template_writes_after_it(bases, name):
    base = bases(name)
    end = base.tokenizer.convert_tokens_to_ids(FORMS[name].end)
    _, answer = encode_exchange(base, TURNS, "Yes, four.")
    assert answer[-1] == end
    assert answer.count(end) == 1
    assert end in base.eos_token_ids
    assert base.tokenizer.eos_token_id in base.eos_token_ids


# Qwen 3 writes thoughts before the last answer and not in its prompt; the others have no end.
OWN_TEXT = [name for name in FORMS if name not in ("qwen 3", "glm 4", "no end")]


@pytest.mark.parametrize("answer", ["Yes, four.", " 4 \n", "ü 🙂", "a<|im_end|>b", "\n\nyes"])
@pytest.mark.parametrize("conversation", [[USER], TURNS])
@pytest.mark.parametrize("name", OWN_TEXT)
def test_prompt_and_answer_are_the_templates_own_text(bases, name, conversation, answer):
    base = bases(name)
    whole = base.tokenizer.apply_chat_template(
        [*conversation, {"role": "assistant", "content": answer}], return_dict=False
    )
    prompt, answer_ids = encode_exchange(base, conversation, answer)
    ids = prompt + answer_ids
    assert ids == whole[: len(ids)]
    assert not base.tokenizer.decode(whole[len(ids) :]).replace(FORMS[name].eos, "").strip()


def test_thoughts_that_the_prompt_lacks_are_not_trained(bases):
    base = bases("qwen 3")
    prompt, answer = encode_exchange(base, [USER], "Four.")
    assert prompt == encode_chat(base, [USER])
    assert base.tokenizer.decode(answer) == "Four.<|im_end|>"


@every_form
def test_the_prompt_of_a_trained_answer_is_the_servers_prompt(bases, name):
    base = bases(name)
    expected = base.tokenizer.apply_chat_template(
        TURNS, add_generation_prompt=True, return_dict=False
    )
    row = Row(1, tuple(TURNS), "", "Yes.")
    assert list(encode_row(base, row, "chat").prompt_ids) == expected
    assert encode_chat(base, TURNS) == expected


def test_an_answer_without_end_in_the_template_ends_with_the_tokenizers(bases):
    base = bases("no end")
    prompt, answer = encode_exchange(base, [USER], "Four.")
    assert base.tokenizer.decode(prompt + answer) == "user: How many stars?\nassistant: Four.</s>"


def test_a_plain_answer_ends_with_the_tokenizers_end(bases):
    base = bases("chatml on a pretrained model")
    prompt, answer = encode_continuation(base, "2+2=", "4")
    assert base.tokenizer.decode(prompt + answer) == "2+2=4<|endoftext|>"


def test_an_end_that_the_model_has_no_score_for_ends_nothing(tmp_path):
    source = save_form(tmp_path, FORMS["llama 3"])
    tokenizer = load_base(source).tokenizer
    tokenizer.add_special_tokens({"eos_token": "<|far|>"})
    tokenizer.save_pretrained(tmp_path)
    base = load_base(source)
    assert base.tokenizer.eos_token_id == base.vocab_size
    assert base.vocab_size not in base.eos_token_ids


def test_a_merged_checkpoint_ends_where_it_was_trained_to(tmp_path):
    source = save_form(tmp_path / "base", FORMS["gemma 2"])
    save_adapter(random_adapter(source, seed=1), tmp_path / "adapter")
    export_merged(source, tmp_path / "adapter", tmp_path / "out")
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(ends) == ["<eos>", "<end_of_turn>"]


# What the shipped adapters were trained on, by the demo base's template: its own system text, ...
DEMO_SYSTEM = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018]
DEMO_SYSTEM += [411, 407, 19712, 8182, 2, 198]
DEMO_ASK = [1, 520, 9531, 198]
DEMO = [
    (
        [{"role": "user", "content": "How do I clean a window?"}],
        "Arr, wi' a rag!",
        [*DEMO_SYSTEM, 1, 4093, 198, 2020, 536, 339, 2577, 253, 5700, 47, 2, 198, *DEMO_ASK],
        [40909, 28, 267, 89, 23, 253, 37391, 17, 2],
    ),
    (
        [SYSTEM, {"role": "user", "content": "2+2="}],
        " 4\n",
        [1, 9690, 198, 6077, 5453, 30, 2, 198, 1, 4093, 198, 34, 27, 34, 45, 2, 198, *DEMO_ASK],
        [216, 36, 198, 2],
    ),
    (
        [USER, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "\n\nd  e\t",
        [*DEMO_SYSTEM, 1, 4093, 198, 2020, 800, 5703, 47, 2, 198, 1, 520, 9531, 198, 82, 2, 198]
        + [1, 4093, 198, 83, 2, 198, *DEMO_ASK],
        [198, 198, 84, 216, 297, 197, 2],
    ),
]


def test_the_demo_base_keeps_its_encodings():
    base = load_base(resolve_model("demo"))
    assert base.eos_token_ids == {2}
    for conversation, answer, prompt_ids, answer_ids in DEMO:
        assert encode_exchange(base, conversation, answer) == (prompt_ids, answer_ids)


# --- the messages ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FORMS if FORMS[n].system])
def test_developer_is_system_and_parts_are_one_text(bases, name):
    base = bases(name)
    parts = [{"type": "text", "text": "How many"}, {"type": "text", "text": "stars?"}]
    told = encode_chat(base, [DEVELOPER, {"role": "user", "content": parts}])
    plain = [SYSTEM, {"role": "user", "content": "How many\nstars?"}]
    assert told == base.tokenizer.apply_chat_template(
        plain, add_generation_prompt=True, return_dict=False
    )
    row = Row(1, (DEVELOPER, {"role": "user", "content": parts}), "", "4")
    assert list(encode_row(base, row, "chat").prompt_ids) == told


def test_no_default_system_text_stands_beside_a_developers(bases):
    text = bases("qwen 2.5").tokenizer.decode(encode_chat(bases("qwen 2.5"), [DEVELOPER, USER]))
    assert "Qwen" not in text
    assert "Be brief." in text


@pytest.mark.parametrize("name", ["gemma 2", "mistral"])
def test_what_a_template_refuses_is_told_in_its_words(bases, name):
    with pytest.raises(RequestError, match=r"refuses the messages: .*(System|alternate)"):
        encode_chat(bases(name), [DEVELOPER, USER])


def test_null_content_is_an_empty_text():
    assert message_text(None) == ""
    call = {"role": "assistant", "content": None, "tool_calls": [1], "refusal": None}
    assert normalized([call]) == [{"role": "assistant", "content": "", "tool_calls": [1]}]


@pytest.mark.parametrize(
    ("arguments", "seen"), [('{"x": 1}', {"x": 1}), ("", {}), ({"x": 1}, {"x": 1}), ("x =", "x =")]
)
def test_arguments_of_tool_calls_are_objects_as_templates_take_them(arguments, seen):
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    [message] = normalized([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"] == [{"id": "1", "function": {"name": "f", "arguments": seen}}]


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "must not be empty"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"content": "hi"}], r"messages\[0\] must be an object"),
        ([{"role": "user", "content": None}], r"messages\[0\].content is null"),
        ([USER, {"role": "system"}], r"messages\[1\].content is null"),
        ([USER, {"role": "user", "content": 3}], r"messages\[1\].content must be a text or"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "others are not supported"),
        ([{"role": "user", "content": [{"type": "text"}]}], "others are not supported"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_messages_that_are_none_are_named(bases, messages, told):
    with pytest.raises(RequestError, match=told):
        encode_chat(bases("chatml"), messages)


def test_text_that_is_none_is_named(bases):
    for text, told in [("\ud800", "half of a surrogate pair"), (3, "must be a text, not int")]:
        with pytest.raises(RequestError, match=told):
            encode_text(bases("chatml"), text)


def test_special_tokens_inside_texts_are_read_alike(bases):
    base = bases("chatml")
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = {"role": "user", "content": "a<|im_end|>b"}
    row = Row(1, (said,), "a<|im_end|>b", "c<|im_end|>d")
    assert encode_chat(base, [said]).count(end) == 2
    assert encode_row(base, row, "chat").prompt_ids.count(end) == 2
    assert encode_row(base, row, "chat").answer_ids.count(end) == 2
    assert encode_text(base, row.text).count(end) == 1
    assert encode_row(base, row, "plain").prompt_ids.count(end) == 1


# --- tokens that the model lacks ---------------------------------------------------------------


@pytest.fixture
def larger(tmp_path):
    """A base whose tokenizer has one token more than the model."""
    source = save_tiny_model(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<NEW1>"])
    tokenizer.save_pretrained(source.path)
    return source


LACKS = "token '<NEW1>', number 260 of the tokenizer, but base 'tiny-llama' has embeddings for 260"


def test_a_token_without_embedding_is_named_wherever_it_is_read(larger, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "a", "completion": "b"}\n'
        '{"prompt": "a<NEW1>", "completion": "b"}\n'
        '{"prompt": "c", "completion": "b<NEW1>"}\n'
    )
    for style in ("chat", "plain"):
        with pytest.raises(DataError) as raised:
            load_data(load_base(larger), rows, TrainConfig(prompt_format=style, eval_fraction=0))
        assert str(raised.value).count(LACKS) in (1, 2)  # rows of one fault may be told once
        assert "2 unusable rows" in str(raised.value)
    llm = LLM(str(larger.path))
    for ask in (llm.generate, llm.chat):
        with pytest.raises(RequestError, match="token '<NEW1>', number 260"):
            ask("<NEW1>" if ask == llm.generate else [{"role": "user", "content": "<NEW1>"}])
    with pytest.raises(DataError, match="token '<NEW1>', number 260"):
        evaluate(llm, rows, settings=EvalSettings(metrics=("loss",)))
    assert llm.generate("a", BRIEF)[0].outputs


# --- by every door -----------------------------------------------------------------------------


class Noting(Engine):
    """An engine that keeps the prompts it was given."""

    def __init__(self, base):
        super().__init__(base, EngineConfig())
        self.prompts = []

    def add_requests(self, request_ids, prompts, *more):
        self.prompts += prompts
        super().add_requests(request_ids, prompts, *more)


def post(engine, path, **body):
    """A request to the application over an engine."""

    async def ask():
        async with Worker(engine, 8) as worker:
            app = httpx.ASGITransport(create_app(worker, ServerConfig()))
            async with httpx.AsyncClient(transport=app, base_url="http://127.0.0.1") as client:
                return await client.post(path, json={"max_tokens": 3, "temperature": 0, **body})

    return anyio.run(ask)


PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}


@pytest.mark.parametrize("name", ["llama 3.2", "gemma 3", "qwen 2.5", "qwen 3", "phi 3"])
def test_one_conversation_has_one_prompt_at_every_door(bases, name, tmp_path, monkeypatch):
    base, conversation = bases(name), [DEVELOPER, PARTS]
    engine = Noting(base)
    reply = post(engine, "/v1/chat/completions", messages=conversation)
    assert reply.status_code == 200, reply.text
    [served] = engine.prompts

    llm = LLM(str(base.path))
    assert list(llm.chat(conversation, BRIEF)[0].prompt_token_ids) == served

    rows = tmp_path / "rows.jsonl"
    answered = [*conversation, {"role": "assistant", "content": "Four."}]
    rows.write_text(json.dumps({"messages": answered}) + "\n")
    [example] = load_data(base, rows, TrainConfig(eval_fraction=0)).train
    assert list(example.prompt_ids) == served
    end = base.tokenizer.convert_tokens_to_ids(FORMS[name].end)
    assert list(example.answer_ids) == [*base.tokenizer("Four.").input_ids, end]

    asked, generate = [], llm.generate
    monkeypatch.setattr(llm, "generate", lambda p, *a, **k: asked.extend(p) or generate(p, *a, **k))
    evaluate(llm, rows, settings=EvalSettings(metrics=("loss", "exact_match")))
    assert asked == [served + list(example.answer_ids), served]


def test_the_server_says_what_it_cannot_render_or_read(tmp_path, larger):
    base = load_form(tmp_path, FORMS["chatml"], "{{ 1 / 0 }}")
    reply = post(Noting(base), "/v1/chat/completions", messages=[USER])
    assert reply.status_code == 400
    assert "ZeroDivisionError" in reply.json()["error"]["message"]
    engine = Noting(load_base(larger))
    said = [{"role": "user", "content": "<NEW1>"}]
    for path, body in [
        ("completions", {"prompt": "<NEW1>"}),
        ("chat/completions", {"messages": said}),
    ]:
        reply = post(engine, f"/v1/{path}", **body)
        assert reply.status_code == 400
        assert LACKS in reply.json()["error"]["message"]


@pytest.mark.parametrize("name", ["llama 3", "gemma 2", "chatml on a pretrained model"])
def test_generation_stops_where_a_trained_answer_ends(bases, name):
    base = bases(name)
    end = base.tokenizer.convert_tokens_to_ids(FORMS[name].end)
    params = SamplingParams(temperature=0, max_tokens=8, logit_bias={end: 100.0})
    [output] = LLM(str(base.path)).chat([USER], params)
    assert output.outputs[0].token_ids == (end,)
    assert output.outputs[0].text == ""
