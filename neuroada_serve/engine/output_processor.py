"""Output processing: turns what a step has computed into outputs, and ends sequences."""

import math
from collections.abc import Sequence as Seq
from dataclasses import replace

from torch import Tensor

from neuroada_serve.adapters.tiers import AdapterTiers
from neuroada_serve.engine.block_tables import BlockTables
from neuroada_serve.engine.fairness import OUTPUT_COST
from neuroada_serve.engine.runner import PromptLogits, StepLogits
from neuroada_serve.engine.sampler import Sampled, score
from neuroada_serve.engine.scheduler import Schedule, Scheduler
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.engine.token_names import TokenNames
from neuroada_serve.metrics import EngineMetrics
from neuroada_serve.request import FinishReason, Output, TokenLogprob


class OutputProcessor:
    """Hand out the outputs of sequences: each gets exactly one final output, with which all that
    it holds is released.

    Args:
        defers: the text of a token that does not end its sequence is made by the next `write`, so
            that a device computes the next step meanwhile.
    """

    def __init__(
        self,
        names: TokenNames,
        tiers: AdapterTiers,
        scheduler: Scheduler,
        tables: BlockTables,
        metrics: EngineMetrics,
        defers: bool,
    ) -> None:
        self._names = names
        self._tiers = tiers
        self._scheduler = scheduler
        self._tables = tables
        self._metrics = metrics
        self._defers = defers
        self._unwritten: dict[Sequence, Sampled] = {}  # last tokens without text, oldest first

    def score_prompt(self, prompt: PromptLogits) -> list[TokenLogprob]:
        """Score the prompt tokens that these logits are for."""
        sequence, start = prompt.sequence, prompt.first + 1
        token_ids = sequence.prompt_token_ids[start : start + len(prompt.logits)]
        num_top = sequence.params.prompt_logprobs or 0
        scores = score(prompt.logits, token_ids, num_top) if token_ids else []
        return [self._names.describe(token) for token in scores]

    def process(
        self, schedule: Schedule, step: StepLogits, chosen: Seq[Sampled | None]
    ) -> list[Output]:
        """Add the tokens of one step to their sequences, and make outputs of those that have text.

        Args:
            chosen: tokens of the step's sequences; None where the logits were not finite.
        """
        outputs = []
        for sequence in schedule.scheduled:
            if not sequence.has_ended:
                self._tables.computed(sequence)
        self._metrics.num_steps += 1
        for row, (sequence, token) in enumerate(zip(step.sequences, chosen, strict=True)):
            if sequence.has_ended:  # by the text of the token before
                continue
            if not sequence.output_token_ids:
                self._metrics.num_cached_tokens += sequence.num_cached
                num_prompt = len(sequence.prompt_token_ids)
                self._metrics.num_prompt_tokens += num_prompt - sequence.num_cached
            if sequence.task.pools and step.hidden is not None:
                outputs.append(self._pool(sequence, step.hidden[row]))
            elif token is None:
                outputs.append(self.fail(sequence, "the model gave non-finite logits"))
            elif self._defers and not self._is_last(sequence, token):
                self._append(sequence, token)
                self._unwritten[sequence] = token
            else:
                self._append(sequence, token)
                outputs.append(self._write(sequence, token))
        return outputs

    def write(self) -> list[Output]:
        """Make outputs of the tokens that have no text yet."""
        unwritten, self._unwritten = self._unwritten, {}
        return [self._write(sequence, token) for sequence, token in unwritten.items()]

    def end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        stop_reason: str | int | None = None,
    ) -> Output:
        """End a sequence: release everything it holds, and make its final output. A token without
        text is dropped."""
        if self._unwritten.pop(sequence, None) is not None:
            sequence.output_token_ids.pop()
        sequence.has_ended = True
        output = _output(sequence, token_ids, logprobs, reason, stop_reason)
        self._scheduler.remove(sequence)
        if sequence.lease is not None:
            sequence.lease.release()
        self._metrics.num_finished[reason] += 1
        return output

    def end_with_error(self, sequence: Sequence, error: str, may_retry: bool = False) -> Output:
        """End a sequence that can give nothing more."""
        output = self.end(sequence, FinishReason.ERROR)
        return replace(output, error=error, may_retry=may_retry)

    def fail(self, sequence: Sequence, error: str) -> Output:
        """End a sequence whose entries in the KV cache may be non-finite."""
        self._tables.release(sequence, forget=True)
        return self.end_with_error(sequence, error)

    def _append(self, sequence: Sequence, token: Sampled) -> None:
        """Add a token to its sequence."""
        self._metrics.num_output_tokens += 1
        self._scheduler.waiting.charge(sequence, OUTPUT_COST)
        sequence.output_token_ids.append(token.token_id)

    def _is_last(self, sequence: Sequence, token: Sampled) -> bool:
        """Return whether a sequence ends with its next token, whatever its text is."""
        num_tokens = len(sequence.output_token_ids) + 1
        is_end = token.token_id in sequence.end_token_ids
        return num_tokens >= sequence.max_tokens or (
            is_end and num_tokens >= sequence.params.min_tokens
        )

    def _write(self, sequence: Sequence, token: Sampled) -> Output:
        """Make the output of a sequence's last token, and end the sequence if that says so."""
        params, token_id = sequence.params, token.token_id
        num_tokens = len(sequence.output_token_ids)
        offset = sequence.detokenizer.num_chars
        logprobs = () if token.logprob is None else (self._names.describe(token, offset),)

        may_stop = num_tokens >= params.min_tokens
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if may_stop and token_id in sequence.end_token_ids:
            reason = FinishReason.STOP
            if token_id in params.stop_token_ids:
                stop_reason = token_id
                if params.include_stop_str_in_output:
                    sequence.detokenizer.add(token_id)
        elif sequence.detokenizer.add(token_id, may_stop):
            reason, stop_reason = FinishReason.STOP, sequence.detokenizer.stop_reason
        elif num_tokens >= sequence.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            return self.end(sequence, reason, (token_id,), logprobs, stop_reason)
        return _output(sequence, (token_id,), logprobs)

    def _pool(self, sequence: Sequence, hidden: Tensor) -> Output:
        """End a sequence with what its task makes of a hidden state.

        Args:
            hidden: [hidden_size] what the output head sees at the prompt's last token.
        """
        version, task = sequence.version, sequence.task
        outputs = hidden.float()
        head = None if version is None else self._tiers.resident(version).head
        if head is not None:
            outputs = head @ outputs
        numbers: list[float] = outputs.tolist()
        if not all(map(math.isfinite, numbers)):
            return self.fail(sequence, f"the {task.noun} gave non-finite values")
        output = self.end(sequence, FinishReason.STOP)
        return replace(output, task=task, values=task.decode(numbers))


def _output(
    sequence: Sequence,
    token_ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprob, ...] = (),
    reason: FinishReason | None = None,
    stop_reason: str | int | None = None,
) -> Output:
    first = len(sequence.output_token_ids) == len(token_ids)
    version = sequence.version
    return Output(
        request_id=sequence.request_id,
        index=sequence.index,
        text=sequence.detokenizer.take(final=reason is not None),
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
        finish_reason=reason,
        stop_reason=stop_reason,
        adapter=sequence.adapter,
        adapter_digest=None if version is None else version.digest,
        num_cached_tokens=sequence.num_cached,
        num_prompt_tokens=len(sequence.prompt_token_ids),
        num_output_tokens=len(sequence.output_token_ids),
    )
