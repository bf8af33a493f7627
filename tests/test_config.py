"""Parameters and settings: each wrong value is refused by name, with what would be right."""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from neuroada_serve.config import EngineConfig, ServerConfig, TrainConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.options import help_of

CONFIGS = [EngineConfig, ServerConfig, TrainConfig]


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
        (EngineConfig, {"kv_cache_memory": 0}, "kv_cache_memory must be at least 1, got 0"),
        (EngineConfig, {"target_itl_ms": 0}, "target_itl_ms must be above 0, got 0"),
        (
            EngineConfig,
            {"gpu_memory_utilization": 0},
            "gpu_memory_utilization must be above 0 and at most 1, got 0",
        ),
        (EngineConfig, {"gpu_memory_utilization": 1.01}, "at most 1, got 1.01"),
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
        (EngineConfig, {"target_itl_ms": math.nan}),
        (EngineConfig, {"target_itl_ms": math.inf}),
        (EngineConfig, {"gpu_memory_utilization": math.nan}),
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
    EngineConfig(kv_cache_memory=1, gpu_memory_utilization=1, target_itl_ms=1e-9)
    EngineConfig(tenant_weights={"a": 1e-9, "": 1e9}, adapter_weights={"fr": 2})
    ServerConfig(port=0, drain_timeout_s=0, adapter_dir=Path("x"))
    ServerConfig(allow_runtime_adapters=True, adapter_dir=None)  # to pin, merge and unload
    TrainConfig(eval_fraction=0, warmup_ratio=0, max_length=2, epochs=0.01)


def test_memory_and_weights_are_the_devices_and_alike_by_default():
    config = EngineConfig()
    assert config.adapter_memory is config.adapter_host_memory is config.prefix_cache_memory is None
    assert config.tenant_weights == config.adapter_weights == {}
    assert ServerConfig().tenant_header is None  # clients could name anybody


@pytest.mark.parametrize(("k", "expected"), [(1, 0.02), (4, 0.01), (16, 0.005)])
def test_default_learning_rate_falls_with_k(k, expected):
    assert TrainConfig(k=k).peak_lr == pytest.approx(expected)
    assert TrainConfig(k=k, lr=0.3).peak_lr == 0.3
