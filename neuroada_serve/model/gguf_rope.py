"""Translate a GGUF file's rotary scaling to transformers' rope_parameters."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from neuroada_serve.model.gguf_file import GgufFile
from neuroada_serve.model.gguf_keys import Keys

FREQS = "rope_freqs.weight"
LONG = "rope_factors_long.weight"
SHORT = "rope_factors_short.weight"
# Llama 3.1 and all that followed it; only the length differs, and their ratios are what counts.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR = 1.0, 4.0
_ORIGINAL_LENGTHS = (8192, *(2**power for power in range(4, 21)))


def rope_parameters(file: GgufFile, keys: Keys, dim: int, places: frozenset[str]) -> dict[str, Any]:
    """Return the rotary positions of a model whose layers are all alike.

    Args:
        dim: number of a head's dimensions that are rotated.
        places: those of FREQS, LONG and SHORT that this architecture reads.

    Raises:
        ModelError: scaled in a way that transformers cannot compute.
    """
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", 0.0) or keys.number("rope.scale_linear", 0.0) or 1.0
    length = keys.count("context_length")
    original = keys.count("rope.scaling.original_context_length", length)
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    yarn = _yarn_settings(keys)
    keys.accept("rope.scaling.finetuned", "rope.scale_linear")
    tensors = places & set(file.tensors)
    factors = {name: _factors(file, name, dim) for name in sorted(tensors)}

    if kind not in ("none", "linear", "yarn", "longrope"):
        raise file.refusal(f"rotary scaling {kind!r} is not known")
    if kind == "none":
        factor = 1.0
    found: dict[str, Any] = {"rope_theta": theta}
    if LONG in factors or SHORT in factors:
        for name in {LONG, SHORT} - set(factors):
            raise file.refusal(f"it lacks tensor {name}")
        if kind == "yarn" or factor != 1 or FREQS in factors:
            raise file.refusal("its rotary positions are scaled in two ways at once")
        short, long = factors[SHORT], factors[LONG]
        return found | _longrope(short, long, original, attention)
    if kind == "longrope":
        raise file.refusal(f"it lacks tensors {LONG} and {SHORT}")
    if kind == "yarn" and (factor != 1 or attention != 1):
        if FREQS in factors:
            raise file.refusal("its rotary positions are scaled in two ways at once")
        if attention != 1:  # llama.cpp multiplies the usual factor by it
            usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
            yarn["attention_factor"] = yarn.get("attention_factor", usual) * attention
        scaling = {"factor": factor, "original_max_position_embeddings": original}
        return found | {"rope_type": "yarn"} | scaling | yarn
    if attention != 1:
        raise file.refusal(f"rotary attention factor {attention:g} belongs to no scaling")
    if FREQS in factors and (factors[FREQS] != 1).any():
        by_frequency = factors[FREQS] * np.float32(factor)
        llama3 = _llama3(by_frequency, theta, dim, original)
        return found | (llama3 or _longrope(by_frequency, by_frequency, length, 1.0))
    if factor != 1:
        return found | {"rope_type": "linear", "factor": factor}
    return found | {"rope_type": "default"}


def _yarn_settings(keys: Keys) -> dict[str, float]:
    """Return the settings that transformers' yarn takes; the others must be neutral."""
    keys.refuse_unless("rope.scaling.yarn_ext_factor", (-1.0, 1.0))
    keys.refuse_unless("rope.scaling.yarn_log_multiplier", (0.0,))
    keys.refuse_unless("rope.scaling.alpha", (0.0,))
    names = {
        "rope.scaling.yarn_attn_factor": "attention_factor",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
    }
    found = {ours: keys.number(theirs, -1.0) for theirs, ours in names.items()}
    return {name: value for name, value in found.items() if value >= 0}  # negative: not set


def _factors(file: GgufFile, name: str, dim: int) -> np.ndarray[Any, Any]:
    if file.shape(name) != (dim // 2,):
        raise file.refusal(f"tensor {name} has shape {file.shape(name)} in place of {(dim // 2,)}")
    return file.values(name)


def _longrope(
    short: np.ndarray[Any, Any], long: np.ndarray[Any, Any], original: int, attention: float
) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": _shortest(short),
        "long_factor": _shortest(long),
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _shortest(values: np.ndarray[Any, Any]) -> list[float]:
    """Return the shortest decimals that are these float32 values."""
    return [float(str(value)) for value in values]


def _llama3(
    factors: np.ndarray[Any, Any], theta: float, dim: int, original: int
) -> dict[str, Any] | None:
    """Return Llama 3.1's settings if these are its factors to the last bit, else None.

    A file has the factors alone. Other settings are served as longrope with one list of factors,
    which is the same rotation.
    """
    factor = float(str(factors.max()))
    lengths: Sequence[int] = (original, *_ORIGINAL_LENGTHS)
    for length in lengths:
        if np.allclose(_llama3_factors(factor, length, theta, dim), factors, rtol=2e-6, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW_FREQ_FACTOR,
                "high_freq_factor": _HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": length,
            }
    return None


def _llama3_factors(factor: float, length: int, theta: float, dim: int) -> np.ndarray[Any, Any]:
    """Return the factors by which Llama 3.1 divides each frequency."""
    turns = length / (2 * math.pi * theta ** (np.arange(0, dim, 2) / dim))
    smooth = (turns - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
    smooth = np.clip(smooth, 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))
