"""Text that is made while the device computes the next step, as on a GPU: the same answers, in the
same order, whatever ends them."""

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from neuroada_serve import SamplingParams
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine import step_executor
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.request import FinishReason, Output
from tests.support.tiny import random_adapter, save_tiny_model

PROMPTS = [list(range(start, start + length)) for start, length in ((20, 9), (60, 40), (90, 2))]
KINDS = [
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=2),
    SamplingParams(seed=3, max_tokens=25, ignore_eos=True, frequency_penalty=0.5),
    SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
    SamplingParams(seed=4, n=2, max_tokens=20, ignore_eos=True, min_tokens=5),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = save_tiny_model(tmp_path_factory.mktemp("llama"))
    return source, random_adapter(source, 1)


def new_engine(source, defers: bool, **config) -> Engine:
    engine = Engine(load_base(source[0]), EngineConfig(max_num_batched_tokens=24, **config))
    engine.adapters.add_resident("a", source[1])
    engine._outputs._defers = defers
    return engine


def requests_of(source, seed: int) -> list[tuple[str, list[int], SamplingParams, str | None]]:
    """Random requests, some with a stop string or token that their answer contains."""
    draw = random.Random(seed)
    engine = new_engine(source, defers=False, max_num_seqs=8)
    requests = []
    for number in range(10):
        request = f"r{number}", draw.choice(PROMPTS), draw.choice(KINDS), draw.choice([None, "a"])
        answer = run(engine, [request])[request[0], 0]
        text = "".join(output.text for output in answer)
        tokens = [token for output in answer for token in output.token_ids]
        at = draw.randrange(len(tokens))
        ends = draw.choice(["", "", "string", "kept string", "token"])
        if ends == "token":
            changed = replace(request[2], stop_token_ids=(tokens[at],))
        elif ends and text:
            place = draw.randrange(len(text))
            stop = (text[place : place + draw.choice([1, 3])],)
            changed = replace(
                request[2], stop=stop, include_stop_str_in_output=ends == "kept string"
            )
        else:
            changed = request[2]
        requests.append((*request[:2], changed, request[3]))
    return requests


def run(engine: Engine, requests, steps_between: int = 0) -> dict[tuple[str, int], list[Output]]:
    """Outputs of each choice, in the order in which they were handed out."""
    outputs: dict[tuple[str, int], list[Output]] = defaultdict(list)

    def see(found: list[Output]) -> None:
        for output in found:
            outputs[output.request_id, output.index].append(output)

    for name, prompt, params, adapter in requests:
        engine.add_request(name, prompt, params, adapter)
        for _ in range(steps_between):
            see(engine.step(see))
    while engine.has_unfinished:
        see(engine.step(see))
    assert engine._outputs.write() == []
    assert engine.metrics.kv.used == 0
    return outputs


def told(outputs: list[Output]) -> tuple:
    """All that a client sees of an answer."""
    last = outputs[-1]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return (
        "".join(output.text for output in outputs),
        [token for output in outputs for token in output.token_ids],
        [(p.token, p.text_offset) for output in outputs for p in output.logprobs],
        [p.token for output in outputs for p in output.prompt_logprobs],
        (last.finish_reason, last.stop_reason, last.num_output_tokens, last.error),
    )


@pytest.mark.parametrize("blocks", [None, 4])
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_the_same_as_without_deferral(source, seed, blocks):
    """With few blocks, sequences are preempted whose last token has no text yet."""
    requests = requests_of(source, seed)
    config = {"max_num_seqs": 4}
    if blocks is not None:
        probe = new_engine(source, defers=False, max_num_seqs=1)
        size = probe._cache.num_bytes // probe._cache.num_blocks
        config["kv_cache_memory"] = blocks * size
    deferring = new_engine(source, defers=True, **config)
    found = run(deferring, requests, steps_between=2)
    plain = new_engine(source, defers=False, **config)
    expected = run(plain, requests, steps_between=2)
    assert found.keys() == expected.keys()
    for choice, outputs in expected.items():
        assert told(found[choice]) == told(outputs), choice
    if blocks is not None:
        assert deferring.metrics.num_preemptions > 0
    assert deferring.metrics.num_finished == plain.metrics.num_finished


def test_text_is_handed_out_before_the_next_token_is_waited_for(source, monkeypatch):
    engine = new_engine(source, defers=True, max_num_seqs=2)
    events: list[object] = []
    real_run, real_sample = engine._runner.run, step_executor.sample
    monkeypatch.setattr(
        engine._runner, "run", lambda *given: events.append("launched") or real_run(*given)
    )
    monkeypatch.setattr(
        step_executor, "sample", lambda *given: events.append("waited for") or real_sample(*given)
    )
    engine.add_request("r", PROMPTS[0], replace(KINDS[0], max_tokens=3))
    while engine.has_unfinished:
        outputs = engine.step(lambda early: events.append([o.token_ids for o in early]))
        events.append([o.token_ids for o in outputs])
    answer = run(engine, [("r", PROMPTS[0], KINDS[0], None)])["r", 0]
    one, two, three = ([output.token_ids] for output in answer[:3])
    assert events[:9] == [
        *("launched", "waited for", []),
        *("launched", one, "waited for", []),
        *("launched", two),
    ]
    assert events[9:11] == ["waited for", three], "the last one ends it, and is not deferred"


@pytest.mark.parametrize("after", range(1, 7))
def test_abort_hands_out_what_it_counts(source, after):
    engine = new_engine(source, defers=True, max_num_seqs=2)
    outputs: list[Output] = []
    engine.add_request("r", PROMPTS[2], KINDS[0], "a")
    for _ in range(after):
        outputs += engine.step(outputs.extend)
    engine.abort("r")
    outputs += engine.step(outputs.extend)
    assert outputs[-1].finish_reason is FinishReason.ABORT
    assert outputs[-1].num_output_tokens == sum(len(o.token_ids) for o in outputs) == after - 1
    assert not engine.has_unfinished
    assert engine.metrics.kv.used == 0


def test_sequence_that_has_ended_fails_not_again_with_its_step(source, monkeypatch):
    """Its text ends it while the step runs, of which a later part then finds no memory."""
    engine = new_engine(source, defers=True, max_num_seqs=3)
    text = "".join(o.text for o in run(engine, [("r", PROMPTS[0], KINDS[0], None)])["r", 0])
    stopping = replace(KINDS[0], stop=(text[4:6],))
    expected = run(engine, [("r", PROMPTS[0], stopping, None)])["r", 0]
    other = run(engine, [("other", PROMPTS[1], KINDS[4], None)])["other", 0]

    outputs: dict[tuple[str, int], list[Output]] = defaultdict(list)
    real_sample, has_failed = step_executor.sample, []

    def see(found: list[Output]) -> None:
        for output in found:
            outputs[output.request_id, output.index].append(output)

    def sample(*given):
        ended = outputs["r", 0] and outputs["r", 0][-1].finished
        if ended and not has_failed:
            has_failed.append(True)
            raise torch.OutOfMemoryError("as a test wants it")
        return real_sample(*given)

    monkeypatch.setattr(step_executor, "sample", sample)
    engine.add_request("r", PROMPTS[0], stopping)
    engine.add_request("other", PROMPTS[1], KINDS[4])
    while engine.has_unfinished:
        see(engine.step(see))
    assert has_failed
    assert told(outputs["r", 0]) == told(expected)
    assert told(outputs["other", 0]) == told(other)
