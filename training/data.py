"""Sources -> rows: pictures and captions by number, each picture in the shape of its bucket.

Everything is looked at before any compute. A row whose picture or caption is of no use is skipped, counted and named;
more than a small share of them refuses the data set. Nothing of the user's is written or deleted. Of a row 36 bytes
stay in memory: captions and pictures are read when they are asked for, small data sets excepted, whose decoded
pictures are held.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import buckets as bucketing
from .buckets import Shape
from .index import IN_MEMORY, Looked, Skipped, caption_texts, digest_of, look_at, shapes_of, threaded
from .pictures import decode, decode_mask, one_line
from .schema import Data
from .sources import Split
from .tables import DataError, Lazy, Table

__all__ = ["DataError", "Lazy", "Rows", "Skipped", "check_rows", "open_rows"]

log = logging.getLogger(__name__)

GREY = 127  # stands for a picture that was not looked at beforehand and is broken


class Rows(Dataset):
    """Pictures and captions by number, made by ``open_rows``.

    Args:
        data: the section that they were opened by.
        shapes: (H, W) of the buckets that hold a row.
        tables: where the rows are.
        table, row: (N,) which table, and which row of it.
        digests: (N,) void of 16 bytes: the pictures' content.
        sizes: (N, 2) height and width of the pictures as they are.
        bucket: (N,) uint16, which of ``shapes``.
        decoded: (N, 3·H·W of the largest) uint8, or None.
        skipped: the rows that were left out.
        verified: every picture was decoded once.

    Attributes:
        texts: of each row all its captions, in all templates, read from the source when asked for.
        captions: the first of each.
    """

    def __init__(
        self,
        data: Data,
        shapes: list[Shape],
        tables: list[Table],
        table: np.ndarray,
        row: np.ndarray,
        digests: np.ndarray,
        sizes: np.ndarray,
        bucket: np.ndarray,
        decoded: Tensor | None,
        skipped: list[Skipped],
        verified: bool = True,
    ):
        self.data, self.shapes, self.bucket, self.sizes, self.skipped = data, shapes, bucket, sizes, skipped
        self.resolution, self.center_crop = data.resolution, data.center_crop
        self.source = ", ".join(dict.fromkeys(t.source for t in tables))
        self._tables, self._table, self._row = tables, table, row
        self._digests, self._decoded = digests, decoded
        self._fingerprint: str | None = None
        self._verified, self.broken = verified, set[int]()
        self._loss_weights = np.array([t.loss_weight for t in tables], np.float32)
        self.texts: Sequence[tuple[str, ...]] = Lazy(len(row), self._texts)
        self.captions: Sequence[str] = Lazy(len(row), self._first_texts)

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"picture": self.pictures([index])[0], "caption": self.captions[index], "index": index}

    def head(self, count: int) -> Rows:
        """The first so many rows."""
        if count >= len(self):
            return self
        held = None if self._decoded is None else self._decoded[:count]
        table, row, digests = self._table[:count], self._row[:count], self._digests[:count]
        sizes, bucket = self.sizes[:count], self.bucket[:count]
        return Rows(self.data, self.shapes, self._tables, table, row, digests, sizes, bucket, held, [], self._verified)

    def name(self, index: int) -> str:
        """The file or row, for messages."""
        table, row = self._at(index)
        return table.name(row)

    def encoded(self, index: int) -> bytes:
        """The picture's bytes as they are in the source."""
        table, row = self._at(index)
        return table.picture(row)

    def shape(self, indices: Sequence[int]) -> Shape:
        """Height and width of these rows' pictures. Raises ValueError where they are of several buckets."""
        found = np.unique(self.bucket[np.asarray(indices)])
        if len(found) != 1:
            raise ValueError(f"rows {list(indices)[:8]} are of {len(found)} buckets; a batch is of one")
        return self.shapes[found[0]]

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """uint8 (B, 3, H, W) of rows of one bucket.

        A picture that does not decode is grey, named and counted, where only its header was looked at before.

        Raises:
            DataError: naming a row that no longer decodes; or more than ``max_skipped`` of the rows are grey.
        """
        height, width = self.shape(indices)
        if self._decoded is not None:
            flat = self._decoded[torch.as_tensor(indices, dtype=torch.int64), : 3 * height * width]
            return flat.view(-1, 3, height, width)
        out = np.empty((len(indices), 3, height, width), np.uint8)

        def fill(place: int) -> None:
            index = indices[place]
            try:
                with self._named(index):
                    out[place] = decode(self.encoded(index), (height, width), self.center_crop)
            except DataError as error:
                if self._verified:
                    raise
                out[place] = GREY
                self._count_broken(index, error)

        threaded(fill, len(indices))
        return torch.from_numpy(out)

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        """float32 (B, 1, H, W) in [0, 1], cut as the pictures are; 1 for a row without one. None: no masks asked for.

        Raises:
            DataError: a mask no longer decodes.
        """
        if all(table.masks is None for table in self._tables):
            return None
        height, width = self.shape(indices)
        out = np.ones((len(indices), 1, height, width), np.float32)

        def fill(place: int) -> None:
            with self._named(indices[place]):
                table, row = self._at(indices[place])
                mask = table.mask(row)
                if mask is not None:
                    out[place] = decode_mask(mask, (height, width), self.center_crop)

        threaded(fill, len(indices))
        return torch.from_numpy(out)

    def size_ids(self, indices: Sequence[int]) -> Tensor:
        """float32 (B, 6): SDXL's original height and width, top and left of the crop, target height and width."""
        heights, widths = self.sizes[np.asarray(indices)].T
        ids = bucketing.size_ids(heights, widths, self.shape(indices), self.center_crop)
        return torch.from_numpy(ids)

    def loss_weights(self, indices: Sequence[int]) -> Tensor | None:
        """float32 (B,): what each row counts in the loss, by its source. None: all rows of the data set count 1."""
        if (self._loss_weights == 1).all():
            return None
        return torch.from_numpy(self._loss_weights[self._table[np.asarray(indices)]])

    def digest(self, index: int) -> bytes:
        """16 bytes that change with the picture's content and with how it is cut."""
        height, width = self.shapes[self.bucket[index]]
        return digest_of(self._digests[index].tobytes() + f"{height}x{width} {self.center_crop}".encode())

    def content(self) -> np.ndarray:
        """(N,) void of 16 bytes: equal where the encoded pictures are."""
        return self._digests

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what the rows hold: the pictures, how they are cut, what they count, their masks and
        all their captions."""
        if self._fingerprint is None:
            total = hashlib.sha256(f"{self.shapes} {self.center_crop}".encode())
            total.update(self._digests.tobytes() + self.bucket.tobytes())
            if (weights := self.loss_weights(range(len(self)))) is not None:
                total.update(weights.numpy().tobytes())
            if any(table.masks is not None for table in self._tables):
                for i in range(len(self)):
                    total.update(self.mask_digest(i))
            for texts in self.texts:
                total.update(digest_of("\0".join(texts).encode("utf-8", "surrogatepass")))
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def mask_digest(self, index: int) -> bytes:
        """16 bytes that change with the mask's content and with how it is cut; of a row without one too."""
        (height, width), (table, row) = self.shapes[self.bucket[index]], self._at(index)
        with self._named(index):
            mask = table.mask(row)
        return digest_of((b"none" if mask is None else mask) + f"{height}x{width} {self.center_crop}".encode())

    def _at(self, index: int) -> tuple[Table, int]:
        return self._tables[self._table[index]], int(self._row[index])

    def _texts(self, indices: Sequence[int]) -> list[tuple[str, ...]]:
        found = []
        for index in indices:
            table, row = self._at(index)
            with self._named(index):
                found.append(caption_texts(table, row, self.data))
        return found

    def _first_texts(self, indices: Sequence[int]) -> list[str]:
        return [texts[0] for texts in self._texts(indices)]

    def _count_broken(self, index: int, error: DataError) -> None:
        if index in self.broken:
            return
        self.broken.add(index)
        log.warning("%s. Until then a grey picture stands for it", error)
        if len(self.broken) > self.data.max_skipped * len(self):
            raise DataError(
                f"{error}. It is the {len(self.broken)}th such one, of {len(self)} rows; at most "
                f"{self.data.max_skipped:.1%} may be broken (data.verify: true finds all of them first)"
            )

    def _named(self, index: int) -> _Named:
        return _Named(lambda: self.name(index))


class _Named:
    """Errors within it bear the row's name."""

    def __init__(self, name: Callable[[], str]):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError):
            raise DataError(f"{self.name()}: {one_line(error)}; mend or remove it") from error


def open_rows(
    data: Data | str | Path | None = None,
    *,
    split: Split = "train",
    buckets: bool | None = None,
    step: int | None = None,
    in_memory: int = IN_MEMORY,
    **keys: Any,
) -> Rows:
    """Open one split of a data set and look at all of its rows.

    A folder's splits are its subfolders ``train`` and ``test`` (or ``validation``), a parquet or tar file's its name's
    beginning. In a source with one split, a hash of each row's name (of its content, where it has none) holds
    out the share ``held_out``, at least one row: the two splits never meet, and do not depend on the order.

    Args:
        data: the section of a config; or a path, or nothing, with the section's keys as keyword arguments; buckets are
            off then unless they say otherwise.
        buckets: False where the task takes squares alone; None: as the section says.
        step: what a bucket's sides must be multiples of, where the section leaves ``bucket_step`` open. None: the
            largest power of two that divides the resolution, up to 64.
        in_memory: up to this many bytes of decoded pictures are kept in memory.

    Raises:
        DataError: nothing there, nothing in it, a missing column or split, more unusable rows than allowed.
    """
    if not isinstance(data, Data):
        data = _section({"buckets": False, **({} if data is None else {"path": str(data)}), **keys})
    if split not in ("train", "test"):
        raise DataError(f"split: expected 'train' or 'test', got {split!r}")
    looked = look_at(data, split, shapes_of(data, buckets, step), in_memory)
    where = f"{', '.join(place.path for place in data.places)}, split {split!r}"
    _check_skipped(looked.skipped, looked.total, data.max_skipped, where)
    return together(data, looked, split)


def check_rows(rows: Rows, limit: int = 1000) -> dict[str, Any]:
    """What ``ldm check`` tells about rows, from at most ``limit`` of them.

    Returns ``rows``, ``skipped``, ``captions`` (different ones among those looked at), ``longest_caption`` (words),
    ``looked_at``, ``smallest`` and ``largest`` (width, height), ``enlarged``: how many have fewer pixels than they
    are scaled to, ``buckets``: rows by "W×H", ``cropped``: the mean share of the pictures' area that is cut off.
    """
    some = range(0, len(rows), max(1, -(-len(rows) // limit)))
    captions = {text for i in some for text in rows.texts[i]}
    sizes = [(int(w), int(h)) for h, w in rows.sizes[some.start : some.stop : some.step]]
    counts = np.bincount(rows.bucket, minlength=len(rows.shapes))
    shapes = [rows.shapes[b] for b in rows.bucket[list(some)]]
    scale = [max(a / h, b / w) for (w, h), (a, b) in zip(sizes, shapes, strict=True)]
    return {
        "rows": len(rows),
        "skipped": len(rows.skipped),
        "captions": len(captions),
        "longest_caption": max(len(caption.split()) for caption in captions),
        "looked_at": len(sizes),
        "smallest": min(sizes, key=lambda x: x[0] * x[1]),
        "largest": max(sizes, key=lambda x: x[0] * x[1]),
        "enlarged": sum(x > 1 for x in scale),
        "buckets": {f"{w}×{h}": int(n) for (h, w), n in zip(rows.shapes, counts, strict=True)},
        "cropped": float(np.mean(crop_shares(rows))),
    }


def crop_shares(rows: Rows) -> np.ndarray:
    """(N,) share of each picture's area that is cut off; zeros where pictures are squeezed."""
    shares = np.zeros(len(rows))
    for number, shape in enumerate(rows.shapes if rows.center_crop else []):
        own = rows.bucket == number
        heights, widths = rows.sizes[own].T
        shares[own] = bucketing.cropped(heights, widths, shape)
    return shares


def _section(keys: dict[str, Any]) -> Data:
    from pydantic import ValidationError

    try:
        return Data(**{**keys, "path": keys.get("path") and str(keys["path"])})
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}") from error


def together(data: Data, looked: Looked, split: Split) -> Rows:
    """One table after the other, each row as often as its source says, in the buckets that hold any."""
    repeats = [place.repeats if split == "train" else 1.0 for place in looked.places]
    order = [repeated(part.content, times) for part, times in zip(looked.found, repeats, strict=True)]
    table = np.concatenate([np.full(len(own), i, np.uint16) for i, own in enumerate(order)])

    def all_of(field: str) -> np.ndarray:
        parts = zip((getattr(part, field) for part in looked.found), order, repeats, strict=True)
        return np.concatenate([x if times == 1 else x[own] for x, own, times in parts])

    used, bucket = np.unique(all_of("bucket"), return_inverse=True)
    if not len(bucket):
        raise DataError(f"{looked.tables[0].source}: no rows are left; raise repeats")
    return Rows(
        data,
        [looked.shapes[i] for i in used],
        looked.tables,
        table,
        all_of("row"),
        all_of("content"),
        all_of("size"),
        bucket.astype(np.uint16),
        None if looked.found[0].decoded is None else torch.from_numpy(all_of("decoded")),
        looked.skipped,
        looked.verified,
    )


def repeated(content: np.ndarray, times: float) -> np.ndarray:
    """Indices in which each of N rows stands ⌊times⌋ times, and round(N · the rest) of them once more.

    Those are the rows with the least content digests: a choice that looks random and does not depend on the order.
    """
    whole, rest = divmod(times, 1)
    indices = np.tile(np.arange(len(content)), int(whole))
    if extra := round(len(content) * rest):
        least = np.argsort(content.view("S16"), kind="stable")[:extra]
        indices = np.concatenate([indices, np.sort(least)])
    return indices


def _check_skipped(skipped: list[Skipped], total: int, limit: float, where: str) -> None:
    if not skipped:
        return
    named = "; ".join(f"{x.name}: {x.reason}" for x in skipped[:5]) + ("; …" if len(skipped) > 5 else "")
    rows = "row is" if total == 1 else "rows are"
    message = f"{where}: {len(skipped)} of {total} {rows} of no use: {named}"
    if len(skipped) == total or len(skipped) > limit * total:
        allowed = f"At most {limit:.1%} may be skipped (data.max_skipped)"
        raise DataError(f"{message}. {allowed}; mend or remove them (nothing was deleted)")
    log.warning("%s. They are skipped", message)
