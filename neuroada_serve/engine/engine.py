"""The engine: requests of many adapters in, tokens out, one step at a time.

step() = schedule, run, postprocess. Everything here belongs to one thread; what other threads may
do is in `AdapterManager`.
"""

import logging
import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

from torch import Tensor

from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.adapter_manager import AdapterManager
from neuroada_serve.engine.checks import check_ids, check_prompt, check_task
from neuroada_serve.engine.detokenizer import Detokenizer
from neuroada_serve.engine.fairness import OUTPUT_COST, FairQueue
from neuroada_serve.engine.kv_cache import KVBlocks, KVCache
from neuroada_serve.engine.memory import (
    describe_need,
    is_out_of_memory,
    most_demanding,
    prefix_cache_bytes,
)
from neuroada_serve.engine.merge_policy import Load
from neuroada_serve.engine.prefix_cache import BLOCK_TOKENS, PrefixCache, prefix_root
from neuroada_serve.engine.runner import ModelRunner, PromptLogits, StepLogits
from neuroada_serve.engine.sampler import Sampled, new_draws, sample, score
from neuroada_serve.engine.scheduler import Schedule, Scheduler
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.engine.token_names import TokenNames
from neuroada_serve.errors import RequestError, UsageError
from neuroada_serve.metrics import EngineMetrics
from neuroada_serve.model.bypass_linear import attach_bypass
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.merge import weights_digest
from neuroada_serve.model.rotary import fix_rotation
from neuroada_serve.request import FinishReason, Output, SamplingParams, TokenLogprob
from neuroada_serve.tasks import GENERATE
from neuroada_serve.wakeup import Wakeup

logger = logging.getLogger(__name__)

_WAIT_S = 0.02  # for an adapter, when nothing else can run
_CHECK_STEPS = 16  # between looks whether starved sequences could ever run


class Engine:
    """One base model and its adapters.

    Args:
        base: freshly loaded; the engine changes its layers and owns it from here on.
        config: limits, memory and merge mode. An adapter named by `merge` is merged once it is
            there.
        wakeup: notified, in any thread, when there may be something to do for `step`.

    adapters: what may be done to adapters, most of it in any thread.
    """

    def __init__(self, base: BaseModel, config: EngineConfig, wakeup: Wakeup | None = None) -> None:
        self.base = base
        self.config = config
        self.max_model_len = min(config.max_model_len or base.max_model_len, base.max_model_len)
        # What of the base's rotation that chooses, in a sentence.
        self.rotation = fix_rotation(base.model, self.max_model_len)
        self.metrics = EngineMetrics()
        self.wakeup = wakeup or Wakeup()
        if config.deterministic and base.device.type != "cpu":
            raise UsageError(
                f"deterministic holds on the CPU alone, not on {base.device.type}, whose libraries "
                "choose their kernels by the size of the batch; leave it out, or take --device cpu"
            )
        attached = attach_bypass(base.model, fixed_shapes=config.deterministic)
        self.adapters = AdapterManager(base, attached, config, self.metrics, self.wakeup)
        on_cuda = base.device.type == "cuda"
        self._cache = KVCache(config.max_num_seqs, self.max_model_len, coarse=on_cuda)
        self._runner = ModelRunner(
            base,
            self.adapters.bank,
            attached.context,
            self._cache,
            self.adapters.tiers.resident,
            enforce_eager=config.enforce_eager,
            deterministic=config.deterministic,
        )
        self._scheduler = Scheduler(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            FairQueue(config.tenant_weights, config.adapter_weights),
            self.adapters.tiers,
            self.adapters.merging.can_leave,
            self._reuse_prefix,
            self._on_preempt,
            deterministic=config.deterministic,
        )
        self._names = TokenNames(base.tokenizer)
        self._vocab_size = int(base.model.config.get_text_config().vocab_size)
        self._prefixes: PrefixCache | None = None  # once the size of a token's KV is known
        self._blocks: KVBlocks | None = None
        self._must_scrub = False  # entries of a failed sequence in the KV cache may be non-finite
        self._step = 0
        self._ended: list[Output] = []  # final outputs of aborted sequences, for the next step

    @property
    def merged(self) -> str | None:
        """Name of the adapter that is merged into the weights."""
        return self.adapters.merging.merged

    def base_digest(self) -> str:
        """sha256 of all weights as they are now; the base's own while nothing is merged."""
        return weights_digest(self.base.model)

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

    def may_queue(
        self, tenant: str, adapter: str | None, max_waiting: int, client: str = ""
    ) -> bool:
        """Whether one more request may wait where `max_waiting` are enough, by shares. Where even
        twice as many wait, the last of whoever has most may end for it."""
        queue = self._scheduler.waiting
        limit = max_waiting + self.config.max_num_seqs - self.num_running
        if queue.admits(tenant, adapter, limit, client):
            return True
        displaced = queue.displaced_by(tenant, adapter, limit, client)
        if displaced is None:
            return False
        error = f"{len(queue)} requests wait, and others have fewer; try again later"
        self._ended.append(self._end_with_error(displaced, error, may_retry=True))
        return True

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        adapter: str | None = None,
    ) -> None:
        """Queue one prompt; see `add_requests`."""
        self.add_requests([request_id], [prompt_token_ids], params, adapter)

    def add_requests(
        self,
        request_ids: Seq[str],
        prompts: Seq[Seq[int]],
        params: SamplingParams,
        adapter: str | None = None,
        tenant: str = "",
        cache_salt: str = "",
        client: str = "",
    ) -> None:
        """Queue prompts, all or none: params.n sequences each, all on one version of an adapter.

        Args:
            adapter: a name, or a mix such as "sql:0.7+json:0.3"; None for the base.
            tenant, client: whose share of the engine they count against; clients share a tenant's
                share of one adapter.
            cache_salt: only requests of the same tenant and salt share cached prefixes.

        Raises:
            RequestError: a prompt is empty, too long, or holds ids outside the vocabulary.
                Or something else is asked for than the adapter's task.
            AdapterNotFoundError: no adapter of this name.
            AdapterError: the mix is not written as one.
        """
        check_ids(params, self._vocab_size)
        for request_id, prompt in zip(request_ids, prompts, strict=True):
            check_prompt(prompt, self.max_model_len, self._vocab_size)
            if self._scheduler.find(request_id):
                raise RequestError(f"request id {request_id!r} is in use", "request_id")
        lease = None if adapter is None else self.adapters.store.acquire(adapter)
        try:
            task = GENERATE if lease is None else lease.version.task
            check_task(params, adapter, task)
            eos = frozenset() if params.ignore_eos else self.base.eos_token_ids
            end_token_ids = eos.union(params.stop_token_ids)
            for request_id, prompt in zip(request_ids, prompts, strict=True):
                token_ids = list(prompt)  # one for all choices
                for index in range(params.n):
                    detokenizer = self._new_detokenizer(token_ids, params)
                    room = self.max_model_len - len(token_ids)
                    sequence = Sequence(
                        request_id,
                        index,
                        token_ids,
                        params,
                        max_tokens=min(params.max_tokens or room, room),
                        end_token_ids=end_token_ids,
                        detokenizer=detokenizer,
                        random=new_draws(params, index),
                        tenant=tenant,
                        client=client,
                        cache_salt=cache_salt,
                        lease=None if lease is None else lease.share(),
                        task=task,
                    )
                    self._scheduler.add(sequence)
        finally:
            if lease is not None:
                lease.release()

    def _new_detokenizer(self, prompt: Seq[int], params: SamplingParams) -> Detokenizer:
        return Detokenizer(
            self.base.tokenizer,
            prompt,
            params.stop_strings,
            params.include_stop_str_in_output,
            params.skip_special_tokens,
        )

    def abort(self, request_id: str) -> None:
        """End all choices of a request; the next step hands out their final outputs."""
        for sequence in self._scheduler.find(request_id):
            self._ended.append(self._end(sequence, FinishReason.ABORT))

    # --- the loop ----------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Advance every scheduled sequence; at most one new token each.

        A failing forward ends the sequences of this step with FinishReason.ERROR; the engine and
        all other sequences go on. Where memory is short, only the one that asks for most ends.
        Where nothing can run before an adapter has come, it waits for that, for a moment.
        """
        outputs = self._advance()
        if not self._scheduler.running:  # however the last one ended
            self._runner.release()
        return outputs

    def _advance(self) -> list[Output]:
        self._step += 1
        outputs, self._ended = self._ended, []
        for version in self.adapters.poll(self._loads):
            outputs += [
                self._end(sequence, FinishReason.ABORT)
                for sequence in [*self._scheduler.running.values(), *self._scheduler.waiting]
                if sequence.version is version
            ]
        schedule = self._scheduler.schedule()
        outputs += self._fail_hopeless(schedule)
        if schedule.is_empty:
            if self._scheduler.has_unfinished and not outputs:
                self.wakeup.wait(_WAIT_S)
            return outputs

        while not schedule.is_empty:
            computed = {s: s.num_computed for s in schedule.scheduled}
            try:
                self._restore_prefixes(schedule)
                if self._must_scrub:
                    running = schedule.running
                    self._cache.scrub(
                        {s.slot: s.num_computed for s in running if s.slot is not None}
                    )
                    self._must_scrub = False
                step = self._runner.run(schedule, self.adapters.merging.version)
                scores = [self._score_prompt(prompt) for prompt in step.prompts]
                chosen = sample(step.logits, step.sequences)
            except Exception as error:
                for sequence, num_computed in computed.items():
                    sequence.num_computed = num_computed
                if is_out_of_memory(error):
                    failed = most_demanding(schedule, self._cache)
                    schedule = schedule.without(failed)
                    outputs.append(self._end_for_want_of_memory(failed, error))
                    continue
                logger.exception("a step failed; its requests end with an error")
                message = "the engine failed on this request's step"
                return outputs + [self._fail(sequence, message) for sequence in computed]
            for prompt, tokens in zip(step.prompts, scores, strict=True):
                prompt.sequence.prompt_logprobs += tokens
            return outputs + self._give_out(schedule, step, chosen)
        return outputs

    def _give_out(
        self, schedule: Schedule, step: StepLogits, chosen: Seq[Sampled | None]
    ) -> list[Output]:
        """What the sequences of a step get from it."""
        outputs = []
        self.metrics.num_steps += 1
        self.metrics.num_prompt_tokens += sum(
            c.num_tokens for c in schedule.prefills if not c.sequence.num_preempted
        )
        for row, (sequence, token) in enumerate(zip(step.sequences, chosen, strict=True)):
            if sequence.task.pools and step.hidden is not None:
                outputs.append(self._pool(sequence, step.hidden[row]))
            elif token is None:
                outputs.append(self._fail(sequence, "the model gave non-finite logits"))
            else:
                if not sequence.output_token_ids:
                    self._keep_prefix(sequence)
                outputs.append(self._append(sequence, token))
        return outputs

    def _end_for_want_of_memory(self, sequence: Sequence, error: Exception) -> Output:
        logger.warning("a request ends for want of memory: %s", error)
        output = self._end_with_error(sequence, describe_need(sequence, error), may_retry=True)
        if not any(s.num_computed for s in self._scheduler.running.values()):
            self._runner.release()  # whatever it was given is free for the others
        return output

    def _fail_hopeless(self, schedule: Schedule) -> list[Output]:
        """End the sequences whose adapter cannot be had, or has no room whatever leaves."""
        outputs = []
        for sequence in schedule.failed:
            assert sequence.version is not None
            error = str(self.adapters.tiers.error(sequence.version))
            outputs.append(self._end_with_error(sequence, error, may_retry=True))
        if schedule.starved and schedule.is_empty:
            self.adapters.merging.make_way()
        for sequence in schedule.starved if self._step % _CHECK_STEPS == 0 else ():
            version = sequence.version
            assert version is not None
            if not self.adapters.merging.could_fit(version):
                error = (
                    f"adapter {version.name!r} has no room on the device beside those that are "
                    "pinned or merged; raise --adapter-memory"
                )
                outputs.append(self._end_with_error(sequence, error, may_retry=True))
        return outputs

    def _loads(self) -> Iterable[Load]:
        """Tokens that are still to come, at most."""
        for sequence in self._scheduler.running.values():
            left = sequence.max_tokens - len(sequence.output_token_ids)
            yield Load(sequence.version, left, is_running=sequence.has_adapter)
        for sequence in self._scheduler.waiting:
            left = sequence.max_tokens - len(sequence.output_token_ids)
            yield Load(sequence.version, left, is_running=False)

    # --- prefixes ----------------------------------------------------------------------------

    def _reuse_prefix(self, sequence: Sequence) -> int:
        """How many tokens of those to compute are in the prefix cache; they are copied before the
        step."""
        is_new = not sequence.num_preempted
        if self._prefixes is None or (is_new and sequence.params.prompt_logprobs is not None):
            return 0
        sequence.prefix_root = self._root(sequence)
        sequence.prefix_blocks = self._prefixes.find(sequence.prefix_root, sequence.token_ids)
        num_cached = len(sequence.prefix_blocks) * BLOCK_TOKENS
        if is_new:
            sequence.num_cached = num_cached
            self.metrics.num_cached_tokens += num_cached
        return num_cached

    def _on_preempt(self, sequence: Sequence) -> None:
        self.metrics.num_preemptions += 1
        self._keep_prefix(sequence)  # it is wanted again

    def _restore_prefixes(self, schedule: Schedule) -> None:
        """Copy what was found for the sequences that are about to be computed."""
        for chunk in schedule.prefills:
            sequence = chunk.sequence
            if not sequence.prefix_blocks:
                continue
            assert self._blocks is not None
            assert sequence.slot is not None
            self._cache.reserve(sequence.slot + 1, sequence.num_computed)
            self._blocks.restore(sequence.slot, sequence.prefix_blocks)
            self._release_prefix(sequence)

    def _release_prefix(self, sequence: Sequence) -> None:
        if sequence.prefix_blocks and self._prefixes is not None:
            blocks, sequence.prefix_blocks = sequence.prefix_blocks, []
            self._prefixes.release(sequence.prefix_root, sequence.token_ids, len(blocks))

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Keep what a sequence has computed, for others that begin alike."""
        if self._prefixes is None:
            self._make_prefix_cache()
        if self._prefixes is None or self._blocks is None or sequence.slot is None:
            return
        root = sequence.prefix_root or self._root(sequence)
        ids = sequence.token_ids[: sequence.num_computed]
        if self.config.deterministic:  # as a prompt, an answer is computed in other shapes
            ids = ids[: len(sequence.prompt_token_ids)]
        new = self._prefixes.keep(root, ids)
        try:
            self._blocks.keep(sequence.slot, new)
        except Exception as error:
            self._prefixes.forget({number for _, number in new})
            if not is_out_of_memory(error):
                raise

    def _root(self, sequence: Sequence) -> bytes:
        version = sequence.version
        salt = f"{len(sequence.tenant)} {sequence.tenant} {sequence.cache_salt}"
        digest = None if version is None else version.digest
        return prefix_root(self.base.spec.fingerprint, digest, salt)

    def _make_prefix_cache(self) -> None:
        size_bytes = prefix_cache_bytes(self.config, self.base.device)
        block_bytes = self._cache.bytes_per_token * BLOCK_TOKENS
        num_blocks = size_bytes // block_bytes if block_bytes else 0
        if num_blocks:
            try:
                self._blocks = KVBlocks(self._cache, num_blocks, BLOCK_TOKENS)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("no memory for a prefix cache of %d bytes just now", size_bytes)
                return
            self._prefixes = PrefixCache(num_blocks)

    # --- after a step ------------------------------------------------------------------------

    def _append(self, sequence: Sequence, token: Sampled) -> Output:
        """Add a token to its sequence, and end the sequence if that token says so."""
        self.metrics.num_output_tokens += 1
        self._scheduler.waiting.charge(sequence, OUTPUT_COST)
        params, token_id = sequence.params, token.token_id
        sequence.output_token_ids.append(token_id)
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
            self._keep_prefix(sequence)
            return self._end(sequence, reason, (token_id,), logprobs, stop_reason)
        return self._output(sequence, (token_id,), logprobs)

    def _pool(self, sequence: Sequence, hidden: Tensor) -> Output:
        """End a sequence with what its task makes of a hidden state.

        Args:
            hidden: [hidden_size] what the output head sees at the prompt's last token.
        """
        version, task = sequence.version, sequence.task
        outputs = hidden.float()
        head = None if version is None else self.adapters.tiers.resident(version).head
        if head is not None:
            outputs = head @ outputs
        numbers: list[float] = outputs.tolist()
        if not all(map(math.isfinite, numbers)):
            return self._fail(sequence, f"the {task.noun} gave non-finite values")
        self._keep_prefix(sequence)
        output = self._end(sequence, FinishReason.STOP)
        return replace(output, task=task, values=task.decode(numbers))

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        stop_reason: str | int | None = None,
    ) -> Output:
        """Free everything the sequence holds; its final output."""
        output = self._output(sequence, token_ids, logprobs, reason, stop_reason)
        self._release_prefix(sequence)
        self._scheduler.remove(sequence)
        if sequence.lease is not None:
            sequence.lease.release()
        self.metrics.num_finished[reason] += 1
        return output

    def _end_with_error(self, sequence: Sequence, error: str, may_retry: bool = False) -> Output:
        output = self._end(sequence, FinishReason.ERROR)
        return replace(output, error=error, may_retry=may_retry)

    def _fail(self, sequence: Sequence, error: str) -> Output:
        """End a sequence whose entries in the KV cache may be non-finite."""
        self._must_scrub = True
        return self._end_with_error(sequence, error)

    def _output(
        self,
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

    def _score_prompt(self, prompt: PromptLogits) -> list[TokenLogprob]:
        sequence, start = prompt.sequence, prompt.first + 1
        token_ids = sequence.prompt_token_ids[start : start + len(prompt.logits)]
        num_top = sequence.params.prompt_logprobs or 0
        scores = score(prompt.logits, token_ids, num_top) if token_ids else []
        return [self._names.describe(token) for token in scores]
