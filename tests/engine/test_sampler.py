"""The sampler, against the distributions its parameters define."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve import LLM
from neuroada_serve.engine import sampler
from neuroada_serve.engine.sampler import new_draws, sample, score
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.request import SamplingParams
from tests.support.tiny import save_tiny_model

LOGITS = [1.5, -0.5, 3.0, 0.25, 2.0, -3.0, 1.0, 2.75]


def new_sequence(prompt=(), output=(), end=(), index=0, **params) -> Sequence:
    sampling = SamplingParams(**params)
    return Sequence(
        request_id="r",
        index=index,
        prompt_token_ids=list(prompt),
        params=sampling,
        max_tokens=99,
        end_token_ids=frozenset(end),
        detokenizer=None,
        random=new_draws(sampling, index),
        output_token_ids=list(output),
    )


def tokens(rows, sequences) -> list[int | None]:
    results = sample(torch.tensor(rows), sequences)
    return [None if result is None else result.token_id for result in results]


def greedy(row, **kwargs) -> int | None:
    return tokens([row], [new_sequence(temperature=0, **kwargs)])[0]


def distribution(logits: list[float], params: SamplingParams) -> list[float]:
    """Return the distribution that the parameters mean: temperature, then top_k, then top_p of
    those, then min_p."""
    peak = max(logits)
    weights = [math.exp((logit - peak) / params.temperature) for logit in logits]
    probs = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    order = order[: params.top_k] if params.top_k > 0 else order
    kept, total, before = [], sum(probs[i] for i in order), 0.0
    for i in order:
        if before / total < params.top_p and probs[i] >= params.min_p * probs[order[0]]:
            kept.append(i)
        before += probs[i]
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


def measured(monkeypatch, logits: list[float], num: int, **params) -> list[float]:
    """Share of each token over `num` evenly spaced random numbers: exact to 1 / num."""
    sequence = new_sequence(**params)
    uniform = iter([(i + 0.5) / num for i in range(num)])
    counts = [0] * len(logits)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "rand", lambda *a, **k: torch.tensor(next(uniform), dtype=torch.float64)
        )
        for _ in range(num):
            counts[tokens([logits], [sequence])[0]] += 1
    return [count / num for count in counts]


# --- distributions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 5.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 8},
        {"top_k": 100},
        {"top_k": 0},
        {"top_p": 0.5},
        {"top_p": 0.95, "temperature": 2.0},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 4, "top_p": 0.8, "min_p": 0.25, "temperature": 1.5},
    ],
)
@pytest.mark.parametrize("nucleus", [1024, 2])
def test_draws_follow_the_defined_distribution(params, nucleus, monkeypatch):
    monkeypatch.setattr(sampler, "_NUCLEUS", nucleus)
    expected = distribution(LOGITS, SamplingParams(**params))
    shares = measured(monkeypatch, LOGITS, 250, **params)
    for share, probability in zip(shares, expected, strict=True):
        assert abs(share - probability) <= 1.001 / 250
        assert probability > 0 or share == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    vocab=st.integers(1, 40),
    temperature=st.floats(0.05, 10),
    top_k=st.integers(-1, 45),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filters_combine_as_defined(seed, vocab, temperature, top_k, top_p, min_p):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(vocab, generator=generator) * 3).tolist()
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = distribution(logits, SamplingParams(**params))
    with pytest.MonkeyPatch.context() as patch:
        shares = measured(patch, logits, 50, **params)
    for share, probability in zip(shares, expected, strict=True):
        assert abs(share - probability) <= 1.01 / 50


def test_flat_nucleus_is_found_beyond_the_first_thousand(monkeypatch):
    flat = [0.0] * 3000
    shares = measured(monkeypatch, flat, 60, top_p=0.9)
    assert sum(share > 0 for share in shares) == 60  # each of 60 numbers another token
    assert sum(share > 0 for share in shares[:1500]) < 60


@pytest.mark.parametrize("vocab", [4096, 4097])  # in blocks, and in none
@pytest.mark.parametrize("params", [{}, {"min_p": 0.1}, {"top_p": 0.9}, {"top_k": 9}])
def test_large_vocabularies_are_drawn_from_as_defined(vocab, params, monkeypatch):
    logits = (torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 3).tolist()
    expected = distribution(logits, SamplingParams(**params))
    shares = measured(monkeypatch, logits, 100, **params)
    for share, probability in zip(shares, expected, strict=True):
        assert abs(share - probability) <= 1.001 / 100
        assert probability > 0 or share == 0


def test_real_random_numbers_follow_the_distribution():
    sequence, counts, num = new_sequence(seed=0), [0] * 8, 2000
    for _ in range(num):
        counts[tokens([LOGITS], [sequence])[0]] += 1
    expected = distribution(LOGITS, SamplingParams())
    chi_square = sum((c - num * p) ** 2 / (num * p) for c, p in zip(counts, expected, strict=True))
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001


def test_temperature_zero_takes_the_most_likely_token():
    assert greedy(LOGITS) == 2
    assert greedy(LOGITS, top_p=0.1, top_k=5, min_p=0.3) == 2


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-300])
def test_lowest_temperatures_still_take_the_most_likely_token(temperature):
    sequence = new_sequence(temperature=temperature, seed=1)
    assert [tokens([LOGITS], [sequence])[0] for _ in range(5)] == [2] * 5


# --- penalties and bans ----------------------------------------------------------------------


def test_presence_penalty_counts_once_and_frequency_penalty_each_time():
    row, output = [0.0, 1.0, 0.9, -9.0], [1, 1, 1]
    assert greedy(row, output=output, presence_penalty=0.05) == 1
    assert greedy(row, output=output, presence_penalty=0.15) == 2
    assert greedy(row, output=output, frequency_penalty=0.03) == 1
    assert greedy(row, output=output, frequency_penalty=0.05) == 2
    assert greedy(row, output=[0], presence_penalty=-1.5) == 0


def test_presence_and_frequency_penalties_leave_the_prompt_alone():
    row = [0.0, 1.0, 0.9]
    assert greedy(row, prompt=[1, 1, 1], presence_penalty=2, frequency_penalty=2) == 1


def test_repetition_penalty_covers_prompt_and_answer_of_either_sign():
    assert greedy([0.0, 2.0, 1.5], prompt=[1], repetition_penalty=1.2) == 1
    assert greedy([0.0, 2.0, 1.5], prompt=[1], repetition_penalty=1.4) == 2
    assert greedy([0.0, 2.0, 1.5], output=[1], repetition_penalty=1.4) == 2
    assert greedy([-1.0, -1.1, -5.0], prompt=[0], repetition_penalty=1.2) == 1
    assert greedy([-1.0, -1.1, -5.0], prompt=[0, 0, 0], repetition_penalty=1.05) == 0
    assert greedy([1.0, 1.1], prompt=[0], repetition_penalty=0.5) == 0


def test_penalties_follow_an_answer_that_grows():
    sequence = new_sequence(temperature=0, prompt=[3], frequency_penalty=1.0)
    for _ in range(6):
        sequence.output_token_ids.append(tokens([[2.5, 2.0, 1.4, 9.0]], [sequence])[0])
    assert sequence.output_token_ids == [3] * 6
    assert sorted(
        zip(sequence.count_tokens().ids, sequence.count_tokens().counts, strict=True)
    ) == [(3, 6)]


def test_logit_bias_adds_to_its_tokens():
    assert greedy(LOGITS, logit_bias={5: 6.1}) == 5
    assert greedy(LOGITS, logit_bias={5: 5.9, 2: 0.0}) == 2
    assert greedy(LOGITS, logit_bias={2: -100, 7: -100}) == 4


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_largest_logit_bias_forces_and_bans(temperature):
    for bias in (1e4, 1e39, 1e300):
        forced = new_sequence(temperature=temperature, seed=0, logit_bias={3: bias})
        assert tokens([LOGITS], [forced]) == [3]
        banned = new_sequence(
            temperature=temperature, seed=0, logit_bias={i: -bias for i in range(8) if i != 5}
        )
        assert tokens([LOGITS], [banned]) == [5]


def test_tiny_repetition_penalty_still_gives_a_token_of_the_seen():
    sequence = new_sequence(prompt=[4], seed=0, repetition_penalty=1e-40)
    assert tokens([LOGITS], [sequence]) == [4]


def test_min_tokens_bans_end_tokens_until_then():
    for num_output, expected in ((0, 4), (2, 4), (3, 2), (9, 2)):
        row_greedy = greedy(LOGITS, output=[6] * num_output, end=(2, 7, 2), min_tokens=3)
        assert row_greedy == expected
    drawn = new_sequence(end=(2, 7), min_tokens=1, seed=0)
    assert not {2, 7} & {tokens([LOGITS], [drawn])[0] for _ in range(200)}


def test_min_tokens_without_end_tokens_changes_nothing():
    assert greedy(LOGITS, min_tokens=5) == 2


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [[math.nan], [math.inf], [math.nan, -math.inf], [-math.inf] * 8])
@pytest.mark.parametrize("temperature", [0, 1])
def test_non_finite_row_gives_none_and_leaves_the_others(poison, temperature):
    bad = [*poison, *LOGITS[len(poison) :]]

    def new_batch(num: int) -> list[Sequence]:
        return [new_sequence(temperature=temperature, seed=i, logprobs=2) for i in range(num)]

    alone = sample(torch.tensor([LOGITS, LOGITS]), new_batch(2))
    first, failed, second = sample(
        torch.tensor([LOGITS, bad, LOGITS]),
        [(batch := new_batch(2))[0], new_sequence(temperature=temperature, logprobs=1), batch[1]],
    )
    assert failed is None
    assert [first, second] == alone


def test_banned_tokens_of_the_model_are_never_drawn():
    row = [-math.inf, 0.0, -math.inf, 0.0]
    sequence = new_sequence(seed=0)
    assert {tokens([row], [sequence])[0] for _ in range(100)} == {1, 3}


@pytest.mark.parametrize("vocab", [8, 4096, 4097])
def test_greedy_takes_the_best_token_of_any_vocabulary(vocab):
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    sequences = [new_sequence(temperature=0) for _ in range(5)]
    assert tokens(logits.tolist(), sequences) == logits.argmax(-1).tolist()


def test_equally_likely_tokens_are_drawn_by_their_ids(monkeypatch):
    """Logits made in 16 bits have many ties; no device may order them its own way."""
    shares = measured(monkeypatch, [2.0, 1.0, 2.0, 0.0, 2.0], 90, top_k=2)
    assert [share > 0 for share in shares] == [True, False, True, False, False]


EACH_WAY = [
    {"seed": 1},
    {"seed": 2, "min_p": 0.01},
    {"seed": 3, "top_p": 0.9},
    {"seed": 4, "top_p": 0.9999, "temperature": 3.0},  # beyond the first candidates
    {"seed": 5, "top_k": 200, "top_p": 0.8},
    {"seed": 6, "top_k": 5},
    {"seed": 7, "repetition_penalty": 1.3, "logit_bias": {1: 5.0}},
    {"temperature": 0, "frequency_penalty": 1.0, "logprobs": 3},
    {"temperature": 0},
]


def test_mixed_batch_equals_one_by_one():
    logits = torch.randn(len(EACH_WAY), 4096, generator=torch.Generator().manual_seed(0)) * 2

    def new_batch() -> list[Sequence]:
        return [new_sequence(prompt=[5, 6], output=[7, 7], **params) for params in EACH_WAY]

    alone = [sample(logits[i : i + 1].clone(), [s])[0] for i, s in enumerate(new_batch())]
    assert sample(logits.clone(), new_batch()) == alone
    assert sample(logits.flip(0), new_batch()[::-1]) == alone[::-1]


def test_no_sequences_give_nothing():
    assert sample(torch.zeros(0, 8), []) == []


def test_each_row_follows_its_own_parameters():
    sequences = [
        new_sequence(temperature=0),
        new_sequence(temperature=0, logit_bias={0: 100}),
        new_sequence(top_k=1),
        new_sequence(temperature=0, output=[2], presence_penalty=2),
    ]
    assert tokens([LOGITS] * 4, sequences) == [2, 0, 2, 7]


def test_penalties_of_one_row_leave_the_logits_of_others():
    with_bias = new_sequence(temperature=0, logit_bias={0: 100}, logprobs=8)
    plain = new_sequence(temperature=0, logprobs=8)
    one, two = sample(torch.tensor([LOGITS, LOGITS]), [with_bias, plain])
    assert one.top == two.top


EVERY_KIND = [
    {"presence_penalty": 1.0},
    {"frequency_penalty": 1.0},
    {"repetition_penalty": 1.5},
    {"logit_bias": {5: 100}},
    {"min_tokens": 3},
    {"temperature": 1, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 0},
    {"logprobs": 2, "logit_bias": {5: 100}},
]


@pytest.mark.parametrize("params", EVERY_KIND)
def test_logits_of_inference_mode_may_be_changed(params):
    """As the runner makes them: torch refuses to change such tensors outside that mode."""
    with torch.inference_mode():
        logits = torch.tensor([LOGITS])
    sequence = new_sequence(prompt=[2], output=[2], end=[2], **{"temperature": 0, **params})
    assert sample(logits, [sequence])[0] is not None


@pytest.mark.parametrize("params", EVERY_KIND)
def test_every_parameter_works_in_the_engine(params, llm):
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 5, "ignore_eos": True, **params})
    (answer,) = llm.generate([[1, 2, 3]], sampling)
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 5


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(str(save_tiny_model(tmp_path_factory.mktemp("llama")).path))


# --- seeds -----------------------------------------------------------------------------------


def draws(num: int = 12, index: int = 0, others: int = 0, **params) -> list[int]:
    sequence = new_sequence(index=index, **params)
    batch = [sequence, *(new_sequence(seed=77 + i) for i in range(others))]
    return [tokens([LOGITS] * len(batch), batch)[0] for _ in range(num)]


def test_same_seed_gives_the_same_draws_in_any_batch():
    assert draws(seed=5) == draws(seed=5) == draws(seed=5, others=3)
    assert draws(seed=5) != draws(seed=6)


def test_choices_of_one_seed_differ_and_count_up():
    assert draws(seed=5, index=1) == draws(seed=6, index=0)
    assert draws(seed=5, index=1) != draws(seed=5, index=0)


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_extreme_seeds_are_seeds(seed):
    assert draws(seed=seed, index=127) == draws(seed=seed, index=127)


def test_without_a_seed_draws_differ():
    assert len({tuple(draws(30)) for _ in range(4)}) == 4


def test_greedy_needs_no_random_numbers():
    assert new_draws(SamplingParams(temperature=0, seed=3), 0) is None


# --- logprobs --------------------------------------------------------------------------------


def test_logprobs_are_the_models_own_before_penalties_and_temperature():
    expected = torch.tensor(LOGITS).log_softmax(-1)
    for params in ({"temperature": 0}, {"temperature": 0.2, "seed": 1, "top_k": 1}):
        sequence = new_sequence(logprobs=3, logit_bias={0: 50}, **params)
        (result,) = sample(torch.tensor([LOGITS]), [sequence])
        assert result.token_id == 0
        assert result.logprob == pytest.approx(float(expected[0]), abs=1e-6)
        assert [token for token, _ in result.top] == [2, 7, 4]
        for token, logprob in result.top:
            assert logprob == pytest.approx(float(expected[token]), abs=1e-6)


def test_logprobs_zero_reports_the_token_alone_and_none_nothing():
    zero, none = sample(
        torch.tensor([LOGITS] * 2),
        [new_sequence(temperature=0, logprobs=0), new_sequence(temperature=0)],
    )
    assert zero.top == ()
    assert zero.logprob is not None
    assert (none.logprob, none.top) == (None, ())


def test_score_gives_each_rows_token_and_its_best():
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    first, second = score(logits, [1, 1], 2)
    assert first.logprob == pytest.approx(float(logits[0].log_softmax(-1)[1]))
    assert second.logprob == pytest.approx(float(logits[1].log_softmax(-1)[1]))
    assert [token for token, _ in first.top] == [2, 7]
    assert [token for token, _ in second.top] == [5, 0]
