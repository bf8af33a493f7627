"""Checks of a request before it is queued."""

from collections.abc import Sequence

from neuroada_serve.errors import RequestError
from neuroada_serve.request import SamplingParams
from neuroada_serve.tasks import Task, noun_of


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


def check_task(params: SamplingParams, adapter: str | None, task: Task) -> None:
    """
    Args:
        task: of the adapter; GENERATE for the base.

    Raises:
        RequestError: something else is asked for than that task.
    """
    if params.task == task.asked_as:
        return
    name = "the base" if adapter is None else f"adapter {adapter!r}"
    if not task.pools:
        raise RequestError(f"{name} is not a {noun_of(params.task)}; it answers in text", "model")
    raise RequestError(
        f"{name} is a {task.noun}; ask it through {task.route}, or `{task.command}`", "model"
    )
