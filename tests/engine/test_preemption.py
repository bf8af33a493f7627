"""Slots that are taken back: answers go on as if nothing had been."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest
import torch

from neuroada_serve import SamplingParams
from neuroada_serve.adapters.format import make_adapter
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.sequence import LEAST_PROGRESS
from neuroada_serve.errors import AdapterInUseError
from neuroada_serve.model.loader import load_base
from neuroada_serve.request import CLASSIFY, FinishReason, Output
from neuroada_serve.server.worker import Stream, Worker
from neuroada_serve.tasks import SEQ_CLS
from tests.support.tiny import random_adapter, save_tiny_model

PROMPT = list(range(20, 90))
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
LONG = {
    "greedy": SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2),
    "drawn": SamplingParams(seed=5, max_tokens=60, ignore_eos=True),
    "penalised": SamplingParams(
        seed=6, frequency_penalty=0.7, repetition_penalty=1.2, max_tokens=60, ignore_eos=True
    ),
    "scored": SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, prompt_logprobs=1),
    "two": SamplingParams(n=2, seed=9, top_p=0.8, max_tokens=60, ignore_eos=True),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = save_tiny_model(tmp_path_factory.mktemp("llama"))
    return source, random_adapter(source, 1)


def new_engine(source, **config) -> Engine:
    engine = Engine(load_base(source[0]), EngineConfig(max_num_batched_tokens=24, **config))
    engine.adapters.add_resident("a", source[1])
    return engine


def answer(engine: Engine, params: SamplingParams, interrupt: bool) -> list[list[Output]]:
    """Return the tokens of each choice while, if asked for, others come in between."""
    engine.add_requests(["long"], [PROMPT], params, "a", tenant="hog")
    engine.add_requests(["other"], [PROMPT[:5]], LONG["drawn"], tenant="hog")
    outputs: list[list[Output]] = [[] for _ in range(params.n)]
    steps = 0
    while engine.has_unfinished:
        for output in engine.step():
            if output.request_id == "long":
                outputs[output.index].append(output)
        steps += 1
        if interrupt and steps in (20, 40, 60):
            engine.add_requests([f"one{steps}"], [[steps]], ONE, tenant=f"one{steps}")
    return outputs


@pytest.mark.parametrize("prefixes", [0, 1 << 24])
@pytest.mark.parametrize("kind", LONG)
def test_answer_is_the_same_with_and_without_losing_its_slot(source, kind, prefixes):
    config = {"prefix_cache_memory": prefixes}
    engine = new_engine(source, max_num_seqs=2, **config)
    found = answer(engine, LONG[kind], interrupt=True)
    assert engine.metrics.num_preemptions > 0
    expected = answer(new_engine(source, max_num_seqs=4, **config), LONG[kind], interrupt=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert [t for o in ours for t in o.token_ids] == [t for o in theirs for t in o.token_ids]
        assert "".join(o.text for o in ours) == "".join(o.text for o in theirs)
        assert [o.finish_reason for o in ours if o.finished] == [FinishReason.LENGTH]
        for field in ("logprobs", "prompt_logprobs"):
            mine, others = ([p for o in part for p in getattr(o, field)] for part in (ours, theirs))
            assert [(p.token, p.text_offset) for p in mine] == [
                (p.token, p.text_offset) for p in others
            ]
            assert [p.logprob for p in mine] == pytest.approx([p.logprob for p in others], abs=1e-4)
        last, undisturbed = ours[-1], theirs[-1]
        assert last.num_output_tokens == undisturbed.num_output_tokens
        assert len({o.num_cached_tokens for o in ours}) == 1, "of the prompt, as it was first found"


def test_one_request_of_many_choices_does_not_keep_a_single_token_waiting(source):
    engine = new_engine(source, max_num_seqs=4)
    many = SamplingParams(n=4, seed=1, max_tokens=150, ignore_eos=True)
    engine.add_requests(["many"], [[1, 2, 3]], many)
    for _ in range(LEAST_PROGRESS + 2):
        engine.step()
    engine.add_requests(["single"], [[7]], ONE)
    (final,) = [o for _ in range(2) for o in engine.step() if o.request_id == "single"]
    assert final.finished
    engine.abort("many")
    engine.step()


def test_aborted_while_it_waits_again_leaves_nothing(source):
    engine = new_engine(source, max_num_seqs=1)
    engine.add_requests(["a"], [PROMPT], LONG["two"], "a", tenant="hog")
    engine.add_requests(["b"], [PROMPT], LONG["greedy"], tenant="other")
    for _ in range(30):
        engine.step()
    for request_id in ("a", "b"):
        engine.abort(request_id)
    outputs = engine.step()
    assert {o.finish_reason for o in outputs} == {FinishReason.ABORT}
    assert not engine.has_unfinished
    engine.adapters.unload("a")
    assert not engine._scheduler.waiting._accounts.root.num_slots


def test_full_queue_makes_place_for_whoever_has_none(source):
    """The last of whoever has most goes, and may come again."""
    engine = new_engine(source, max_num_seqs=1)
    for i in range(9):
        engine.add_requests([f"hog{i}"], [[1, 2]], ONE, tenant=f"t{i % 2}")
    assert not engine.make_place("t0", None, 3)
    assert engine.make_place("new", None, 3)
    engine.add_requests(["new"], [[3]], ONE, tenant="new")
    finals = {o.request_id: o for _ in range(40) for o in engine.step() if o.finished}
    assert finals["hog8"].may_retry
    assert "wait" in finals["hog8"].error
    assert finals["new"].error is None
    assert len(finals) == 10


# --- while it has no slot ------------------------------------------------------------------


def without_slot(engine: Engine) -> list[Output]:
    """A request of adapter "a" that has begun and lost its slot; its outputs so far."""
    engine.add_requests(["first"], [PROMPT[:9]], LONG["drawn"], tenant="two")
    engine.add_requests(["long"], [PROMPT], LONG["greedy"], "a", tenant="two")
    outputs = [o for _ in range(20) for o in engine.step()]
    engine.add_requests(["other"], [PROMPT[:5]], LONG["drawn"], tenant="other")
    outputs += engine.step()
    (sequence,) = engine._scheduler.find("long")
    assert sequence.slot is None
    assert engine.metrics.num_preemptions == 1
    return [o for o in outputs if o.request_id == "long"]


def finish(engine: Engine) -> list[Output]:
    """Return the outputs of all requests until nothing is left."""
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs


def tokens_of(outputs: list[Output], request_id: str = "long") -> list[int]:
    return [t for o in outputs if o.request_id == request_id for t in o.token_ids]


@pytest.fixture(scope="module")
def undisturbed(source):
    """The greedy answer of each adapter."""
    found = []
    for seed in (1, 2):
        engine = new_engine((source[0], random_adapter(source[0], seed)), max_num_seqs=1)
        engine.add_requests(["long"], [PROMPT], LONG["greedy"], "a")
        found.append(tokens_of(finish(engine)))
    assert found[0] != found[1]
    return found


def test_answer_goes_on_with_its_version_when_the_adapter_is_replaced(source, undisturbed):
    engine = new_engine(source, max_num_seqs=2)
    outputs = without_slot(engine)
    digest = engine.adapters.describe_one("a").digest
    engine.adapters.add_resident("a", random_adapter(source[0], 2), replace=True)
    engine.add_requests(["new"], [PROMPT], LONG["greedy"], "a", client="new")
    outputs += finish(engine)
    assert tokens_of(outputs) == undisturbed[0]
    assert tokens_of(outputs, "new") == undisturbed[1]
    assert {o.adapter_digest for o in outputs if o.request_id == "long"} == {digest}
    assert engine.adapters.bank.num_resident == 1, "the old version's memory is free"
    assert [info.digest for info in engine.adapters.describe()] != [digest]


def test_answer_goes_on_when_the_adapters_name_is_taken_away(source, undisturbed):
    engine = new_engine(source, max_num_seqs=2)
    outputs = without_slot(engine)
    engine.adapters.remove("a")
    assert engine.adapters.bank.num_resident == 1
    outputs += finish(engine)
    assert tokens_of(outputs) == undisturbed[0]
    assert engine.adapters.bank.num_resident == 0


def test_unload_knows_of_a_request_without_a_slot(source, undisturbed):
    engine = new_engine(source, max_num_seqs=2)
    outputs = without_slot(engine)
    with pytest.raises(AdapterInUseError):
        engine.adapters.unload("a")
    outputs += finish(engine)
    assert tokens_of(outputs) == undisturbed[0]
    engine.adapters.unload("a")
    assert engine.adapters.bank.num_resident == 0


def test_unload_with_abort_ends_a_request_without_a_slot(source):
    engine = new_engine(source, max_num_seqs=2)
    without_slot(engine)
    unloading = threading.Thread(target=lambda: engine.adapters.unload("a", abort=True))
    unloading.start()
    outputs: list[Output] = []
    while not any(o.request_id == "long" for o in outputs):
        outputs += engine.step()
        time.sleep(0.001)
    unloading.join(60)
    (final,) = [o for o in outputs if o.request_id == "long"]
    assert final.finish_reason is FinishReason.ABORT
    assert engine.adapters.bank.num_resident == 0
    assert len(tokens_of(outputs + finish(engine), "other")) > 0


def test_abort_of_a_request_without_a_slot_lets_go_of_its_adapter(source):
    """As where its client leaves."""
    engine = new_engine(source, max_num_seqs=2)
    without_slot(engine)
    engine.abort("long")
    (final,) = [o for o in engine.step() if o.request_id == "long"]
    assert final.finish_reason is FinishReason.ABORT
    assert final.num_output_tokens > 0
    engine.adapters.unload("a")
    finish(engine)
    assert not engine._scheduler.waiting._accounts.root.parties


def test_class_is_told_without_losing_the_slot(source):
    """It is there when the prompt is, and a prompt is not given up half computed."""
    plain, folder = source[1], source[0]
    config = replace(plain.config, task_type=SEQ_CLS, labels=("bad", "good"))
    head = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    engine = new_engine((folder, make_adapter(config, plain.modules, head)), max_num_seqs=2)
    engine.add_requests(["first"], [PROMPT[:9]], LONG["drawn"], tenant="two")
    engine.add_requests(["class"], [PROMPT], CLASSIFY, "a", tenant="two")
    engine.step()  # a part of its prompt
    engine.add_requests(["other"], [PROMPT[:5]], ONE, tenant="other")
    finals = [o.request_id for o in finish(engine) if o.finished]
    assert finals[:2] == ["class", "other"]
    assert engine.metrics.num_preemptions == 0


# --- through the worker --------------------------------------------------------------------


async def submit_three(worker: Worker) -> list[Stream]:
    """The second is about to lose its slot to the third."""
    first = await worker.submit("first", [PROMPT[:9]], LONG["drawn"], None, "two")
    long = await worker.submit("long", [PROMPT], LONG["greedy"], "a", "two")
    while long._arrived.qsize() < LEAST_PROGRESS + 2:
        await asyncio.sleep(0.001)
    return [first, long, await worker.submit("other", [PROMPT[:5]], LONG["drawn"], None, "other")]


async def read(stream: Stream) -> list[Output]:
    return [output async for _, output in stream]


def test_drain_lets_a_request_without_a_slot_finish(source, undisturbed):
    engine = new_engine(source, max_num_seqs=2)

    async def run() -> list[list[Output]]:
        async with Worker(engine) as worker:
            streams = await submit_three(worker)
            await worker.drain(120)
            assert worker.idle
            return [await read(stream) for stream in streams]

    found = asyncio.run(run())
    assert engine.metrics.num_preemptions == 1
    assert tokens_of(found[1], "long-0") == undisturbed[0]
    assert [outputs[-1].finish_reason for outputs in found] == [FinishReason.LENGTH] * 3


def test_drain_that_is_over_ends_a_request_without_a_slot(source):
    engine = new_engine(source, max_num_seqs=2)

    async def run() -> list[list[Output]]:
        async with Worker(engine) as worker:
            streams = await submit_three(worker)
            await worker.drain(0)
            return [await read(stream) for stream in streams]

    for outputs in asyncio.run(run()):
        assert outputs[-1].finish_reason is FinishReason.ABORT


def test_client_that_leaves_while_without_a_slot_leaves_nothing(source):
    engine = new_engine(source, max_num_seqs=2)

    async def run() -> list[Output]:
        async with Worker(engine) as worker:
            first, long, other = await submit_three(worker)
            while not engine.metrics.num_preemptions:
                await asyncio.sleep(0.001)
            long.close()
            await read(first)
            return await read(other)

    assert asyncio.run(run())[-1].finish_reason is FinishReason.LENGTH
    assert not engine._scheduler.waiting._accounts.root.parties
    engine.adapters.unload("a")
    assert engine.adapters.bank.num_resident == 0
