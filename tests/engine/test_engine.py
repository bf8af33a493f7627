"""The engine on tiny random models of every supported family, against plain transformers."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from neuroada_serve import LLM, SamplingParams
from neuroada_serve.adapters.format import ModuleBypass, make_adapter
from neuroada_serve.adapters.store import VersionState
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine import input_processor
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.merge_policy import MergePolicy
from neuroada_serve.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    DirtyWeightsError,
    ModelError,
    RequestError,
)
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.merge import WeightMerger
from neuroada_serve.model.source import ModelSource
from neuroada_serve.request import FinishReason
from tests.support.tiny import (
    FAMILIES,
    plain_generate,
    plain_merged,
    random_adapter,
    save_tiny_model,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = [list(range(start, start + length)) for start, length in ((5, 3), (40, 11), (90, 1))]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    """A model of each family with three adapters: other k, other values, other target modules, and
    where the model has biases (GPT-2, Qwen2), with and without."""
    source = save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    fewer = {"gpt2": ("c_fc",), "phi3": ("o_proj",)}.get(request.param, ("q_proj", "down_proj"))
    adapters = {
        "a": random_adapter(source, seed=1, k=2),
        "b": random_adapter(source, seed=2, k=5, biases=True),
        "c": random_adapter(source, seed=3, k=2, targets=fewer, biases=True),
    }
    return source, adapters


def test_mixed_batch_equals_plain_transformers(family):
    source, adapters = family
    llm = LLM(str(source.path), adapters, max_num_seqs=5, max_num_batched_tokens=8)
    names = [None, "a", "b", "a", "c", "b", None]
    prompts = [PROMPTS[i % 3] for i in range(len(names))]
    answers = llm.generate(prompts, GREEDY, names)
    for prompt, name, answer in zip(prompts, names, answers, strict=True):
        model = plain_merged(source, adapters.get(name))
        expected = plain_generate(model, prompt, 12, llm.engine.base.eos_token_ids)
        assert list(answer.token_ids) == expected, name
    assert len({a.token_ids for a in answers[:3]}) == 3, "the adapters make no difference"


def test_merged_equals_unmerged_for_everyone(family):
    source, adapters = family
    llm = LLM(str(source.path), adapters)
    names = [None, "a", "b", "c"]
    expected = llm.generate([PROMPTS[1]] * 4, GREEDY, names)
    digest = llm.base_digest()
    for merged in ("a", "b", "c"):
        llm.merge(merged)
        answers = llm.generate([PROMPTS[1]] * 4, GREEDY, names)
        assert [a.token_ids for a in answers] == [e.token_ids for e in expected], merged
    assert llm.base_digest() != digest
    llm.unmerge()
    assert llm.base_digest() == digest


def test_logits_equal_plain_transformers(family):
    source, adapters = family
    llm = LLM(str(source.path), adapters, max_num_batched_tokens=16)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt = list(range(7, 60))
    for name in (None, "b"):
        answer = llm.generate(prompt, params, name)[0]
        model = plain_merged(source, adapters.get(name))
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = logprobs[torch.arange(len(prompt) - 1), prompt[1:]]
        assert answer.prompt_logprobs is not None
        measured = torch.tensor([p.logprob for p in answer.prompt_logprobs])
        torch.testing.assert_close(measured, expected, atol=1e-4, rtol=1e-4)


def test_a_mix_of_adapters_with_biases_adds_them_up(tmp_path):
    source = save_tiny_model(tmp_path, "qwen2")
    same = [random_adapter(source, seed, k=2, biases=True) for seed in (1, 2)]
    other = random_adapter(source, seed=3, k=3, targets=("q_proj", "up_proj"), biases=True)
    llm = LLM(str(source.path), {"a": same[0], "b": same[1], "c": other})
    for mix in ({"a": 1.0, "b": -0.5}, {"a": 0.5, "c": 2.0}):
        parts = {"a": same[0], "b": same[1], "c": other}
        model = plain_merged(source, None)
        for name, weight in mix.items():
            scaled = {
                module: ModuleBypass(
                    part.index,
                    part.bypass.float() * weight,
                    None if part.bias is None else part.bias.float() * weight,
                )
                for module, part in parts[name].modules.items()
            }
            scaled = make_adapter(parts[name].config, scaled)
            model = plain_merged(source, scaled, onto=model)
        expected = plain_generate(model, PROMPTS[0], 12, llm.engine.base.eos_token_ids)
        name = "+".join(f"{part}:{weight}" for part, weight in mix.items())
        assert list(llm.generate(PROMPTS[0], GREEDY, name)[0].token_ids) == expected


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    source = save_tiny_model(tmp_path_factory.mktemp("llama"))
    return source, {"a": random_adapter(source, 1), "b": random_adapter(source, 2)}


def new_engine(source: ModelSource, adapters=None, **config) -> Engine:
    engine = Engine(load_base(source), EngineConfig(**config))
    for name, adapter in (adapters or {}).items():
        engine.adapters.add_resident(name, adapter)
    return engine


def run(engine: Engine, stop_after: int = 1000) -> list:
    outputs = []
    while engine.has_unfinished and stop_after:
        outputs += engine.step()
        stop_after -= 1
    return outputs


def test_requests_join_and_leave_at_any_step(llama):
    source, adapters = llama
    engine = new_engine(source, adapters, max_num_seqs=3, max_num_batched_tokens=6)
    lengths = {"r0": 3, "r1": 9, "r2": 1, "r3": 12, "r4": 5}
    outputs = []
    for i, (request_id, max_tokens) in enumerate(lengths.items()):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(request_id, PROMPTS[i % 3], params, [None, "a", "b"][i % 3])
        outputs += engine.step()
    outputs += run(engine)
    for i, (request_id, max_tokens) in enumerate(lengths.items()):
        mine = [t for o in outputs if o.request_id == request_id for t in o.token_ids]
        model = plain_merged(source, adapters.get([None, "a", "b"][i % 3]))
        assert mine == plain_generate(model, PROMPTS[i % 3], max_tokens, frozenset())


def test_every_sequence_ends_with_exactly_one_final_output(llama):
    source, adapters = llama
    engine = new_engine(source, adapters, max_num_seqs=2)
    for i in range(5):
        engine.add_request(f"r{i}", PROMPTS[0], SamplingParams(n=2, max_tokens=4, seed=i), "a")
    engine.step()
    engine.abort("r0")
    engine.abort("r4")
    engine.abort("no such request")
    finals = [(o.request_id, o.index) for o in run(engine) if o.finished]
    assert sorted(finals) == [(f"r{i}", index) for i in range(5) for index in range(2)]


def test_adapter_in_memory_is_checked_like_one_on_disk(llama, tmp_path):
    source, adapters = llama
    llm = LLM(str(source.path))
    foreign = random_adapter(save_tiny_model(tmp_path, "qwen3"), seed=1)
    with pytest.raises(AdapterFormatError, match="trained on another base"):
        llm.load_adapter("foreign", foreign)
    name, part = next(iter(adapters["a"].modules.items()))
    beyond = part.index.clone()
    beyond[0, 0] = llm.engine.base.spec.shapes[name][1]
    parts = {**adapters["a"].modules, name: ModuleBypass(beyond, part.bypass)}
    with pytest.raises(AdapterFormatError, match=f"{name}.index has column"):
        llm.load_adapter("beyond", make_adapter(adapters["a"].config, parts))
    assert llm.adapters == ()


def test_adapter_named_like_a_merge_mode_is_only_a_name(llama):
    source, adapters = llama
    for mode in ("never", "auto"):
        engine = new_engine(source, {mode: adapters["a"]}, merge=mode)
        assert engine.merged is None


def test_metrics_count_what_was_done(llama):
    engine = new_engine(*llama)
    engine.add_request("done", PROMPTS[1], SamplingParams(max_tokens=3, n=2, ignore_eos=True), "a")
    engine.add_request("left", PROMPTS[0], GREEDY)
    engine.abort("left")
    run(engine)
    engine.adapters.merging.merge("a")
    engine.adapters.merging.unmerge()
    metrics = engine.metrics
    # The second choice computes the last token of the prompt.
    assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (len(PROMPTS[1]) + 1, 6)
    assert metrics.num_finished[FinishReason.LENGTH] == 2
    assert metrics.num_finished[FinishReason.ABORT] == 1
    # One step of a decode alone, by which the pace is measured, and one for the second choice.
    assert (metrics.num_steps, metrics.num_merges, metrics.num_unmerges) == (5, 1, 1)


def test_the_log_says_what_is_merged(llama, caplog):
    caplog.set_level("INFO", logger="neuroada_serve")
    engine = new_engine(*llama)
    for change in (lambda: engine.adapters.merging.merge("a"), engine.adapters.merging.unmerge) * 2:
        change()
    engine.adapters.merging.unmerge()  # of nothing: no line
    said = [record.getMessage().split(", ")[0] for record in caplog.records]
    assert said == ["adapter 'a' merged", "adapter 'a' taken out of the weights"] * 2


def test_abort_frees_slot_and_lease(llama):
    source, adapters = llama
    engine = new_engine(source, adapters)
    engine.add_request("r", PROMPTS[0], SamplingParams(max_tokens=None), "a")
    engine.step()
    engine.abort("r")
    (final,) = run(engine)
    assert final.finish_reason is FinishReason.ABORT
    assert engine.num_running == 0
    engine.adapters.remove("a")
    assert engine.adapters.bank.num_resident == 1  # b


def test_replacing_an_adapter_leaves_running_requests_alone(llama):
    source, adapters = llama
    engine = new_engine(source, {"x": adapters["a"]})
    engine.add_request("old", PROMPTS[0], GREEDY, "x")
    outputs = engine.step()
    engine.adapters.add_resident("x", adapters["b"], replace=True)
    engine.add_request("new", PROMPTS[0], GREEDY, "x")
    outputs += run(engine)
    for request_id, adapter in (("old", adapters["a"]), ("new", adapters["b"])):
        tokens = [t for o in outputs if o.request_id == request_id for t in o.token_ids]
        eos = engine.base.eos_token_ids
        assert tokens == plain_generate(plain_merged(source, adapter), PROMPTS[0], 12, eos)
    assert engine.adapters.bank.num_resident == 1


def test_removing_a_merged_adapter_finishes_its_requests(llama):
    source, adapters = llama
    engine = new_engine(source, adapters)
    digest = engine.base_digest()
    engine.adapters.merging.merge("a")
    engine.add_request("r", PROMPTS[0], GREEDY, "a")
    outputs = engine.step()
    engine.adapters.remove("a")
    assert engine.base_digest() == digest
    tokens = [t for o in outputs + run(engine) for t in o.token_ids]
    model = plain_merged(source, adapters["a"])
    assert tokens == plain_generate(model, PROMPTS[0], 12, engine.base.eos_token_ids)


def test_merging_in_the_middle_of_requests_changes_no_token(llama):
    source, adapters = llama
    engine = new_engine(source, adapters)
    names = [None, "a", "b"]
    for i, name in enumerate(names):
        engine.add_request(f"r{i}", PROMPTS[1], GREEDY, name)
    outputs = engine.step()
    merging = engine.adapters.merging
    for change in (lambda: merging.merge("a"), lambda: merging.merge("b"), merging.unmerge):
        change()
        outputs += engine.step() + engine.step()
    outputs += run(engine)
    for i, name in enumerate(names):
        tokens = [t for o in outputs if o.request_id == f"r{i}" for t in o.token_ids]
        model = plain_merged(source, adapters.get(name))
        assert tokens == plain_generate(model, PROMPTS[1], 12, engine.base.eos_token_ids)


def test_non_finite_logits_fail_one_request_only(llama):
    source, adapters = llama
    huge = random_adapter(source, 9, k=2, scale=1e37)
    engine = new_engine(source, {**adapters, "huge": huge}, max_num_seqs=3)
    # r2 moves into the slot that r0 left and is shorter than it; r1 keeps the cache's view long, so
    # that r2 looks, behind its mask, at what r0 wrote there.
    asked = [("huge", 30), ("a", 40), (None, 3), ("b", 3)]
    for i, (name, length) in enumerate(asked):
        engine.add_request(f"r{i}", list(range(5, 5 + length)), GREEDY, name)
    outputs = run(engine)
    reasons = {o.request_id: o.finish_reason for o in outputs if o.finished}
    assert reasons.pop("r0") is FinishReason.ERROR
    assert FinishReason.ERROR not in reasons.values()
    for i, (name, length) in list(enumerate(asked))[1:]:
        tokens = [t for o in outputs if o.request_id == f"r{i}" for t in o.token_ids]
        model = plain_merged(source, adapters.get(name))
        prompt = list(range(5, 5 + length))
        assert tokens == plain_generate(model, prompt, 12, engine.base.eos_token_ids)


def test_failing_step_ends_its_requests_and_the_engine_goes_on(llama, monkeypatch, caplog):
    engine = new_engine(llama[0])
    engine.add_request("doomed", PROMPTS[0], GREEDY)
    with monkeypatch.context() as broken:
        broken.setattr(engine.base.model, "forward", lambda **kwargs: 1 / 0)
        (final,) = engine.step()
    assert (final.request_id, final.finish_reason) == ("doomed", FinishReason.ERROR)
    assert "a step failed" in caplog.text
    engine.add_request("fine", PROMPTS[0], GREEDY)
    assert run(engine)[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("prompt", "params", "word"),
    [
        ([], {}, "empty"),
        ([1] * 256, {}, "maximum context length is 256"),
        ([1, 260], {}, "token ids"),
        ([-1], {}, "token ids"),
        ([1], {"logit_bias": {999: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": [999]}, "stop_token_ids"),
    ],
)
def test_bad_request_is_refused_with_its_reason(llama, prompt, params, word):
    engine = new_engine(llama[0])
    with pytest.raises(RequestError, match=word):
        engine.add_request("r", prompt, SamplingParams(**params))
    assert not engine.has_unfinished


def test_unknown_adapter_is_refused_never_the_base(llama):
    engine = new_engine(*llama)
    with pytest.raises(AdapterNotFoundError, match="'nope'.*a, b"):
        engine.add_request("r", [1], GREEDY, "nope")


def test_answer_ends_at_the_model_length(llama):
    engine = new_engine(llama[0], max_model_len=10)
    engine.add_request("r", [1] * 7, SamplingParams(temperature=0, max_tokens=99, ignore_eos=True))
    final = run(engine)[-1]
    assert (final.finish_reason, final.num_output_tokens) == (FinishReason.LENGTH, 3)


def test_auto_merge_frees_the_largest_group(llama, monkeypatch):
    source, adapters = llama
    # On a model of this size a switch costs what Python does, and would never pay.
    monkeypatch.setattr(MergePolicy, "observe_switch", lambda *args: None)
    engine = new_engine(source, adapters, merge="auto")
    digest = engine.base_digest()
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    names = [*["a"] * 6, "b", None]
    for i, name in enumerate(names):
        engine.add_request(f"r{i}", PROMPTS[0], params, name)
    outputs = run(engine, stop_after=8)
    assert engine.merged == "a"
    outputs += run(engine)
    for i, name in enumerate(names):
        tokens = [t for o in outputs if o.request_id == f"r{i}" for t in o.token_ids]
        model = plain_merged(source, adapters.get(name))
        assert tokens == plain_generate(model, PROMPTS[0], 60, frozenset())
    for i in range(6):
        engine.add_request(f"base{i}", PROMPTS[0], params, None)
    run(engine)
    assert engine.merged is None
    assert engine.base_digest() == digest


def test_configured_adapter_stays_merged_through_a_reload(llama):
    source, adapters = llama
    engine = new_engine(source, {"a": adapters["a"]}, merge="a")
    assert engine.merged == "a"
    engine.adapters.add_resident("a", adapters["b"], replace=True)
    assert engine.merged == "a"
    engine.add_request("r", PROMPTS[0], GREEDY, "a")
    tokens = [t for o in run(engine) for t in o.token_ids]
    model = plain_merged(source, adapters["b"])
    assert tokens == plain_generate(model, PROMPTS[0], 12, engine.base.eos_token_ids)


def test_merge_that_fails_leaves_its_adapter_served_unmerged(llama, monkeypatch, caplog):
    source, adapters = llama
    engine = new_engine(source, adapters)
    digest, tried = engine.base_digest(), []

    def fail(merger, values, originals):
        tried.append(values)
        raise OSError("no memory for it")

    with monkeypatch.context() as broken:
        broken.setattr(WeightMerger, "merge", fail)
        engine.adapters.merging.set_mode("a")
        engine.add_request("r", PROMPTS[0], GREEDY, "a")
        tokens = [t for o in run(engine) for t in o.token_ids]
    model = plain_merged(source, adapters["a"])
    assert tokens == plain_generate(model, PROMPTS[0], 12, engine.base.eos_token_ids)
    assert len(tried) == 1  # not once a step
    assert engine.merged is None
    assert engine.base_digest() == digest
    assert "adapter a cannot be merged" in caplog.text
    assert "no memory for it" in caplog.text
    engine.adapters.merging.set_mode("b")
    engine.step()
    assert engine.merged == "b"
    engine.adapters.unload("a")  # the failed merge has kept no lease


@pytest.mark.parametrize("asked", ["by mode", "by name"])
def test_room_is_not_taken_from_what_is_being_merged(llama, monkeypatch, asked):
    source, adapters = llama
    engine = new_engine(source, adapters)
    tiers, real = engine.adapters.tiers, WeightMerger.merge

    def merge(merger, values, originals):
        with tiers._lock:  # as a loader does, for another adapter
            while tiers._room.evict():
                pass
        real(merger, values, originals)

    monkeypatch.setattr(WeightMerger, "merge", merge)
    if asked == "by name":
        engine.adapters.merging.merge("a")
    else:
        engine.adapters.merging.set_mode("a")
        engine.step()
    assert engine.merged == "a"
    assert engine.adapters.bank.num_resident == 1
    engine.add_request("r", PROMPTS[0], GREEDY, None)
    tokens = [t for o in run(engine) for t in o.token_ids]
    model = plain_merged(source, None)
    assert tokens == plain_generate(model, PROMPTS[0], 12, engine.base.eos_token_ids)
    engine.adapters.merging.unmerge()
    engine.adapters.unload("a")  # nothing is held any more


def test_weights_that_cannot_be_restored_stop_the_engine(llama, monkeypatch):
    engine = new_engine(*llama)

    def fail(merger, values, originals):
        raise DirtyWeightsError("half written")

    monkeypatch.setattr(WeightMerger, "merge", fail)
    engine.adapters.merging.set_mode("a")
    with pytest.raises(DirtyWeightsError, match="half written"):
        engine.step()


@pytest.mark.parametrize("mode", ["a", "auto"])
def test_idle_merged_adapter_is_unloaded_without_a_wait_being_asked_for(llama, mode):
    """Its lease is the engine's own, who lets go of it between two steps."""
    engine = new_engine(*llama, merge=mode)
    engine.adapters.merging.merge("a")
    engine.adapters.merging.set_mode(mode)
    with ThreadPoolExecutor() as pool:
        unloaded = pool.submit(engine.adapters.unload, "a")
        while not unloaded.done():
            engine.step()
        unloaded.result()
    assert engine.merged is None
    assert "a" not in engine.adapters.store.names
    assert engine.base_digest() == new_engine(llama[0]).base_digest()


@pytest.mark.parametrize("mode", ["the mix", "auto"])
def test_part_of_an_idle_merged_mix_is_unloaded(llama, mode):
    """A lease on a mix is one on its parts, too."""
    engine = new_engine(*llama, merge="auto")
    engine.adapters.merging.merge("a:0.5+b:0.5")
    if mode == "auto":
        engine.adapters.merging.set_mode(mode)
    with ThreadPoolExecutor() as pool:
        unloaded = pool.submit(engine.adapters.unload, "a")
        while not unloaded.done():
            engine.step()
        unloaded.result()
    assert engine.merged is None
    assert "a" not in engine.adapters.store.names
    assert engine.base_digest() == new_engine(llama[0]).base_digest()


@pytest.mark.parametrize("mode", ["the mix", "auto"])
def test_merged_mix_goes_once_a_part_of_it_is_replaced(llama, mode):
    source, adapters = llama
    engine = new_engine(source, adapters, merge="auto")
    engine.adapters.merging.merge("a:0.5+b:0.5")
    if mode == "auto":
        engine.adapters.merging.set_mode(mode)
    old = engine.adapters.store.get("a")
    engine.adapters.add("a", adapters["b"], replace=True)
    engine.step()
    assert engine.merged is None
    assert old.state is VersionState.GONE
    assert engine.base_digest() == new_engine(source).base_digest()


def test_request_that_fails_while_it_is_made_holds_no_lease(llama, monkeypatch):
    engine = new_engine(*llama)
    detokenizers = iter([input_processor.Detokenizer])  # for the first of two choices

    def short_of_memory(*args):
        try:
            return next(detokenizers)(*args)
        except StopIteration:
            raise MemoryError from None

    monkeypatch.setattr(input_processor, "Detokenizer", short_of_memory)
    with pytest.raises(MemoryError):
        engine.add_request("r", [1, 2, 3], replace(GREEDY, n=2, temperature=1), "a")
    engine.adapters.unload("a")
    assert "a" not in engine.adapters.store.names


def test_unsupported_model_is_refused_by_kind(tmp_path):
    from tests.support.tiny import tiny_tokenizer

    config = MambaConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Mamba"):
        LLM(str(tmp_path))


def test_seed_gives_the_same_draws_whatever_else_runs(llama):
    llm = LLM(str(llama[0].path))
    params = SamplingParams(seed=7, max_tokens=8, ignore_eos=True)
    alone = llm.generate(PROMPTS[0], params)[0]
    beside = llm.generate([PROMPTS[1], PROMPTS[0]], [SamplingParams(max_tokens=8), params])[1]
    assert alone.token_ids == beside.token_ids


def test_one_bad_prompt_leaves_nothing_behind(llama):
    llm = LLM(str(llama[0].path))
    with pytest.raises(RequestError):
        llm.generate([PROMPTS[0], []], GREEDY)
    assert not llm.engine.has_unfinished
