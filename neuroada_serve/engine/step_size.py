"""The size of a step on a base's device: its most tokens, and the pace that bounds its prompts."""

import torch

from neuroada_serve.config import PROMPT_BLOCK, EngineConfig
from neuroada_serve.engine.pace import StepPace
from neuroada_serve.model.loader import BaseModel

_TOKENS_CPU, _TOKENS_GPU = 512, 2048
_CPU_ATTENTION = 2.0  # times the seconds of as many multiplications with weights (bench/LOG.md)


def step_tokens(config: EngineConfig, device: torch.device) -> int:
    """Return max_num_batched_tokens, or what is the default on a device: more where sequences need
    more."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    default = _TOKENS_CPU if device.type == "cpu" else _TOKENS_GPU
    return max(default, config.max_num_seqs + (PROMPT_BLOCK if config.deterministic else 0))


def new_pace(base: BaseModel, config: EngineConfig) -> StepPace:
    """Make the pace of an engine that has measured nothing yet."""
    target = config.target_itl_ms
    return StepPace(
        None if target is None else target / 1000,
        step_tokens(config, base.device),
        context_scale(base),
        PROMPT_BLOCK if config.deterministic else 1,
    )


def context_scale(base: BaseModel) -> float:
    """Return the position at which attention over what came before costs a token as much as all
    products with weights do."""
    config = base.model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    # By the shapes: a model that was packed for its kernels has hardly any parameters left.
    num_weights = sum(d_out * d_in for d_out, d_in in base.spec.shapes.values())
    slower = _CPU_ATTENTION if base.device.type == "cpu" else 1.0
    return float(num_weights / (2 * width * config.num_hidden_layers * slower))
