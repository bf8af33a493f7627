"""The engine: requests of many adapters in, tokens out, one step at a time.

step() = schedule, run, postprocess. Everything here belongs to one thread; what other threads may
do is in `AdapterManager`.
"""

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.adapter_manager import AdapterManager
from neuroada_serve.engine.block_keys import roots
from neuroada_serve.engine.block_tables import BlockTables
from neuroada_serve.engine.fairness import FairQueue
from neuroada_serve.engine.faults import Faults
from neuroada_serve.engine.input_processor import InputProcessor
from neuroada_serve.engine.kv_budget import kv_budget
from neuroada_serve.engine.merge_policy import Load
from neuroada_serve.engine.output_processor import OutputProcessor
from neuroada_serve.engine.pace import StepPace
from neuroada_serve.engine.runner import ModelRunner, refuse_unsupported
from neuroada_serve.engine.scheduler import Schedule, Scheduler
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.engine.step_executor import StepExecutor
from neuroada_serve.engine.step_size import new_pace, step_tokens
from neuroada_serve.engine.token_names import TokenNames
from neuroada_serve.errors import RequestError, UsageError
from neuroada_serve.metrics import EngineMetrics
from neuroada_serve.model.bypass_linear import attach_bypass
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.merge import weights_digest
from neuroada_serve.model.rotary import fix_rotation
from neuroada_serve.request import FinishReason, Output, SamplingParams
from neuroada_serve.wakeup import Wakeup

logger = logging.getLogger(__name__)

_WAIT_S = 0.02  # for an adapter, when nothing else can run
_NO_ROOM = (
    "adapter {!r} has no room on the device beside those that are pinned or merged; raise "
    "--adapter-memory"
)
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
        refuse_unsupported(base)
        max_model_len = min(config.max_model_len or base.max_model_len, base.max_model_len)
        # The choice that max_model_len makes of the base's rotation, in a sentence.
        self.rotation = fix_rotation(base.model, max_model_len)
        self.metrics = EngineMetrics()
        self.wakeup = wakeup or Wakeup()
        if config.deterministic and base.device.type != "cpu":
            raise UsageError(
                f"deterministic holds on the CPU alone, not on {base.device.type}, whose libraries "
                "choose their kernels by the size of the batch; leave it out, or take --device cpu"
            )
        attached = attach_bypass(base.model, fixed_shapes=config.deterministic)
        self.adapters = AdapterManager(base, attached, config, self.metrics, self.wakeup)
        self.kv_budget = kv_budget(base, config, max_model_len)
        self.max_model_len = min(max_model_len, self.kv_budget.num_tokens)
        self._cache = self.kv_budget.new_cache(config.max_num_seqs, max_model_len, base.device)
        self.metrics.kv = self.kv_budget.new_blocks().usage
        self._tables = BlockTables(
            self.kv_budget.new_blocks(),
            None if config.prefix_cache_memory == 0 else roots(base.spec.fingerprint),
            config.deterministic,
        )
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
            step_tokens(config, base.device),
            FairQueue(config.tenant_weights, config.adapter_weights),
            self.adapters.tiers,
            self.adapters.merging.can_leave,
            self._tables,
            new_pace(base, config),
            self._on_preempt,
            deterministic=config.deterministic,
        )
        self._inputs = InputProcessor(base, self.adapters.store, self.max_model_len)
        self._outputs = OutputProcessor(
            TokenNames(base.tokenizer),
            self.adapters.tiers,
            self._scheduler,
            self._tables,
            self.metrics,
            defers=base.device.type != "cpu",
        )
        self._faults = Faults(base.device)
        self._executor = StepExecutor(
            self._runner,
            self._cache,
            self._tables,
            self._outputs,
            self.adapters.merging,
            self.pace,
            self._faults,
        )
        self._step = 0
        self._ended: list[Output] = []  # final outputs of aborted sequences, for the next step

    @property
    def merged(self) -> str | None:
        """Name of the adapter that is merged into the weights."""
        return self.adapters.merging.merged

    @property
    def pace(self) -> StepPace:
        """The bound of what prompts add to a step."""
        return self._scheduler.pace

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Record what decode steps need before the first request; see `ModelRunner.warm_up`."""
        self._runner.warm_up(progress)

    def base_digest(self) -> str:
        """Return the sha256 of the weights as they are: the base's own while none is merged."""
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

    def make_place(
        self, tenant: str, adapter: str | None, max_waiting: int, client: str = ""
    ) -> bool:
        """Make a place in the queue for one more request; False: there is none.

        A full queue (`max_waiting`) still takes requests of those who have less than their share of
        it. At twice that size, the newest request of whoever has most is ended for it.
        """
        queue = self._scheduler.waiting
        limit = max_waiting + self.config.max_num_seqs - self.num_running
        if queue.admits(tenant, adapter, limit, client):
            return True
        displaced = queue.displaced_by(tenant, adapter, limit, client)
        if displaced is None:
            return False
        error = f"{len(queue)} requests wait, and others have fewer; try again later"
        self._ended.append(self._outputs.end_with_error(displaced, error, may_retry=True))
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
        for request_id in request_ids:
            if self._scheduler.find(request_id):
                raise RequestError(f"request id {request_id!r} is in use", "request_id")
        new = self._inputs.sequences(
            request_ids, prompts, params, adapter, tenant, cache_salt, client
        )
        for sequence in new:
            self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End all choices of a request; the next step hands out their final outputs."""
        for sequence in self._scheduler.find(request_id):
            self._ended.append(self._outputs.end(sequence, FinishReason.ABORT))

    # --- the loop ----------------------------------------------------------------------------

    def step(self, early: Callable[[list[Output]], None] | None = None) -> list[Output]:
        """Advance every scheduled sequence; at most one new token each.

        A failing forward ends the sequences of this step with FinishReason.ERROR; the engine and
        all other sequences go on. Where memory is short, only the one that asks for most ends.
        Where nothing can run before an adapter has come, it waits for that, for a moment.

        Args:
            early: gets outputs that are ready while the device still computes: on a GPU, the text
                of the step before. Default: they are returned, before the others.

        Raises:
            EngineError: the engine is at its end; every further step raises it again.
        """
        with self._faults.watch():
            outputs = self._advance(early)
            if not self._scheduler.running:  # however the last one ended
                self._runner.release()
                self._cache.give_back(self._tables.blocks.take_unused())
        self.metrics.kv = self._tables.blocks.usage
        self.metrics.num_failed_compilations = self._runner.num_failed_compilations
        return outputs

    def _advance(self, early: Callable[[list[Output]], None] | None) -> list[Output]:
        self._step += 1
        outputs, self._ended = self._ended, []
        for version in self.adapters.poll(self._loads):
            outputs += [
                self._outputs.end(sequence, FinishReason.ABORT)
                for sequence in [*self._scheduler.running.values(), *self._scheduler.waiting]
                if sequence.version is version
            ]
        schedule = self._scheduler.schedule()
        outputs += self._fail_hopeless(schedule)
        if schedule.is_empty:
            outputs += self._outputs.write()
            if self._scheduler.has_unfinished and not outputs:
                self.wakeup.wait(_WAIT_S)
            return outputs

        return outputs + self._executor.run(schedule, early)

    def _fail_hopeless(self, schedule: Schedule) -> list[Output]:
        """End sequences whose adapter failed to load, or could not fit even if all others left."""
        outputs = []
        for sequence in schedule.failed:
            assert sequence.version is not None
            error = str(self.adapters.tiers.error(sequence.version))
            outputs.append(self._outputs.end_with_error(sequence, error, may_retry=True))
        if schedule.starved and schedule.is_empty:
            self.adapters.merging.make_way()
        for sequence in schedule.starved if self._step % _CHECK_STEPS == 0 else ():
            version = sequence.version
            assert version is not None
            if not self.adapters.merging.could_fit(version):
                error = _NO_ROOM.format(version.name)
                outputs.append(self._outputs.end_with_error(sequence, error, may_retry=True))
        return outputs

    def _on_preempt(self, sequence: Sequence) -> None:
        self.metrics.num_preemptions += 1

    def _loads(self) -> Iterable[Load]:
        """Yield the most tokens that each request may still get, for the merge policy."""
        for sequence in self._scheduler.running.values():
            left = sequence.max_tokens - len(sequence.output_token_ids)
            yield Load(sequence.version, left, is_running=sequence.has_adapter)
        for sequence in self._scheduler.waiting:
            left = sequence.max_tokens - len(sequence.output_token_ids)
            yield Load(sequence.version, left, is_running=False)
