"""Refusals of requests before they are queued."""

import pytest

from neuroada_serve.engine.checks import check_ids, check_prompt, check_task
from neuroada_serve.errors import RequestError
from neuroada_serve.request import CLASSIFY, SamplingParams
from neuroada_serve.tasks import GENERATE, Classify, Regress


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1] * 10, "maximum context length is 10 tokens"),
        ([1, 50], r"within \[0, 50\)"),
        ([-1], r"within \[0, 50\)"),
        ([True], "integers"),
        ([1.0], "integers"),
        (["a", None], "integers"),
    ],
)
def test_prompt_that_cannot_run_is_refused(prompt, message):
    with pytest.raises(RequestError, match=message) as raised:
        check_prompt(prompt, max_model_len=10, vocab_size=50)
    assert raised.value.param == "prompt"


def test_prompt_of_all_there_is_room_for_is_taken():
    check_prompt([0, 49] * 4 + [7], max_model_len=10, vocab_size=50)


@pytest.mark.parametrize("fields", [{"stop_token_ids": [50]}, {"logit_bias": {-1: 1.0}}])
def test_ids_outside_the_vocabulary_are_refused_by_field(fields):
    with pytest.raises(RequestError, match=r"outside \[0, 50\)") as raised:
        check_ids(SamplingParams(**fields), vocab_size=50)
    assert raised.value.param in fields


def test_each_task_is_asked_for_what_it_gives():
    reviews = Classify(("bad", "good"))
    check_task(SamplingParams(), None, GENERATE)
    check_task(CLASSIFY, "reviews", reviews)
    check_task(CLASSIFY, "stars", Regress(("stars",)))
    with pytest.raises(RequestError, match="the base is not a classifier; it answers in text"):
        check_task(CLASSIFY, None, GENERATE)
    with pytest.raises(RequestError, match="'reviews' is a classifier; ask it through /v1/class"):
        check_task(SamplingParams(), "reviews", reviews)
    with pytest.raises(RequestError, match="'stars' is a regression; ask it through /v1/classify"):
        check_task(SamplingParams(), "stars", Regress(("stars",)))
