"""Checks of a request before it is queued."""

from collections.abc import Sequence

from neuroada_serve.errors import RequestError
from neuroada_serve.request import SamplingParams


def check_prompt(token_ids: Sequence[int], max_model_len: int, vocab_size: int) -> None:
    """Refuse a prompt that the engine cannot run.

    Raises:
        RequestError: the prompt is empty, too long, or holds ids outside the vocabulary.
    """
    if len(token_ids) == 0:
        raise RequestError("the prompt is empty; it needs at least one token", "prompt")
    if len(token_ids) >= max_model_len:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
            f"contains {len(token_ids)} input tokens. Please reduce its length.",
            "prompt",
        )
    if set(map(type, token_ids)) != {int} or not (
        0 <= min(token_ids) <= max(token_ids) < vocab_size
    ):
        raise RequestError(f"prompt token ids must be integers within [0, {vocab_size})", "prompt")


def check_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse parameters whose token ids the engine cannot use.

    Raises:
        RequestError: a parameter names ids outside the vocabulary.
    """
    for param in ("logit_bias", "stop_token_ids"):
        if not all(0 <= i < vocab_size for i in getattr(params, param)):
            raise RequestError(f"{param} has token ids outside [0, {vocab_size})", param)


def check_task(params: SamplingParams, adapter: str | None, labels: Sequence[str]) -> None:
    """
    Args:
        labels: of the adapter, if it is a classifier.

    Raises:
        RequestError: text is asked of a classifier, or a class of what is none.
    """
    name = "the base" if adapter is None else f"adapter {adapter!r}"
    if params.classify and not labels:
        raise RequestError(f"{name} is no classifier; it answers in text", "model")
    if labels and not params.classify:
        raise RequestError(
            f"{name} is a classifier; ask it through /v1/classify, or `neuroada classify`", "model"
        )
