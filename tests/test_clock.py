"""The clock: every row once per epoch, batches of one bucket, and the same wherever a run begins."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from training.clock import ImageClock

ROWS = 53
BUCKETS = np.random.default_rng(3).choice(5, ROWS, p=[0.5, 0.3, 0.1, 0.06, 0.04]).astype(np.uint16)


def micro_batches(*args, **kw) -> list[list[tuple[int, int]]]:
    return list(ImageClock(*args, **kw))


def plain(rows: int, batch: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1):
    """Image n shows row permutation(epoch)[n mod rows]: the whole clock, where there are no buckets."""
    for first in range(start, stop, batch * world):
        mine = []
        for n in range(first + rank * batch, first + (rank + 1) * batch):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + n // rows) % 2**63)
            mine.append((n, torch.randperm(rows, generator=generator).tolist()[n % rows]))
        yield mine


@pytest.mark.parametrize("start", [0, 5, 24, 7 * 53 + 1])
@pytest.mark.parametrize(("rows", "batch", "world", "rank"), [(53, 4, 1, 0), (53, 4, 3, 2), (3, 8, 2, 1), (1, 2, 1, 0)])
def test_one_bucket_is_the_plain_clock(rows: int, batch: int, world: int, rank: int, start: int):
    expected = list(plain(rows, batch, 7, start, start + 97, rank, world))
    assert micro_batches(rows, batch, 7, start, start + 97, rank, world) == expected
    assert micro_batches(np.full(rows, 4), batch, 7, start, start + 97, rank, world) == expected
    assert len(ImageClock(rows, batch, 7, start, start + 97, rank, world)) == len(expected)


def test_batches_are_of_one_bucket_and_indices_count_up():
    batches = micro_batches(BUCKETS, 4, 1, 0, 4 * 200)
    assert len(batches) == 200
    assert [n for batch in batches for n, _ in batch] == list(range(800))
    assert all(len({BUCKETS[row] for _, row in batch}) == 1 for batch in batches)
    assert len({BUCKETS[batch[0][1]] for batch in batches}) == 5


def test_the_queues_rule_by_walking():
    """Against the rule itself: walk through the permutations, and give out a queue as it becomes full."""
    expected, queues = [], [[] for _ in range(5)]
    for epoch in range(12):
        generator = torch.Generator().manual_seed(9 * 1_000_003 + epoch)
        for row in torch.randperm(ROWS, generator=generator).tolist():
            queue = queues[BUCKETS[row]]
            queue.append(row)
            if len(queue) == 6:
                expected.append(queue[:])
                queue.clear()
    found = [[row for _, row in batch] for batch in micro_batches(BUCKETS, 6, 9, 0, 6 * len(expected))]
    assert found == expected


def test_in_each_bucket_every_row_once_per_epoch():
    rows = [row for batch in micro_batches(BUCKETS, 4, 2, 0, 4 * 300) for _, row in batch]
    for bucket in range(5):
        members = set(np.flatnonzero(bucket == BUCKETS).tolist())
        stream = [row for row in rows if row in members]
        epochs = [stream[i : i + len(members)] for i in range(0, len(stream) - len(members) + 1, len(members))]
        assert len(epochs) > 10 and all(set(epoch) == members for epoch in epochs)
        assert len(members) < 3 or len({tuple(epoch) for epoch in epochs}) > 1  # in another order each time
    counts = Counter(rows)
    assert max(counts.values()) - min(counts.values()) <= 4  # a queue holds less than a batch


@pytest.mark.parametrize("start", [4, 48, 4 * 13, 4 * 131, 4 * 5000])
def test_it_can_begin_anywhere(start: int):
    whole = micro_batches(BUCKETS, 4, 5, start - 4, start + 4 * 40)
    assert micro_batches(BUCKETS, 4, 5, start, start + 4 * 40) == whole[1:]
    if start < 1000:
        assert micro_batches(BUCKETS, 4, 5, 0, start + 4 * 40)[start // 4 :] == whole[1:]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_same_batches(world: int):
    whole = micro_batches(BUCKETS, 4, 5, 24, 24 + 4 * 18)
    parts = [micro_batches(BUCKETS, 4, 5, 24, 24 + 4 * 18, rank, world) for rank in range(world)]
    assert all(len(part) == 18 // world for part in parts)
    assert [batch for turn in zip(*parts, strict=True) for batch in turn] == whole


def test_the_seed_decides():
    assert micro_batches(BUCKETS, 4, 5, 0, 80) == micro_batches(BUCKETS, 4, 5, 0, 80)
    assert micro_batches(BUCKETS, 4, 5, 0, 80) != micro_batches(BUCKETS, 4, 6, 0, 80)


def test_a_bucket_smaller_than_a_batch_waits_for_its_next_epochs():
    buckets = np.array([0] * 20 + [1], np.uint16)
    batches = micro_batches(buckets, 4, 0, 0, 4 * 63)
    lone = [number for number, batch in enumerate(batches) if batch[0][1] == 20]
    assert [row for _, row in batches[lone[0]]] == [20] * 4
    assert len(lone) == 3  # in 12 epochs, of 21 micro-batches in 4
    assert micro_batches(buckets, 4, 0, 4 * 15, 4 * 63) == batches[15:]


def test_what_cannot_be():
    with pytest.raises(ValueError, match="at least one"):
        ImageClock(0, 4, 0, 0, 8)
    with pytest.raises(ValueError, match="multiple of the batch, 4"):
        ImageClock(BUCKETS, 4, 0, 6, 80)
