"""bench/abuse with smaller attacks on a tiny model."""

from bench.abuse import attacks
from bench.abuse.__main__ import print_table
from bench.abuse.server import ANSWER_TIMEOUT_S, server
from bench.harness import ROOT
from tests.support.tiny import save_tiny_model


def test_abuse_is_measured(tmp_path, monkeypatch):
    """Less of it, against a tiny model."""
    source = save_tiny_model(tmp_path / "model")
    for name, value in {"NUM_LARGE": 2, "NUM_HALF_OPEN": 3, "NUM_SILENT": 3}.items():
        monkeypatch.setattr(attacks, name, value)
    few = dict(list(attacks.bombs().items())[:2])
    monkeypatch.setattr(attacks, "bombs", lambda: few)
    with server(str(source.path), ROOT) as running:
        found = attacks.measure_bombs(running, rounds=1)
        assert found.keys() == {"nothing", *few}
        assert all(one["held_ms"][0] > 0 for one in found.values())
        large = attacks.measure_large_prompts(running, rounds=1)
        assert all(0 < time < ANSWER_TIMEOUT_S for times in large.values() for time in times)
        half_open = attacks.measure_half_open(running, wait_s=0.3)
        assert half_open["gone"] == 0
        assert half_open["beside_them_s"]
        descriptors = attacks.measure_descriptors(running)
        assert descriptors["log_lines"] == 0
    print_table(
        {
            "bombs": found,
            "large_prompts": large,
            "half_open": half_open,
            "descriptors": descriptors,
        }
    )
