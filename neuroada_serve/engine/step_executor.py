"""Running a step: from a schedule to outputs, in smaller parts where memory is short."""

import logging
import time
from collections import deque
from collections.abc import Callable

from neuroada_serve.engine.block_tables import BlockTables
from neuroada_serve.engine.faults import Faults
from neuroada_serve.engine.kv_cache import KVCache
from neuroada_serve.engine.memory import describe_need, is_out_of_memory, most_demanding
from neuroada_serve.engine.merge_control import MergeControl
from neuroada_serve.engine.output_processor import OutputProcessor
from neuroada_serve.engine.pace import StepPace
from neuroada_serve.engine.runner import ModelRunner, StepLogits
from neuroada_serve.engine.sampler import Sampled, sample
from neuroada_serve.engine.scheduler import Schedule
from neuroada_serve.request import Output

logger = logging.getLogger(__name__)

_MOST_HALVINGS = 3  # of a step that finds no memory
_FAILED = "the engine failed on this request's step"


class StepExecutor:
    """Run schedules on the engine's model.

    Args:
        tables: say what changes in the cache before a step.
        merging: says what is in the weights.
        pace: learns what steps take.
        faults: says which failures end the engine.
    """

    def __init__(
        self,
        runner: ModelRunner,
        cache: KVCache,
        tables: BlockTables,
        outputs: OutputProcessor,
        merging: MergeControl,
        pace: StepPace,
        faults: Faults,
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._tables = tables
        self._outputs = outputs
        self._merging = merging
        self._pace = pace
        self._faults = faults

    def run(
        self, schedule: Schedule, early: Callable[[list[Output]], None] | None = None
    ) -> list[Output]:
        """Run one step.

        Where memory is short, what is only kept for speed is released, and the step is tried again
        in halves, down to eighths. In one that finds none either, the request that asks for most
        ends. Any other failure ends the requests of its part.

        Args:
            early: gets the outputs that are made while the device computes; default: they are
                returned with the others.
        """
        outputs: list[Output] = []
        hand_out = outputs.extend if early is None else early
        parts = deque([(schedule, _MOST_HALVINGS)])
        while parts:
            part, halvings = parts.popleft()
            part = part.unended()
            if part.is_empty:
                continue
            computed = {s: s.num_computed for s in part.scheduled}
            cost = self._cost(part)
            started = time.perf_counter()
            try:
                step, chosen = self._compute(part, hand_out)
            except Exception as error:
                for sequence, num_computed in computed.items():
                    sequence.num_computed = num_computed
                self._faults.judge(error)
                if not is_out_of_memory(error):
                    self._faults.count(error)
                    outputs += [
                        self._outputs.fail(sequence, _FAILED)
                        for sequence in computed
                        if not sequence.has_ended
                    ]
                    continue
                self._runner.release()
                if any(sequence.has_ended for sequence in computed):  # it is smaller now
                    parts.appendleft((part, halvings))
                    continue
                if halves := part.halves() if halvings else ():
                    logger.warning("a step found no memory, and runs in parts: %s", error)
                    parts.extendleft((half, halvings - 1) for half in reversed(halves))
                    continue
                failed = most_demanding(part)
                logger.warning("a request ends for want of memory: %s", error)
                need = describe_need(failed)
                outputs.append(self._outputs.end_with_error(failed, need, may_retry=True))
                parts.appendleft((part.without(failed), 0))
                continue
            outputs += self._outputs.process(part, step, chosen)
            context = sum(computed[s] for s in part.decodes)
            seconds = time.perf_counter() - started
            self._pace.record(len(part.decodes), cost, seconds, context)
        return outputs

    def _cost(self, schedule: Schedule) -> float:
        """Return the cost of the prompts' part of a step, as the pace counts it."""
        chunks = ((c.sequence.num_computed, c.num_tokens) for c in schedule.prefills)
        return sum(self._pace.cost(past, num_tokens) for past, num_tokens in chunks)

    def _compute(
        self, schedule: Schedule, hand_out: Callable[[list[Output]], None]
    ) -> tuple[StepLogits, list[Sampled | None]]:
        self._cache.change(self._tables.changes)
        self._tables.made()
        step = self._runner.run(schedule, self._merging.version)
        if written := self._outputs.write():  # while the device computes
            hand_out(written)
        scores = [self._outputs.score_prompt(prompt) for prompt in step.prompts]
        chosen = sample(step.logits, step.sequences)
        self._faults.forget()
        for prompt, tokens in zip(step.prompts, scores, strict=True):
            prompt.sequence.prompt_logprobs += tokens
        return step, chosen
