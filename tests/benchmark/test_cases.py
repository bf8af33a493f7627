"""Cases of a benchmark."""

from neuroada_serve.benchmark.cases import Case, latency_cases, throughput_cases
from neuroada_serve.benchmark.settings import OfflineConfig


def test_cases_and_their_base():
    config = OfflineConfig(concurrency=(1, 4), k=(1, 8), popularity=("distinct",))
    cases = throughput_cases(config)
    assert len(cases) == 2 * 3 + 3
    assert {case.base for case in cases} == {
        Case("decode", 1, "base"),
        Case("decode", 4, "base"),
        Case("prefill", 1, "base"),
    }
    assert {case.phase for case in latency_cases(config)} == {"latency"}
