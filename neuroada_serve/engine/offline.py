"""Offline batches: requests run to their ends, and their outputs put together."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress

from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.progress import Progress, UseTqdm
from neuroada_serve.errors import EngineError
from neuroada_serve.request import Completion, FinishReason, Output, RequestOutput, SamplingParams

BatchRequest = tuple[str, Seq[int], SamplingParams, str | None]  # id, prompt, params, adapter


def run_batch(
    engine: Engine,
    requests: Seq[BatchRequest],
    use_tqdm: UseTqdm,
    on_output: Callable[[Output], None] | None,
) -> list[list[Output]]:
    """Run requests in one continuous batch; return all outputs of each.

    If one is refused or the run is interrupted, all of them are aborted.

    Raises:
        EngineError: the engine is at its end.
    """
    collected: dict[str, list[Output]] = {request_id: [] for request_id, *_ in requests}
    if use_tqdm is True and on_output is not None:
        use_tqdm = False
    lengths = {request_id: len(prompt) for request_id, prompt, *_ in requests}
    progress = Progress(use_tqdm, lengths, [params for _, _, params, _ in requests])
    try:
        for request in requests:
            engine.add_request(*request)
        with engine.pace.unbounded():
            while engine.has_unfinished:
                outputs = engine.step()
                progress.see(outputs)
                for output in outputs:
                    collected[output.request_id].append(output)
                    if on_output is not None:
                        on_output(output)
    except BaseException:
        for request_id in collected:
            engine.abort(request_id)
        with suppress(EngineError):  # what has ended the engine is on its way already
            engine.step()  # hands out the aborted ones, which the engine then forgets
        raise
    finally:
        progress.close()
    return list(collected.values())


def pooled_output(outputs: Seq[Output]) -> Output:
    """Return the one output of a request whose adapter's task pools.

    Raises:
        EngineError: the request failed.
    """
    output = outputs[-1]
    if output.finish_reason is not FinishReason.STOP:
        raise EngineError(output.error or "the request was ended")
    return output


def request_output(
    outputs: Seq[Output],
    text: str | None,
    prompt: Seq[int],
    params: SamplingParams,
    adapter: str | None,
) -> RequestOutput:
    """Put all outputs of one request together.

    Args:
        outputs: in the order in which they came.
        text: the prompt, if it was given as text.
        prompt: its token ids.
    """
    choices = [[o for o in outputs if o.index == i] for i in range(params.n)]
    return RequestOutput(
        outputs[0].request_id,
        text,
        tuple(prompt),
        adapter,
        tuple(_completion(i, choice, params) for i, choice in enumerate(choices)),
        None
        if params.prompt_logprobs is None
        else tuple(p for o in choices[0] for p in o.prompt_logprobs),
        outputs[-1].adapter_digest,
        choices[0][0].num_cached_tokens,
    )


def _completion(index: int, outputs: Seq[Output], params: SamplingParams) -> Completion:
    last = outputs[-1]
    assert isinstance(last.finish_reason, FinishReason)
    return Completion(
        index=index,
        text="".join(o.text for o in outputs),
        token_ids=tuple(t for o in outputs for t in o.token_ids),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=None
        if params.logprobs is None
        else tuple(logprob for o in outputs for logprob in o.logprobs),
    )
