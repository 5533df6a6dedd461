"""Which image of a run shows which row: decided by the seed alone, so that a run can begin anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Sampler


class ImageClock(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (image index, row), each of rows of one bucket, each row once per epoch.

    An epoch walks through ``permutation(seed, epoch)`` of all rows. Every row joins the queue of its bucket, and a
    queue that holds ``batch`` rows is a micro-batch. What is left in the queues stays for the next epoch: no row is
    lost, none is doubled. So of n_b rows in bucket b, ⌊epoch · n_b / batch⌋ micro-batches are made before an epoch,
    and where to begin is arithmetic. In one bucket image n shows row ``permutation(n div rows)[n mod rows]``.

    Args:
        rows: how many there are, in one bucket; or (N,) the bucket of each.
        batch: rows in a micro-batch of one process.
        start, stop: image indices. With several buckets ``start`` must be a multiple of ``batch``.
        rank, world: this process takes every ``world``-th micro-batch.
    Raises:
        ValueError: no rows, or a start that no micro-batch begins at.
    """

    def __init__(
        self, rows: int | np.ndarray, batch: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1
    ):
        self.rows = rows if isinstance(rows, int) else len(rows)
        self.buckets = None if isinstance(rows, int) or (rows == rows[:1]).all() else np.asarray(rows)
        self.counts = np.array([self.rows]) if self.buckets is None else np.bincount(self.buckets)
        self.batch, self.seed, self.start, self.stop = batch, seed, start, stop
        self.rank, self.world = rank, world
        self.offset = start % batch  # where micro-batches begin; this many rows of epoch 0 belong to none
        if self.rows < 1:
            raise ValueError("rows: expected at least one")
        if self.offset and self.buckets is not None:
            raise ValueError(f"start {start}: with several buckets expected a multiple of the batch, {batch}")

    def __len__(self) -> int:
        return math.ceil((self.stop - self.start) / (self.batch * self.world))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        mine = islice(self._micro_batches(self.start // self.batch), self.rank, None, self.world)
        first = self.start + self.rank * self.batch
        for rows in islice(mine, len(self)):
            yield list(zip(range(first, first + self.batch), rows.tolist(), strict=True))
            first += self.batch * self.world

    def _micro_batches(self, number: int) -> Iterator[np.ndarray]:
        """Rows (batch,) of the micro-batch ``number`` and of all after it."""
        epoch, last = 0, 1
        while self._made_before(last) <= number:
            last *= 2
        while last - epoch > 1:  # made_before(epoch) <= number < made_before(last)
            middle = (epoch + last) // 2
            epoch, last = (middle, last) if self._made_before(middle) <= number else (epoch, middle)
        skip, queues = number - self._made_before(epoch), self._left_before(epoch)
        while True:
            made, queues = self._walk(epoch, queues)
            yield from made[skip:]
            epoch, skip = epoch + 1, 0

    def _seen_before(self, epoch: int) -> list[int]:
        """Rows of each bucket that micro-batches take before an epoch begins, made or queued."""
        return [max(0, epoch * int(n) - self.offset) for n in self.counts]

    def _made_before(self, epoch: int) -> int:
        return sum(n // self.batch for n in self._seen_before(epoch))

    def _left_before(self, epoch: int) -> list[np.ndarray]:
        """The queues as an epoch begins: the newest rows of the epochs before it."""
        wanted = [n % self.batch for n in self._seen_before(epoch)]
        queues = [np.empty(0, np.int64) for _ in wanted]
        while any(len(q) < n for q, n in zip(queues, wanted, strict=True)):
            epoch -= 1
            older = self._parted(epoch)[0]
            queues = [
                np.concatenate([rows, queue])[-n:] if len(queue) < n else queue
                for rows, queue, n in zip(older, queues, wanted, strict=True)
            ]
        return queues

    def _parted(self, epoch: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """An epoch's rows by bucket, in the order of its permutation, and their places in it."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.rows, generator=generator).numpy()  # (N,)
        if self.buckets is None:
            return [order], [np.arange(self.rows)]
        ids = self.buckets[order]
        places = np.split(np.argsort(ids, kind="stable"), np.cumsum(np.bincount(ids, minlength=len(self.counts)))[:-1])
        return [order[place] for place in places], places

    def _walk(self, epoch: int, queues: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """An epoch's micro-batches (M, batch) in the order in which they become full, and the queues after it."""
        made, when, left = [], [], []
        for rows, places, queue in zip(*self._parted(epoch), queues, strict=True):
            unused = min(max(0, self.offset - epoch * self.rows), len(rows))
            rows, places = np.concatenate([queue, rows[unused:]]), places[unused:]
            full = len(rows) // self.batch
            made.append(rows[: full * self.batch].reshape(full, self.batch))
            when.append(places[np.arange(1, full + 1) * self.batch - len(queue) - 1])
            left.append(rows[full * self.batch :])
        return np.concatenate(made)[np.argsort(np.concatenate(when))], left
