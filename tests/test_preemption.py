"""Slots that are taken back: answers go on as if nothing had been."""

import pytest
from tiny import random_adapter, save_tiny_model

from neuroada_serve import SamplingParams
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.sequence import LEAST_PROGRESS
from neuroada_serve.model.loader import load_base
from neuroada_serve.request import FinishReason, Output

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
    """What each choice gets while, if asked for, others come in between."""
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
    assert not engine.may_queue("t0", None, 3)
    assert engine.may_queue("new", None, 3)
    engine.add_requests(["new"], [[3]], ONE, tenant="new")
    finals = {o.request_id: o for _ in range(40) for o in engine.step() if o.finished}
    assert finals["hog8"].may_retry
    assert "wait" in finals["hog8"].error
    assert finals["new"].error is None
    assert len(finals) == 10
