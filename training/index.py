"""Every row is looked at once before any compute: what it is, how large, which bucket, and whether it is of use."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import buckets as bucketing
from .buckets import Shape, nearest
from .captions import variants
from .folders import plural
from .pictures import decode, decode_mask, dimensions, one_line
from .remembered import remembered
from .schema import Data
from .sources import Source, Split, open_split
from .tables import DataError, Table

log = logging.getLogger(__name__)

IN_MEMORY = 2**30  # bytes; a smaller source is held decoded
DECODED = 200_000  # rows; of a larger source only headers are read before the run, unless ``verify`` says otherwise
REMEMBERED = 50_000  # rows; what is found out about a larger source is kept on disk
SAME_SHAPE = 0.02  # a mask's aspect ratio may differ by this share from its picture's


@dataclass(frozen=True)
class Skipped:
    """A row that is left out, and why."""

    name: str
    reason: str


@dataclass
class Found:
    """What is known of N rows of one table: 34 bytes each.

    row: (N,) int64 in the table. content: (N,) void of 16 bytes, the digest of the encoded picture. size: (N, 2) int32,
    height and width as shown. bucket: (N,) uint16. decoded: (N, 3·area) uint8 where that was asked for.
    skipped: row in the table -> why it is left out.
    """

    row: np.ndarray
    content: np.ndarray
    size: np.ndarray
    bucket: np.ndarray
    decoded: np.ndarray | None
    skipped: dict[int, str]


def shapes_of(data: Data, buckets: bool | None = None, step: int | None = None) -> list[Shape]:
    """All shapes that a picture may take, from wide to tall; the square alone without buckets."""
    if not (data.buckets if buckets is None else buckets):
        return [(data.resolution, data.resolution)]
    step = data.bucket_step or step or bucketing.default_step(data.resolution)
    try:
        return bucketing.shapes(data.resolution, step, data.max_aspect_ratio)
    except ValueError as error:
        raise DataError(f"data.{error}") from error


@dataclass
class Looked:
    """All places of one split; ``total`` rows were looked at, and ``verified`` says that they were decoded."""

    shapes: list[Shape]
    places: list[Source]
    tables: list[Table]
    found: list[Found]
    total: int
    verified: bool

    @property
    def skipped(self) -> list[Skipped]:
        pairs = zip(self.tables, self.found, strict=True)
        return [Skipped(t.name(row), why) for t, part in pairs for row, why in sorted(part.skipped.items())]


def look_at(data: Data, split: Split, shapes: list[Shape], in_memory: int = IN_MEMORY, hold: bool = True) -> Looked:
    """Open the sources of a data set and look at all rows of a split.

    Args:
        hold: keep the decoded pictures where they are at most ``in_memory`` bytes.
    Raises:
        DataError: a source that cannot be used. How many rows are of use is for the caller to judge.
    """
    if data.streaming:
        chosen = _streamed(data, split)
    else:
        chosen = [(place, *_rows_of(place, data, split, in_memory)) for place in data.places]
    total = sum(len(rows) for _, _, rows in chosen)
    held = hold and total * 3 * data.resolution**2 <= in_memory
    verify = held or (total <= DECODED if data.verify is None else data.verify)
    if not verify:
        log.log(
            logging.INFO if data.verify is False else logging.WARNING,
            "%s: of %d pictures only the headers are looked at now (data.verify: true decodes all of them first)",
            ", ".join(place.path for place in data.places), total,
        )  # fmt: skip
    found = [
        look(table, rows, data, shapes, verify=verify, held=True) if held else _known(table, rows, data, shapes, verify)
        for _, table, rows in chosen
    ]
    return Looked(shapes, [x[0] for x in chosen], [x[1] for x in chosen], found, total, verify)


def counts(data: Data, split: Split) -> list[int]:
    """Rows of each place in a split, whether they are of use or not. Raises DataError as ``look_at`` does."""
    return [len(_rows_of(place, data, split, IN_MEMORY)[1]) for place in data.places]


def _rows_of(place: Source, data: Data, split: Split, in_memory: int) -> tuple[Table, np.ndarray]:
    table, rows, alone = open_split(place, data, split, in_memory)
    table.caption_of_all, table.loss_weight = place.instance_prompt, place.loss_weight
    if alone:
        if len(rows) < REMEMBERED or table.key(int(rows[0])) is not None:
            keys = keys_of(table, rows)
        else:  # by the content: all of it is read
            about = f"keys {table.source} {table.state()} {digest_of(rows.tobytes()).hex()} {place}"
            keys = remembered(about, lambda: {"keys": keys_of(table, rows).view("u1")})["keys"].view("V16")
        rows = rows[held_out(keys, data.held_out, split, place.path)]
    return table, rows


def _known(table: Table, rows: np.ndarray, data: Data, shapes: list[Shape], verify: bool) -> Found:
    """``look`` without pictures, from disk where a large source was looked at before."""
    if len(rows) < REMEMBERED:
        return look(table, rows, data, shapes, verify=verify, held=False)

    def make() -> dict[str, np.ndarray]:
        found = look(table, rows, data, shapes, verify=verify, held=False)
        skipped = json.dumps(sorted(found.skipped.items())).encode()
        arrays = {"row": found.row, "content": found.content.view("u1"), "size": found.size, "bucket": found.bucket}
        return {**arrays, "skipped": np.frombuffer(skipped, np.uint8)}

    captions = f"{data.split_captions_at!r} {table.about_captions!r}"
    if data.caption_lines != "all":
        captions += f" {data.caption_lines!r}"
    about = (
        f"{table.source} {table.state()} {digest_of(rows.tobytes()).hex()} {shapes} {verify} {captions} {data.places}"
    )
    kept = remembered(about, make)
    skipped = {int(row): why for row, why in json.loads(kept["skipped"].tobytes())}
    return Found(kept["row"], kept["content"].view("V16"), kept["size"], kept["bucket"], None, skipped)


def _streamed(data: Data, split: Split) -> list[tuple[Source, Table, np.ndarray]]:
    """The held-out files of a stream are rows as others are."""
    from .shards import shards

    if split == "train":
        raise DataError("data.streaming: the rows that train are read by streams.RowStream, not by number")
    opened = [(shard.place, shard.open(data)) for shard in shards(data, split)]
    return [(place, table, np.arange(len(table))) for place, table in opened]


def look(table: Table, rows: np.ndarray, data: Data, shapes: Sequence[Shape], *, verify: bool, held: bool) -> Found:
    """Read the captions, headers and, where ``verify`` says so, the pixels of some rows of a table."""
    n = len(rows)
    content, size, bucket = np.zeros(n, "V16"), np.zeros((n, 2), np.int32), np.zeros(n, np.uint16)
    area = max(h * w for h, w in shapes)
    decoded = np.zeros((n, 3 * area), np.uint8) if held else None
    skipped: dict[int, str] = {}

    def one(place: int) -> None:
        row = int(rows[place])
        try:
            caption_texts(table, row, data)
            encoded = table.picture(row)
            content[place] = digest_of(encoded)
            size[place] = height, width = dimensions(encoded)
            bucket[place] = nearest(height, width, shapes)
            shape = shapes[bucket[place]]
            if decoded is not None:
                decoded[place, : 3 * shape[0] * shape[1]] = decode(encoded, shape, data.center_crop).ravel()
            elif verify:
                decode(encoded, shape, data.center_crop)
            mask = table.mask(row)
            if mask is not None:
                check_mask(mask, (height, width), verify)
        except (OSError, ValueError) as error:
            skipped[row] = one_line(error)

    threaded(one, n)
    good = np.array([int(row) not in skipped for row in rows], bool) if skipped else slice(None)
    return Found(
        rows[good], content[good], size[good], bucket[good], None if decoded is None else decoded[good], skipped
    )


def caption_texts(table: Table, row: int, data: Data) -> tuple[str, ...]:
    """All captions of a row. Raises ValueError saying what is wrong with them."""
    if table.captions is None:
        return (table.caption_of_all or data.instance_prompt or "",)
    raw = table.caption(row)
    try:
        if raw is None and table.caption_files:
            raise ValueError("is missing")
        return variants(raw, data)
    except ValueError as error:
        raise ValueError(f"its caption ({table.about_captions}) {error}") from error


def check_mask(mask: bytes, size: tuple[int, int], verify: bool) -> None:
    """Raises ValueError where a mask is of another shape than its picture, or does not decode."""
    try:
        height, width = dimensions(mask)
        if verify:
            decode_mask(mask, (8, 8))
    except ValueError as error:
        raise ValueError(f"its mask {error}") from error
    if abs(height * size[1] / (width * size[0]) - 1) > SAME_SHAPE:
        raise ValueError(f"its mask is {width} × {height}, of another shape than the picture, {size[1]} × {size[0]}")


def held_out(keys: np.ndarray, share: float, split: Split, source: str) -> np.ndarray:
    """The rows of a split by their keys, which are evenly spread: equal keys go the same way, and the order plays no
    part. With a share of 0 both splits are all rows: every picture is trained on, and measured on too."""
    if share == 0:
        return np.arange(len(keys))
    order = keys.view(">u8")[::2]  # (N,) the first half of each
    test = (order < share * 2**64) | (order == order.min())  # one at least is held out
    if test.all():
        raise DataError(
            f"{source}: {plural(len(order), 'row is', 'rows are')} too few to hold one out; add rows, or set "
            "data.held_out: 0"
        )
    return np.flatnonzero(test == (split == "test"))


def keys_of(table: Table, rows: np.ndarray) -> np.ndarray:
    """(N,) void of 16 bytes: a digest of what decides the split of each row, its name, or its content without one."""
    keys = np.zeros(len(rows), "V16")

    def one(place: int) -> None:
        row = int(rows[place])
        try:
            key = table.key(row)
            keys[place] = digest_of(table.picture(row) if key is None else key)
        except (OSError, ValueError):
            pass  # a row without a picture is counted later

    threaded(one, len(rows))
    return keys


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def threaded(work: Callable[[int], None], n: int) -> None:
    """``work`` of 0 to n - 1 on all cores: Pillow decodes and resizes, and hashlib hashes, outside the interpreter's
    lock."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = max(1, min(64, n // (4 * threads)))

    def some(first: int) -> None:
        for i in range(first, min(first + each, n)):
            work(i)

    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `header` looks at the size itself
        for first in range(0, n, 4096 * each):  # a million futures at once would be a gigabyte
            for done in [pool.submit(some, i) for i in range(first, min(first + 4096 * each, n), each)]:
                done.result()
