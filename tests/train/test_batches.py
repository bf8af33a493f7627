"""Batches of rows."""

from neuroada_serve.train.loop import LengthGroupedBatches


def test_every_row_is_in_one_batch_of_each_pass():
    lengths = [(i * 37) % 90 + 1 for i in range(203)]
    batches = LengthGroupedBatches(lengths, batch_size=8, seed=0)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 26
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(203))
    assert first != second
    assert first == list(LengthGroupedBatches(lengths, batch_size=8, seed=0))


def test_batches_hold_rows_of_like_length():
    lengths = [(i * 37) % 90 + 1 for i in range(256)]
    batches = LengthGroupedBatches(lengths, batch_size=8, seed=0)
    widest = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    assert widest < 1.3 * sum(lengths)
