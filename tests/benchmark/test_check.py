"""The check of every case against the reference op."""

import pytest

from neuroada_serve.benchmark.cases import Case
from neuroada_serve.benchmark.check import Checker
from neuroada_serve.benchmark.measure import OurEngine
from neuroada_serve.benchmark.settings import OfflineConfig
from neuroada_serve.errors import EngineError
from neuroada_serve.model import bypass_linear
from neuroada_serve.ops.bypass import bypass_add_
from neuroada_serve.ops.step_plan import StepPlan
from tests.support.benchmark import halves_the_values, works


@pytest.fixture(scope="module")
def engine(model):
    config = OfflineConfig(concurrency=(3,), k=(1, 2), prompt_len=5, output_len=4, prefill_len=9)
    return OurEngine(model, config, "float32", 3)


@pytest.mark.parametrize("popularity", ["identical", "distinct", "merged", "half-merged"])
def test_right_cases_pass_the_check(engine, popularity):
    found = Checker(engine, 4).check(Case("decode", 3, popularity, 2), works(popularity))
    assert found.ok
    assert found.num_tokens + found.num_ties >= 12
    assert bypass_linear.bypass_add_ is bypass_add_


def test_broken_op_fails_the_check(engine, monkeypatch):
    monkeypatch.setattr(bypass_linear, "bypass_add_", halves_the_values)
    found = Checker(engine, 4).check(Case("decode", 3, "distinct", 2), works("distinct"))
    assert not found.ok
    assert found.num_wrong >= 1
    assert found.largest_difference > found.tolerance


def test_op_that_is_never_called_voids_the_check(engine, monkeypatch):
    monkeypatch.setattr(StepPlan, "calls", lambda self, site: [])
    with pytest.raises(EngineError, match="void"):
        Checker(engine, 4).check(Case("decode", 3, "distinct", 2), works("distinct"))
