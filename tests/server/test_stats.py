"""The line of throughput."""

from neuroada_serve.metrics import KVUsage
from neuroada_serve.server.stats import ThroughputLog
from tests.support.fake_engine import FakeEngine


def test_line_tells_rates_since_the_last_and_silence_once() -> None:
    now = 0.0
    engine = FakeEngine()
    log = ThroughputLog(engine, clock=lambda: now)
    now = 60.0
    assert log.line() is None

    engine.metrics.num_prompt_tokens, engine.metrics.num_cached_tokens = 450, 150
    engine.metrics.num_output_tokens = 1200
    engine.metrics.kv = KVUsage(32, 40, used=3, cached=2)
    now = 120.0
    assert log.line() == (
        "Prompt throughput: 10.0 tokens/s, generation throughput: 20.0 tokens/s, running: 0, "
        "waiting: 0, prompt tokens from the cache: 25.0%, KV cache in use: "
        "7.5%, adapters on the device: 2"
    )
    now = 180.0
    assert "generation throughput: 0.0 tokens/s" in str(log.line())
    now = 240.0
    assert log.line() is None
