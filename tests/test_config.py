"""Parameters and settings: each wrong value is refused by name, with what would be right."""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from neuroada_serve.config import EngineConfig, ServerConfig, TrainConfig
from neuroada_serve.errors import RequestError, UsageError
from neuroada_serve.options import help_of, parse_bytes
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

CONFIGS = [EngineConfig, ServerConfig, TrainConfig]

# --- sampling parameters ---------------------------------------------------------------------


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


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_has_a_help_text(config):
    for field in dataclasses.fields(config):
        text = help_of(config, field.name)
        assert re.fullmatch(r"[A-Za-z].*[.\w]", text), field.name
        assert len(text) > 10


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_are_frozen_and_their_defaults_valid(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), dataclasses.fields(config)[0].name, 1)


@pytest.mark.parametrize("config", CONFIGS)
def test_unknown_setting_is_refused(config):
    with pytest.raises(TypeError, match="max_seqs"):
        config(max_seqs=3)
    with pytest.raises(KeyError, match=f"{config.__name__} has no field max_seqs"):
        help_of(config, "max_seqs")


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (EngineConfig, {"dtype": "int8"}, "dtype must be one of auto, .*, got 'int8'"),
        (EngineConfig, {"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        (EngineConfig, {"max_model_len": 0}, "max_model_len must be at least 1, got 0"),
        (
            EngineConfig,
            {"max_num_seqs": 64, "max_num_batched_tokens": 63},
            r"max_num_batched_tokens \(63\) must be at least max_num_seqs \(64\)",
        ),
        (EngineConfig, {"adapter_memory": 0}, "adapter_memory must be at least 1, got 0"),
        (EngineConfig, {"adapter_host_memory": -1}, "adapter_host_memory must be at least 0"),
        (EngineConfig, {"prefix_cache_memory": -1}, "prefix_cache_memory must be at least 0"),
        (
            EngineConfig,
            {"tenant_weights": {"a": 1, "b": 0}},
            "weight of 'b' must be above 0, got 0",
        ),
        (EngineConfig, {"adapter_weights": {"a": -0.5}}, "weight of 'a' must be above 0, got -0.5"),
        (ServerConfig, {"port": 65536}, r"port must be within 0..65535, got 65536"),
        (ServerConfig, {"port": -1}, "port must be within"),
        (ServerConfig, {"max_waiting": 0}, "max_waiting must be at least 1"),
        (ServerConfig, {"drain_timeout_s": -1}, "drain_timeout_s must be at least 0"),
        (TrainConfig, {"k": 0}, "k must be at least 1, got 0"),
        (TrainConfig, {"epochs": 1, "max_steps": 1}, "--epochs or --max-steps, not both"),
        (TrainConfig, {"epochs": 0}, "epochs must be above 0, got 0"),
        (TrainConfig, {"max_steps": 0}, "max_steps must be at least 1"),
        (TrainConfig, {"lr": 0}, "lr must be above 0.*got 0"),
        (TrainConfig, {"lr": -0.1}, "lr must be above 0"),
        (TrainConfig, {"batch_size": 0}, "batch_size must be at least 1"),
        (TrainConfig, {"max_length": 1}, "max_length must be at least 2"),
        (TrainConfig, {"eval_fraction": 1}, r"eval_fraction must be within \[0, 1\)"),
        (TrainConfig, {"eval_fraction": -0.1}, r"eval_fraction must be within \[0, 1\)"),
        (TrainConfig, {"warmup_ratio": -0.1}, "warmup_ratio must be"),
        (TrainConfig, {"dtype": "half"}, "dtype must be one of"),
        (
            TrainConfig,
            {"prompt_format": "raw"},
            "prompt_format must be one of chat, plain",
        ),
    ],
)
def test_wrong_setting_is_refused_by_name(config, values, message):
    with pytest.raises(UsageError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (TrainConfig, {"lr": math.nan}),
        (TrainConfig, {"lr": math.inf}),
        (TrainConfig, {"epochs": math.nan}),
        (TrainConfig, {"warmup_ratio": math.nan}),
        (TrainConfig, {"warmup_ratio": 1.5}),
        (TrainConfig, {"eval_fraction": math.nan}),
        (ServerConfig, {"drain_timeout_s": math.nan}),
    ],
)
def test_number_that_is_none_is_refused_by_name(config, values):
    with pytest.raises(UsageError, match=next(iter(values))):
        config(**values)


@pytest.mark.parametrize("weights", ["tenant_weights", "adapter_weights"])
@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weight_that_is_none_is_refused_by_whose_it_is(weights, weight):
    with pytest.raises(UsageError, match="weight of 'fr' must be above 0"):
        EngineConfig(**{weights: {"fr": weight}})


def test_limits_of_settings_are_allowed():
    EngineConfig(max_num_seqs=512, max_num_batched_tokens=512, max_model_len=None)
    EngineConfig(adapter_memory=1, adapter_host_memory=0, prefix_cache_memory=0)
    EngineConfig(tenant_weights={"a": 1e-9, "": 1e9}, adapter_weights={"fr": 2})
    ServerConfig(port=0, drain_timeout_s=0, adapter_dir=Path("x"))
    ServerConfig(allow_runtime_adapters=True, adapter_dir=None)  # to pin, merge and unload
    TrainConfig(eval_fraction=0, warmup_ratio=0, max_length=2, epochs=0.01)


def test_memory_and_weights_are_the_devices_and_alike_by_default():
    config = EngineConfig()
    assert config.adapter_memory is config.adapter_host_memory is config.prefix_cache_memory is None
    assert config.tenant_weights == config.adapter_weights == {}
    assert ServerConfig().tenant_header is None  # clients could name anybody


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("1000000", 10**6),
        ("7B", 7),
        ("512MiB", 512 << 20),
        ("4GB", 4 * 10**9),
        ("4gb", 4 * 10**9),
        ("1.5 KiB", 1536),
        (" 2TiB ", 2 << 40),
        ("3kB", 3000),
        ("0.5B", 0),
        ("123456789012345", 123456789012345),
    ],
)
def test_size_is_read_in_its_unit(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "MiB", "-1", "+1", "1e9", "4XB", "4 G B", "1,5GB", ".5GB", "1.GB", "0x10", "nan"]
    + ["inf", "4GB4", "4\nGB x", "9" * 400],
)
def test_what_is_no_size_is_refused_with_examples(text):
    with pytest.raises(UsageError, match=r"is not a size; give .* 512MiB or 4GB"):
        parse_bytes(text)


@pytest.mark.parametrize(("k", "expected"), [(1, 0.02), (4, 0.01), (16, 0.005)])
def test_default_learning_rate_falls_with_k(k, expected):
    assert TrainConfig(k=k).peak_lr == pytest.approx(expected)
    assert TrainConfig(k=k, lr=0.3).peak_lr == 0.3
