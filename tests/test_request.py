"""Sampling parameters and outputs."""

import dataclasses
import math

import pytest

from neuroada_serve.errors import RequestError
from neuroada_serve.request import (
    MAX_CHOICES,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    Completion,
    FinishReason,
    Output,
    RequestOutput,
    SamplingParams,
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 0, r"n must be within \[1, 128\], got 0"),
        ("n", MAX_CHOICES + 1, "n must be within"),
        ("n", 1.5, "n must be an integer, got 1.5"),
        ("temperature", -0.1, r"temperature must be within \[0, 100\], got -0.1"),
        ("temperature", math.nan, "temperature must be within"),
        ("temperature", math.inf, "temperature must be within"),
        ("temperature", "1", "temperature must be a number, got '1'"),
        ("temperature", True, "temperature must be a number, got True"),
        ("top_p", 0, "top_p must be above 0; use temperature=0 for greedy"),
        ("top_p", 1.01, r"top_p must be within \[0, 1\], got 1.01"),
        ("top_k", -2, "top_k must be at least -1, got -2"),
        ("top_k", 2.0, "top_k must be an integer"),
        ("min_p", -0.5, r"min_p must be within \[0, 1\]"),
        ("presence_penalty", 2.1, r"presence_penalty must be within \[-2, 2\]"),
        ("frequency_penalty", -2.1, r"frequency_penalty must be within \[-2, 2\]"),
        ("repetition_penalty", 0, "repetition_penalty must be above 0"),
        ("repetition_penalty", -1, r"repetition_penalty must be within \[0, 100\]"),
        ("max_tokens", 0, "max_tokens must be at least 1, got 0"),
        ("max_tokens", 3.0, "max_tokens must be an integer"),
        ("max_tokens", math.inf, "max_tokens must be"),
        ("min_tokens", -1, "min_tokens must be at least 0, got -1"),
        ("seed", 2**63, "seed must be within"),
        ("seed", 1.0, "seed must be an integer"),
        ("logprobs", MAX_LOGPROBS + 1, r"logprobs must be within \[0, 20\]"),
        ("logprobs", True, "logprobs must be a number"),
        ("prompt_logprobs", -1, "prompt_logprobs must be within"),
        ("stop", "", "stop must be a string or strings, none empty"),
        ("stop", ["a", ""], "stop must be a string or strings"),
        ("stop", ["a", 7], "stop must be a string or strings"),
        ("stop", ["a"] * (MAX_STOP_STRINGS + 1), "at most 16 stop strings"),
        ("logit_bias", {5: math.nan}, "logit_bias values must be finite"),
        ("logit_bias", {5: -math.inf}, "logit_bias values must be finite"),
    ],
)
def test_wrong_parameter_is_refused_by_name(field, value, message):
    with pytest.raises(RequestError, match=f"^{message}|{message}$") as raised:
        SamplingParams(**{field: value})
    assert raised.value.param == field


@pytest.mark.parametrize("field", ["max_tokens", "min_tokens", "top_k"])
def test_limit_beyond_all_floats_is_no_limit(field):
    """JSON has integers of any length; none of them may be our own failure."""
    params = SamplingParams(**{"max_tokens": None, field: 10**400})
    assert getattr(params, field) == 10**400


def test_more_min_tokens_than_max_tokens_are_refused():
    with pytest.raises(RequestError, match="min_tokens=17 .*max_tokens=16") as raised:
        SamplingParams(min_tokens=17)
    assert raised.value.param == "min_tokens"
    SamplingParams(min_tokens=17, max_tokens=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {5: "x"}),
        ("logit_bias", {5: None}),
        ("logit_bias", {5: 10**400}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", [1.0]),
        ("stop", 5),
        ("stop", [None]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", None),
        ("stop_token_ids", 3),
    ],
)
def test_wrong_kind_of_value_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=field) as raised:
        SamplingParams(**{field: value})
    assert raised.value.param == field


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 100, "top_p": 1, "top_k": 0, "min_p": 1},
        {"n": MAX_CHOICES, "max_tokens": None, "seed": -(2**63), "logprobs": 0},
        {"seed": 2**63 - 1, "logprobs": MAX_LOGPROBS, "prompt_logprobs": 0},
        {"stop": ["a"] * MAX_STOP_STRINGS, "stop_token_ids": [1], "logit_bias": {1: -100}},
        {"stop": "a" * MAX_STOP_CHARS, "stop_token_ids": [1] * MAX_STOP_TOKEN_IDS},
        {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIASES), 1.0)},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.01},
    ],
)
def test_limits_themselves_are_allowed(values):
    params = SamplingParams(**values)
    assert {name: getattr(params, name) for name in values} == values


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stop", ["a"] * (MAX_STOP_STRINGS + 1), "at most 16 stop strings, got 17"),
        ("stop", ["a", "b" * (MAX_STOP_CHARS + 1)], "1024 characters, got one of 1025"),
        ("stop_token_ids", [1] * (MAX_STOP_TOKEN_IDS + 1), "at most 128 stop_token_ids, got 129"),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0), "at most 1024 .* got 1025"),
    ],
)
def test_too_many_are_refused_with_the_limit(field, value, message):
    with pytest.raises(RequestError, match=message) as raised:
        SamplingParams(**{field: value})
    assert raised.value.param == field


@pytest.mark.parametrize("field", ["stop", "stop_token_ids"])
def test_too_many_are_counted_not_looked_at(field):
    class Many(list):
        def __len__(self):
            return 10**9

        def __iter__(self):
            raise AssertionError("looked at")

    with pytest.raises(RequestError, match="got 1000000000"):
        SamplingParams(**{field: Many()})


def test_stop_strings_are_a_tuple_whatever_was_given():
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")


def test_greedy_is_temperature_zero():
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-9).greedy


def test_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)


def test_parameters_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2


def test_only_the_last_output_is_finished():
    assert not Output("r", 0).finished
    assert Output("r", 0, finish_reason=FinishReason.ABORT).finished


def test_request_output_speaks_for_its_first_choice():
    first = Completion(0, "one", (1,), FinishReason.STOP)
    second = Completion(1, "two", (2, 3), FinishReason.LENGTH)
    output = RequestOutput("r", None, (0,), None, (first, second))
    assert (output.text, output.token_ids, output.finish_reason) == ("one", (1,), "stop")
