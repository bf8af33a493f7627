"""The server's log does not flood, and its lines are lines."""

import logging

import pytest

from neuroada_serve.server.logs import FloodFilter, LineFormatter


def record(message: str, *args: object, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("some.where", level, "file.py", 1, message, args, None)


def test_flood_of_a_kind_is_a_few_lines_and_a_count() -> None:
    now = 0.0
    flood = FloodFilter(most=3, period_s=60, clock=lambda: now)
    assert sum(flood.filter(record("bad request from %s", i)) for i in range(400_000)) == 3
    assert flood.filter(record("another kind"))
    now = 60.0
    later = record("bad request from %s", "x")
    assert flood.filter(later)
    assert later.getMessage() == "bad request from x (399997 more like it were left out)"
    assert flood.filter(again := record("bad request from %s", "y"))
    assert again.getMessage() == "bad request from y"


def test_what_was_asked_for_is_all_there() -> None:
    flood = FloodFilter(most=1)
    assert all(flood.filter(record("request", level=logging.INFO)) for _ in range(100))


def test_kinds_of_messages_take_bounded_memory() -> None:
    flood = FloodFilter()
    for i in range(2000):
        flood.filter(record(f"kind {i}"))
    assert len(flood._seen) <= 256


@pytest.mark.parametrize("hostile", ["a\nINFO fake", "a\r\nb", "\x1b[2Jgone", "x\x00\x85"])
def test_message_is_one_line_whatever_it_quotes(hostile: str) -> None:
    line = LineFormatter().format(record("adapter %s is loaded", hostile))
    assert line.startswith("WARNING ")
    assert line.isprintable()
