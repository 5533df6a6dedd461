"""Rows in the order of their files, for data sets that are too large to be looked at beforehand."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field, replace
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
    """Where a lane stands: its next row, and the rows that wait in their bucket's queue as (shard, row)."""

    epoch: int = 0
    turn: int = 0  # which of the lane's pieces in this epoch
    row: int = 0
    batches: int = 0  # micro-batches of this lane so far
    queues: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        queues = {str(k): [list(x) for x in queue] for k, queue in self.queues.items() if queue}
        return {**vars(self), "queues": queues}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> _Place:
        queues = {int(k): [(int(a), int(b)) for a, b in x] for k, x in state["queues"].items()}
        return cls(**{**state, "queues": queues})


@dataclass
class _Position:
    """Where a reader stands.

    Micro-batch ``k`` of the run comes from lane ``k % lanes``; of R readers, reader r takes every
    R-th one.
    """

    lanes: int | None = None  # how many; None: as many as there are readers when the run begins
    batches: int = 0  # micro-batches of the run up to and with this reader's last one
    readers: int | None = None  # R when ``next`` was set; None where several readers were merged
    next: int = 0  # this reader's next micro-batch
    places: dict[int, _Place] = field(default_factory=dict)  # of the lanes that this reader reads


class RowStream(IterableDataset):
    """Micro-batches without end, shared out among processes and a loader's workers by files.

    A reader is one worker of one process. There are as many *lanes* as the run had readers when it
    began, and a lane has files of its own: an epoch's files, in an order that (seed, epoch) decides,
    are dealt to the lanes like cards. (Where there are fewer files than lanes, files are cut into
    runs of rows.) In its lane each row joins its bucket's queue, and a full queue is a micro-batch.
    The run's micro-batches are those of the lanes in turns. So a reader opens the files of its own
    lane only, and all readers together read the data set once per epoch. Rows keep their order within
    a file; nothing is shuffled in memory. Lanes whose files are shorter begin their next epoch earlier.

    The number of lanes is part of the state. Another number of readers goes on with the same
    micro-batches; each then reads the lanes that its micro-batches come from.

    With buckets, a row whose header shows no picture or that has no caption is left out. One that turns
    out to be broken further in is replaced by the next good one of its micro-batch. Both are counted and
    named.

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
        lanes: how many; None: as many as there are readers when the run begins.
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
        lanes: int | None = None,
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
        self._position = _Position(lanes)

    def shared(self, rank: int, world: int, *, factor: int = 8, sizes: bool = False) -> RowStream:
        """The same stream for one of several processes, and for a task that knows its latents."""
        own = copy(self)
        own.rank, own.world, own.factor, own.sizes = rank, world, factor, sizes
        own.skipped, own.seen, own._position = {}, 0, _Position(self._position.lanes)
        return own

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: where this reader's next batch begins."""
        p = self._position
        lanes = {str(lane): place.to_json() for lane, place in sorted(p.places.items())}
        return {**vars(p), "places": lanes, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Go on from a reader's own state, or from the states of all readers, whose number may differ.

        Raises:
            DataError: a state of another data set, or of an earlier version of this package.
        """
        states = state if isinstance(state, list) else [state]
        if any("places" not in x for x in states):
            raise DataError(
                "data: the stream was saved by an earlier version, which read its files in another order; go on with "
                "that version, or train anew in another output_dir"
            )
        if any(x["fingerprint"] != self.fingerprint for x in states):
            raise DataError(
                "data: the files, buckets, batch size or seed are not those that the stream was saved with; train "
                "anew in another output_dir, or put them back"
            )
        parts = []
        for x in states:
            own = {k: v for k, v in x.items() if k != "fingerprint"}
            places = {int(lane): _Place.from_json(place) for lane, place in x["places"].items()}
            parts.append(_Position(**{**own, "places": places}))
        if not isinstance(state, list):
            self._position = parts[0]
            return
        lanes = next((x.lanes for x in parts if x.lanes is not None), self._position.lanes)
        merged = _Position(lanes, max(x.batches for x in parts))
        for part in parts:  # of a lane that several read, the furthest has seen all of its micro-batches
            for lane, place in part.places.items():
                if lane not in merged.places or place.batches > merged.places[lane].batches:
                    merged.places[lane] = place
        self._position = merged

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        mine, of = worker * self.world + self.rank, self.world * workers
        with closing(_Reader(self, mine, of)) as reader, ThreadPoolExecutor(1) as ahead:
            waiting = ahead.submit(reader.turn)
            while True:
                batch, position = waiting.result()
                waiting = ahead.submit(reader.turn)
                self._position = position
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


class _Reader:
    """Reader ``mine`` of ``readers``, from where the stream stands."""

    def __init__(self, stream: RowStream, mine: int, readers: int):
        p = stream._position
        self.stream, self.readers, self.open_lanes = stream, readers, dict[int, _Lane]()
        self.lanes = p.lanes or readers
        self.next = p.next if p.readers == readers else p.batches + mine
        common = math.gcd(self.lanes, readers)  # its micro-batches come from every so many-th lane
        own = range(self.next % common, self.lanes, common)
        self.places = {lane: p.places.get(lane, _Place()) for lane in own}

    def close(self) -> None:
        for lane in self.open_lanes.values():
            lane.close()
        self.open_lanes.clear()

    def turn(self) -> tuple[dict[str, Any], _Position]:
        """This reader's next batch, and where it stands after it."""
        number, self.next = self.next, self.next + self.readers
        index, due = number % self.lanes, number // self.lanes
        if index not in self.open_lanes:
            self.open_lanes[index] = _Lane(self.stream, index, self.lanes, self.places[index])
        lane = self.open_lanes[index]
        while lane.place.batches < due:  # those of other readers
            lane.micro_batch()
        bucket, rows = lane.micro_batch()
        batch = lane.batch(number * self.stream.batch, self.stream.shapes[bucket], rows)
        self.places = {**self.places, index: lane.position()}
        return batch, _Position(self.lanes, number + 1, self.readers, self.next, self.places)


class _Lane:
    """One way through a share of the files, from ``start``."""

    def __init__(self, stream: RowStream, index: int, lanes: int, start: _Place):
        self.stream, self.index, self.lanes = stream, index, lanes
        self.place = replace(start, queues={})
        self.parts = -(-lanes // len(stream.passes))  # that each pass through a file is cut into
        self.open: dict[int, Table] = {}
        self.queues = {
            k: [self._loaded(_Row(*at)) if self._looks else _Row(*at) for at in queue]
            for k, queue in start.queues.items()
        }
        self.rows = self._rows()

    def close(self) -> None:
        self.rows.close()
        self.queues.clear()
        self.open.clear()

    @property
    def _looks(self) -> bool:
        return len(self.stream.shapes) > 1

    def position(self) -> _Place:
        """Where the lane stands; what is yielded later does not change it."""
        waiting = {k: [(r.shard, r.row) for r in queue] for k, queue in self.queues.items()}
        return replace(self.place, queues=waiting)

    def micro_batch(self) -> tuple[int, list[_Row]]:
        """Bucket and rows of the next micro-batch."""
        for bucket, row in self.rows:
            queue = self.queues.setdefault(bucket, [])
            queue.append(row)
            if len(queue) == self.stream.batch:
                self.queues[bucket] = []
                self.place.batches += 1
                return bucket, queue
        raise AssertionError("a lane has no end")

    def _rows(self) -> Generator[tuple[int, _Row], None, None]:
        """All rows from here on with their buckets, epoch after epoch."""
        p, stream, idle = self.place, self.stream, 0
        for epoch in count(p.epoch):
            p.epoch, used = epoch, p.turn > 0 or p.row > 0
            own = self._pieces(epoch)
            for turn in range(p.turn, len(own)):
                p.turn = turn
                number, part = divmod(own[turn], self.parts)
                shard, share = stream.passes[number]
                rows = self._numbers(shard, share, part)
                if turn + 1 < len(own):
                    following = stream.passes[own[turn + 1] // self.parts][0]
                    stream.shards[following].prefetch(stream.data)
                for i in range(p.row, len(rows)):
                    p.row = i + 1
                    row = _Row(shard, int(rows[i]))
                    row = self._loaded(row) if self._looks else row
                    if (bucket := self._bucket(row)) is not None:
                        used = True
                        yield bucket, row
                p.row = 0
                self._forget()
            p.turn = 0
            idle = 0 if used else idle + 1
            if idle > 50 * (self.lanes - 1):  # one lane of many may miss the few rows by chance
                raise DataError(f"{stream.shards[0].place.path}: no row of the stream is of use")

    def _pieces(self, epoch: int) -> list[int]:
        """This lane's share of an epoch: pass · parts + part."""
        seed = (self.stream.seed * 1_000_003 + epoch) % 2**63
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.stream.passes) * self.parts, generator=generator)
        return order[self.index :: self.lanes].tolist()

    def _numbers(self, shard: int, share: float, part: int) -> Any:
        total = len(self._table(shard))
        rows = range(total) if share == 1 else subset(total, share, self.place.epoch)
        return rows[len(rows) * part // self.parts : len(rows) * (part + 1) // self.parts]

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

    def batch(self, first: int, shape: Shape, rows: list[_Row]) -> dict[str, Any]:
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
