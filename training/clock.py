"""Which image of a run shows which row: decided by the seed alone, so that a run can begin anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class ImageClock(Sampler[list[tuple[int, int]]]):
    """Batches of (image index, row). Image n shows row ``permutation(epoch)[n mod rows]``: each row once per epoch.

    Args:
        rows: how many there are.
        batch: rows in a micro-batch of one process.
        start, stop: image indices.
        rank, world: this process takes every ``world``-th micro-batch.
    """

    def __init__(self, rows: int, batch: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1):
        self.rows, self.batch, self.seed, self.start, self.stop = rows, batch, seed, start, stop
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return math.ceil((self.stop - self.start) / (self.batch * self.world))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for first in range(self.start, self.stop, self.batch * self.world):
            mine = []
            for n in range(first + self.rank * self.batch, first + (self.rank + 1) * self.batch):
                if n // self.rows != epoch:
                    epoch = n // self.rows
                    generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
                    order = torch.randperm(self.rows, generator=generator).tolist()
                mine.append((n, order[n % self.rows]))
            yield mine
