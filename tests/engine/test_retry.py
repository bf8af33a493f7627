"""Pauses between tries."""

from neuroada_serve.engine.retry import Retry


def test_pause_doubles_with_every_failure_up_to_the_longest():
    retry, pauses = Retry(2, 5), []
    assert retry.is_due
    for _ in range(4):
        retry.fail()
        turns = 0
        while not retry.is_due:
            retry.pass_turn()
            turns += 1
        pauses.append(turns)
    assert pauses == [2, 4, 5, 5]
    assert retry.num_failed == 4


def test_turns_before_a_failure_shorten_no_pause():
    retry = Retry(2, 8)
    for _ in range(5):
        retry.pass_turn()
    retry.fail()
    retry.pass_turn()
    assert not retry.is_due
