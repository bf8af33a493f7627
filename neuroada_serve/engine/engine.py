"""The engine: requests of many adapters in, tokens out, one step at a time.

step() = schedule, run, postprocess. Everything here belongs to one thread, except `read_adapter`,
which only reads files and may run anywhere.
"""

import logging
import os
import re
from collections.abc import Sequence as Seq
from pathlib import Path

from neuroada_serve.adapters.bank import AdapterBank
from neuroada_serve.adapters.format import Adapter, check_adapter, load_adapter
from neuroada_serve.adapters.store import AdapterStore, AdapterVersion, Lease
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.detokenizer import Detokenizer
from neuroada_serve.engine.kv_cache import KVCache
from neuroada_serve.engine.merge_policy import AutoMerge
from neuroada_serve.engine.runner import ModelRunner, PromptLogits
from neuroada_serve.engine.sampler import Sampled, new_generator, sample, score
from neuroada_serve.engine.scheduler import Scheduler
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.errors import AdapterConflictError, AdapterError, RequestError
from neuroada_serve.metrics import EngineMetrics
from neuroada_serve.model.bypass_linear import attach_bypass
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.merge import WeightMerger, weights_digest
from neuroada_serve.request import FinishReason, Output, SamplingParams, TokenLogprob

logger = logging.getLogger(__name__)

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Engine:
    """One base model and its adapters.

    Args:
        base: freshly loaded; the engine changes its layers and owns it from here on.
        config: limits and merge mode. The adapter named by `merge` is merged when it is added.
    """

    def __init__(self, base: BaseModel, config: EngineConfig) -> None:
        self.base = base
        self.config = config
        self.max_model_len = min(config.max_model_len or base.max_model_len, base.max_model_len)
        self.metrics = EngineMetrics()
        attached = attach_bypass(base.model)
        self._bank = AdapterBank(base.device, attached.sites)
        self._store = AdapterStore(on_gone=lambda version: self._bank.evict(version.resident))
        self._merger = WeightMerger(attached.layers)
        self._merged: Lease | None = None
        self._auto_merge = AutoMerge() if config.merge == "auto" else None
        # An adapter may be named never or auto; the setting does not mean it then.
        self._keep_merged = None if config.merge in ("never", "auto") else config.merge
        on_cuda = base.device.type == "cuda"
        cache = KVCache(config.max_num_seqs, self.max_model_len, coarse=on_cuda)
        self._runner = ModelRunner(
            base, self._bank, attached.context, cache, enforce_eager=config.enforce_eager
        )
        self._scheduler = Scheduler(config.max_num_seqs, config.max_num_batched_tokens)
        self._ended: list[Output] = []  # final outputs of aborted sequences, for the next step

    # --- adapters ----------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that requests can use now."""
        return self._store.names

    @property
    def merged(self) -> str | None:
        """Name of the adapter that is merged into the weights."""
        return None if self._merged is None else self._merged.version.name

    def read_adapter(self, path: str | os.PathLike[str], root: Path | None = None) -> Adapter:
        """Read and check an adapter directory against this base. Safe in any thread.

        Raises:
            AdapterNotFoundError, AdapterFormatError: see `adapters.format.load_adapter`.
        """
        return load_adapter(
            path, self.base.spec, root=root, allow_other_base=self.config.allow_other_base
        )

    def check_adapter(self, adapter: Adapter) -> None:
        """Check an adapter that was not read by `read_adapter`. Safe in any thread.

        Raises:
            AdapterFormatError: it belongs to another base or does not fit this one.
        """
        check_adapter(adapter, self.base.spec, allow_other_base=self.config.allow_other_base)

    def add_adapter(self, name: str, adapter: Adapter, replace: bool = False) -> None:
        """Serve a checked adapter under a name. With replace, running requests keep the old one.

        Raises:
            AdapterConflictError: the name is taken and replace is False, or it is the base's.
            AdapterError: the name is not allowed.
            AdapterFormatError: a merged weight would overflow.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise AdapterError(
                f"adapter name {name[:80]!r} is not allowed; use letters, digits, '.', '_' and "
                "'-', a letter or digit first, at most 63"
            )
        if name == self.base.spec.name:
            raise AdapterConflictError(f"{name!r} is the base model's name")
        if name in self._store.names and not replace:
            raise AdapterConflictError(f"an adapter named {name!r} is already loaded")
        was_merged = self.merged == name
        resident = self._bank.upload(adapter, self._merger.realise(adapter))
        self._store.publish(AdapterVersion(name, adapter, resident), replace)
        if was_merged or self._keep_merged == name:
            self.merge(name)

    def remove_adapter(self, name: str) -> None:
        """Stop serving a name; requests that run with it finish.

        Raises:
            AdapterNotFoundError
        """
        self._store.get(name)
        if self.merged == name:
            self.unmerge()
        self._store.remove(name)

    def merge(self, name: str) -> None:
        """Write an adapter into the weights; a merged one is swapped out.

        Its requests then run at the base's speed, all others take it out again per token.

        Raises:
            AdapterNotFoundError
        """
        lease = self._store.acquire(name)
        try:
            self._merger.merge(lease.version.adapter)
        except BaseException:
            lease.release()
            self._release_merged()  # the weights are the base's again
            raise
        self._release_merged()
        self._merged = lease
        self.metrics.num_merges += 1

    def unmerge(self) -> None:
        """Give the base weights back, bit for bit."""
        self._merger.unmerge()
        self._release_merged()
        self.metrics.num_unmerges += 1

    def base_digest(self) -> str:
        """sha256 of all weights as they are now; the base's own while nothing is merged."""
        return weights_digest(self.base.model)

    def _release_merged(self) -> None:
        if self._merged is not None:
            self._merged.release()
            self._merged = None

    # --- requests ----------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return self._scheduler.has_unfinished or bool(self._ended)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        adapter: str | None = None,
    ) -> None:
        """Queue a request: params.n sequences on one adapter, None for the base.

        Raises:
            RequestError: the prompt is empty, too long, or holds ids outside the vocabulary.
            AdapterNotFoundError: no adapter of this name.
        """
        self._validate(prompt_token_ids, params)
        if self._scheduler.find(request_id):
            raise RequestError(f"request id {request_id!r} is in use", "request_id")
        room = self.max_model_len - len(prompt_token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        eos = () if params.ignore_eos else tuple(self.base.eos_token_ids)
        for index in range(params.n):
            self._scheduler.add(
                Sequence(
                    request_id=request_id,
                    index=index,
                    prompt_token_ids=list(prompt_token_ids),
                    params=params,
                    max_tokens=max_tokens,
                    end_token_ids=(*eos, *params.stop_token_ids),
                    lease=None if adapter is None else self._store.acquire(adapter),
                    detokenizer=Detokenizer(
                        self.base.tokenizer,
                        prompt_token_ids,
                        params.stop_strings,
                        params.include_stop_str_in_output,
                        params.skip_special_tokens,
                    ),
                    random=new_generator(params, index),
                )
            )

    def abort(self, request_id: str) -> None:
        """End all choices of a request; the next step hands out their final outputs."""
        for sequence in self._scheduler.find(request_id):
            self._ended.append(self._end(sequence, FinishReason.ABORT))

    def _validate(self, prompt_token_ids: Seq[int], params: SamplingParams) -> None:
        length, vocab = len(prompt_token_ids), self._vocab_size
        if length == 0:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        if length >= self.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, "
                f"your prompt contains {length} input tokens. Please reduce its length.",
                "prompt",
            )
        if not all(type(i) is int and 0 <= i < vocab for i in prompt_token_ids):
            raise RequestError(f"prompt token ids must be integers within [0, {vocab})", "prompt")
        for param in ("logit_bias", "stop_token_ids"):
            if not all(0 <= i < vocab for i in getattr(params, param)):
                raise RequestError(f"{param} has token ids outside [0, {vocab})", param)

    @property
    def _vocab_size(self) -> int:
        return int(self.base.model.config.get_text_config().vocab_size)

    # --- the loop ----------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Advance every scheduled sequence; at most one new token each.

        A failing forward ends the sequences of this step with FinishReason.ERROR; the engine and
        all other sequences go on.
        """
        outputs, self._ended = self._ended, []
        if self._auto_merge is not None:
            self._merge_as_chosen(self._auto_merge)
        schedule = self._scheduler.schedule()
        if schedule.is_empty:
            return outputs

        try:
            merged = None if self._merged is None else self._merged.version
            step = self._runner.run(schedule, merged)
            for prompt in step.prompts:
                self._score_prompt(prompt)
            chosen = sample(step.logits, step.sequences)
        except Exception:
            logger.exception("a step failed; its requests end with an error")
            failed = [*schedule.decodes, *(chunk.sequence for chunk in schedule.prefills)]
            for sequence in failed:
                outputs.append(self._fail(sequence, "the engine failed on this request's step"))
            return outputs

        self.metrics.num_steps += 1
        self.metrics.num_prompt_tokens += sum(c.num_tokens for c in schedule.prefills)
        for sequence, token in zip(step.sequences, chosen, strict=True):
            if token is None:
                outputs.append(self._fail(sequence, "the model gave non-finite logits"))
            else:
                outputs.append(self._append(sequence, token))
        if not self._scheduler.running:
            self._runner.cache.release()
        return outputs

    def _append(self, sequence: Sequence, token: Sampled) -> Output:
        """Add a token to its sequence, and end the sequence if that token says so."""
        self.metrics.num_output_tokens += 1
        params, token_id = sequence.params, token.token_id
        sequence.output_token_ids.append(token_id)
        num_tokens = len(sequence.output_token_ids)
        logprobs = () if token.logprob is None else (self._token_logprob(token),)

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
            return self._end(sequence, reason, (token_id,), logprobs, stop_reason)
        return self._output(sequence, (token_id,), logprobs)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> Output:
        """Free everything the sequence holds; its final output."""
        output = self._output(sequence, token_ids, logprobs, reason, stop_reason, error)
        self._scheduler.remove(sequence)
        if sequence.lease is not None:
            sequence.lease.release()
        self.metrics.num_finished[reason] += 1
        return output

    def _fail(self, sequence: Sequence, error: str) -> Output:
        self._runner.scrub_cache = True
        return self._end(sequence, FinishReason.ERROR, error=error)

    def _output(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> Output:
        first = len(sequence.output_token_ids) == len(token_ids)
        return Output(
            request_id=sequence.request_id,
            index=sequence.index,
            text=sequence.detokenizer.take(final=reason is not None),
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            adapter=sequence.adapter,
            num_prompt_tokens=len(sequence.prompt_token_ids),
            num_output_tokens=len(sequence.output_token_ids),
        )

    def _token_logprob(self, token: Sampled) -> TokenLogprob:
        assert token.logprob is not None

        def text(token_id: int) -> str:
            return str(self.base.tokenizer.decode([token_id]))

        top = tuple((i, text(i), logprob) for i, logprob in token.top)
        return TokenLogprob(token.token_id, text(token.token_id), token.logprob, top)

    def _score_prompt(self, prompt: PromptLogits) -> None:
        sequence, start = prompt.sequence, prompt.first + 1
        token_ids = sequence.prompt_token_ids[start : start + len(prompt.logits)]
        num_top = sequence.params.prompt_logprobs or 0
        scores = score(prompt.logits, token_ids, num_top) if token_ids else []
        sequence.prompt_logprobs += [self._token_logprob(token) for token in scores]

    def _merge_as_chosen(self, policy: AutoMerge) -> None:
        sequences = [*self._scheduler.running, *self._scheduler.waiting]
        wanted = policy.choose((s.adapter for s in sequences), self.merged)
        if wanted == self.merged:
            return
        if wanted is None:
            self.unmerge()
        elif wanted in self._store.names:
            self.merge(wanted)
