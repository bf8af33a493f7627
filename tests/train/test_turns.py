"""Conversations within a row: every common way of writing them, and what cannot be learnt."""

import json

import pytest

from neuroada_serve.train.rows import RecordFault
from neuroada_serve.train.turns import LeftOut, exchange, messages_of, text_of, weight_of

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (said("user", "a"), said("user", "a")),
        (said("user", ["a", {"type": "text", "text": "b"}]), said("user", "a\nb")),
        (said("assistant", None), said("assistant", "")),
        ({"role": "assistant", "tool_calls": [CALL]}, said("assistant", "", tool_calls=[CALL])),
        (said("user", "a", name="Al", tool_calls=None), said("user", "a", name="Al")),
        (said("user", 4), said("user", "4")),
        ({"from": "system", "value": "a"}, said("system", "a")),
        ({"from": "human", "value": "a"}, said("user", "a")),
        ({"from": "gpt", "value": "a", "weight": 0}, said("assistant", "a", weight=False)),
        ({"from": "observation", "value": "a"}, said("tool", "a")),
        (
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            said("assistant", "", tool_calls=[CALL]),
        ),
    ],
)
def test_messages_become_those_of_templates(raw, message):
    assert messages_of([raw], "messages") == [message]


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ("a", r'\[1\] must be an object {"role", "content"}'),
        ({"content": "a"}, r"\[1\] must be an object"),
        (said("user", {}), r"\[1\].content must be a text or a number, not dict"),
        (said("user", [{"type": "image_url"}]), r"content\[0\] is of type 'image_url'; only text"),
        ({"from": "narrator", "value": "a"}, r"from is 'narrator', which must be human, gpt"),
        ({"from": "function_call", "value": "f(1)"}, "must be a call"),
        (said("user", "a", weight=1), "weight is for answers, not for role 'user'"),
        (said("assistant", "a", weight=0.5), r"weight must be 0 \(left out\) or 1, not 0.5"),
        (said("assistant", "", tool_calls="f"), "tool_calls must be a list of objects"),
    ],
)
def test_a_message_that_is_none_is_named(raw, fault):
    with pytest.raises(RecordFault, match=fault):
        messages_of([said("user", "q"), raw], "messages")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (said("assistant", "", tool_calls=[CALL]), "an answer that is a tool call"),
        (said("assistant", "so", tool_calls=[CALL]), "an answer that is a tool call"),
        (said("assistant", " "), "an empty answer"),
        (said("assistant", "a", weight=False), "no answer of weight 1"),
    ],
)
def test_what_cannot_be_learnt_is_left_out(answer, reason):
    with pytest.raises(LeftOut, match=reason):
        exchange([said("user", "q"), answer])


def test_of_an_answer_only_the_text_is_learnt_and_the_rest_told():
    found = exchange([said("user", "q"), said("assistant", "a", reasoning_content="r")])
    assert (found.answer, found.unused) == ("a", {"reasoning_content"})


@pytest.mark.parametrize(
    ("value", "text"), [(42, "42"), (42.0, "42"), (0.5, "0.5"), (True, "True"), (1e300, "1e+300")]
)
def test_numbers_are_texts(value, text):
    assert text_of(value, "answer") == text


def test_weights_are_0_or_1_however_they_are_written():
    assert [weight_of(value) for value in (0, 0.0, "0", "0.0", False)] == [False] * 5
    assert [weight_of(value) for value in (1, 1.0, "1", "1.0", True)] == [True] * 5


def test_a_conversation_with_a_null_question_is_left_out():
    with pytest.raises(LeftOut, match="a message without content"):
        messages_of([said("user", None), said("assistant", "a")], "messages")
