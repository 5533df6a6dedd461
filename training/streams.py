"""Rows in the order of their files, for data sets that are too large to be looked at beforehand."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset, get_worker_info

from ldm import rng

from .batches import Stream, to_unit
from .buckets import Shape, nearest, size_ids
from .captions import chosen
from .index import caption_texts, check_mask, shapes_of, threaded
from .pictures import decode, decode_mask, dimensions, one_line
from .schema import Data
from .shards import passes, shards, subset
from .tables import DataError, Table

log = logging.getLogger(__name__)

PATIENCE = 200  # rows that are looked at before a share of broken ones ends the run


@dataclass
class _Place:
    """Where a walk stands: the next row, and the rows that wait in their bucket's queue as (shard, row)."""

    epoch: int = 0
    turn: int = 0  # which of the epoch's passes
    row: int = 0
    images: int = 0
    queues: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


class RowStream(IterableDataset):
    """Micro-batches without end, the same for any number of processes and of a loader's workers.

    An epoch goes through all files, in an order that (seed, epoch) decides; rows keep their order within a file, and
    nothing is shuffled in memory. As with ``ImageClock`` each row joins its bucket's queue, and a full queue is a
    micro-batch. Every process walks the whole way, reads headers where there are buckets, and decodes its own share:
    of ``world`` processes with W workers each, every world·W-th micro-batch. A row whose header shows no picture is
    left out by all. One that turns out to be broken further in, or has no caption, is replaced by the next good one of
    its micro-batch. Both are counted and named.

    A batch: ``index``, ``row`` (B,) (file · 2³² + row in it), ``pictures`` (B, 3, H, W) in [-1, 1], ``captions``, a
    list of text; ``mask`` (B, 1, H/factor, W/factor) if the rows have masks; ``size_ids`` (B, 6) if asked for.

    Args:
        data: the section of the config.
        batch: rows in a micro-batch.
        rank, world: of this process; None: as the launcher says (RANK, WORLD_SIZE), else alone.
        split: the files of which split.
        factor: pixels per latent, for the masks.
        sizes: give SDXL's size conditions.
        buckets, step: as in ``data.open_rows``.
    Raises:
        DataError: files that cannot be streamed; more rows of no use than ``max_skipped`` allows; another data set
            than that of a state that is loaded.
    """

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        batch: int,
        rank: int | None = None,
        world: int | None = None,
        split: str = "train",
        factor: int = 8,
        sizes: bool = False,
        buckets: bool | None = None,
        step: int | None = None,
    ):
        self.data, self.seed, self.batch = data, seed, batch
        self.rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self.world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
        self.factor, self.sizes = factor, sizes
        self.shapes = shapes_of(data, buckets, step)
        self.shards = shards(data, split)
        self.passes = passes(self.shards)
        listed = [(s.file, s.place.repeats) for s in self.shards]
        about = f"{listed} {self.shapes} {data.center_crop} {batch} {seed}"
        self.fingerprint = hashlib.sha256(about.encode()).hexdigest()
        self.skipped: dict[str, str] = {}  # name -> reason, of those met by this process
        self.seen = 0
        self._place = _Place()

    def shared(self, rank: int, world: int, *, factor: int = 8, sizes: bool = False) -> RowStream:
        """The same stream for one of several processes, and for a task that knows its latents."""
        own = copy(self)
        own.rank, own.world, own.factor, own.sizes = rank, world, factor, sizes
        own.skipped, own.seen, own._place = {}, 0, _Place()
        return own

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: where the next batch begins."""
        p = self._place
        queues = {str(k): [list(x) for x in queue] for k, queue in p.queues.items() if queue}
        now = {"epoch": p.epoch, "turn": p.turn, "row": p.row, "images": p.images, "queues": queues}
        return {**now, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                "data: the files, buckets, batch size or seed are not those that the stream was saved with; train "
                "anew in another output_dir, or put them back"
            )
        queues = {int(k): [(int(a), int(b)) for a, b in queue] for k, queue in state["queues"].items()}
        self._place = _Place(state["epoch"], state["turn"], state["row"], state["images"], queues)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        mine, of = worker * self.world + self.rank, self.world * workers
        with closing(_Walk(self, mine, of)) as walk, ThreadPoolExecutor(1) as ahead:
            waiting = ahead.submit(walk.turn)
            while True:
                batch, place = waiting.result()
                waiting = ahead.submit(walk.turn)
                self._place = place
                yield batch

    def left_out(self, name: str, reason: str) -> None:
        """Count a row of no use."""
        if name not in self.skipped:
            self.skipped[name] = reason
            if len(self.skipped) <= 20:
                log.warning("%s: %s. It is skipped", name, reason)
        limit = self.data.max_skipped
        if self.seen >= PATIENCE and len(self.skipped) > limit * self.seen:
            named = "; ".join(f"{k}: {v}" for k, v in list(self.skipped.items())[:5])
            raise DataError(
                f"{len(self.skipped)} of {self.seen} rows are of no use: {named}. At most {limit:.1%} may be skipped "
                "(data.max_skipped); mend or remove them (nothing was deleted)"
            )


@dataclass
class _Row:
    """A row on its way, and what has been read of it."""

    shard: int
    row: int
    name: str = ""
    picture: bytes = b""
    texts: tuple[str, ...] = ()
    mask: bytes | None = None
    size: tuple[int, int] = (1, 1)
    fault: str | None = None


class _Walk:
    """One way through the files, from where the stream stands."""

    def __init__(self, stream: RowStream, mine: int, of: int):
        self.stream, self.mine, self.of = stream, mine, of
        p = stream._place
        self.place = _Place(p.epoch, p.turn, p.row, p.images, {})
        self.open: dict[int, Table] = {}
        self.queues = {
            k: [self._loaded(_Row(*at)) if self._looks else _Row(*at) for at in queue] for k, queue in p.queues.items()
        }
        self.rows = self._rows()

    def close(self) -> None:
        self.open.clear()

    @property
    def _looks(self) -> bool:
        return len(self.stream.shapes) > 1

    def turn(self) -> tuple[dict[str, Any], _Place]:
        """This process's next batch, and where the stream stands when all processes have had theirs."""
        batch: dict[str, Any] = {}
        for number in range(self.of):
            first, bucket, rows = self._micro_batch()
            if number == self.mine:
                batch = self._batch(first, self.stream.shapes[bucket], rows)
        p = self.place
        waiting = {k: [(r.shard, r.row) for r in queue] for k, queue in self.queues.items()}
        return batch, _Place(p.epoch, p.turn, p.row, p.images, waiting)

    def _micro_batch(self) -> tuple[int, int, list[_Row]]:
        """First image index, bucket and rows of the next micro-batch."""
        for bucket, row in self.rows:
            queue = self.queues.setdefault(bucket, [])
            queue.append(row)
            if len(queue) == self.stream.batch:
                self.queues[bucket] = []
                self.place.images += len(queue)
                return self.place.images - len(queue), bucket, queue
        raise AssertionError("a walk has no end")

    def _rows(self) -> Iterator[tuple[int, _Row]]:
        """All rows from here on with their buckets, epoch after epoch."""
        p, stream = self.place, self.stream
        for epoch in count(p.epoch):
            p.epoch, used = epoch, p.turn > 0 or p.row > 0
            generator = torch.Generator().manual_seed((stream.seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(len(stream.passes), generator=generator).tolist()
            for turn in range(p.turn, len(order)):
                p.turn = turn
                shard, share = stream.passes[order[turn]]
                rows = self._numbers(shard, share)
                for i in range(p.row, len(rows)):
                    p.row = i + 1
                    row = self._loaded(_Row(shard, int(rows[i]))) if self._looks else _Row(shard, int(rows[i]))
                    if (bucket := self._bucket(row)) is not None:
                        used = True
                        yield bucket, row
                p.row = 0
                self._forget()
            p.turn = 0
            if not used:
                raise DataError(f"{stream.shards[0].place.path}: no row of the stream is of use")

    def _numbers(self, shard: int, share: float) -> Any:
        rows = len(self._table(shard))
        return range(rows) if share == 1 else subset(rows, share, self.place.epoch)

    def _loaded(self, row: _Row) -> _Row:
        """Read all of a row while its file is at hand."""
        table = self._table(row.shard)
        row.name = table.name(row.row)
        try:
            row.picture = table.picture(row.row)
            row.size = dimensions(row.picture)
            row.mask = table.mask(row.row)
            row.texts = caption_texts(table, row.row, self.stream.data)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            row.fault = one_line(error)
        return row

    def _bucket(self, row: _Row) -> int | None:
        """None for a row of no use, where that shows before its pixels are decoded."""
        if not self._looks:
            return 0
        self.stream.seen += 1
        if row.fault is not None:
            self.stream.left_out(row.name, row.fault)
            return None
        return nearest(*row.size, self.stream.shapes)

    def _table(self, shard: int) -> Table:
        if shard not in self.open:
            self.open[shard] = self.stream.shards[shard].open(self.stream.data)
        return self.open[shard]

    def _forget(self) -> None:
        """Close the files that nothing waits for."""
        wanted = set() if self._looks else {r.shard for queue in self.queues.values() for r in queue}
        self.open = {k: v for k, v in self.open.items() if k in wanted}

    def _batch(self, first: int, shape: Shape, rows: list[_Row]) -> dict[str, Any]:
        stream, data, n = self.stream, self.stream.data, len(rows)
        if not self._looks:
            rows = [self._loaded(row) for row in rows]  # one after the other: a file is read from front to back
            stream.seen += n
        pixels, masks = np.zeros((n, 3, *shape), np.uint8), np.ones((n, 1, *shape), np.float32)

        def fill(i: int) -> None:
            row = rows[i]
            try:
                if row.fault is None:
                    pixels[i] = decode(row.picture, shape, data.center_crop)
                    if row.mask is not None:
                        check_mask(row.mask, row.size, verify=False)
                        masks[i] = decode_mask(row.mask, shape, data.center_crop)
            except (OSError, ValueError) as error:
                row.fault = one_line(error)

        threaded(fill, n)
        for row in rows:
            if row.fault is not None:
                stream.left_out(row.name, row.fault)
        good = [i for i in range(n) if rows[i].fault is None]
        if not good:
            raise DataError(f"{rows[0].name}: {rows[0].fault}; no row of this batch of {n} is of use")
        taken = [next((j for j in good if j >= i), good[-1]) for i in range(n)]
        index = torch.arange(first, first + n)
        batch: dict[str, Any] = {
            "index": index,
            "row": torch.tensor([rows[i].shard * 2**32 + rows[i].row for i in taken]),
            "pictures": to_unit(torch.from_numpy(pixels[taken])),
            "captions": chosen([rows[i].texts for i in taken], index, stream.seed, data),
        }
        if any(shard.place.mask_column for shard in stream.shards):
            batch["mask"] = F.avg_pool2d(torch.from_numpy(masks[taken]), stream.factor)
        if data.random_flip:
            mirrored = rng.uniform(stream.seed, index, (1, 1, 1), Stream.FLIP) < 0.5
            for key in ("pictures", "mask"):
                if key in batch:
                    batch[key] = torch.where(mirrored, batch[key].flip(-1), batch[key])
        if stream.sizes:
            heights, widths = np.array([rows[i].size for i in taken]).T
            batch["size_ids"] = torch.from_numpy(size_ids(heights, widths, shape, data.center_crop))
        return batch
