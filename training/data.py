"""Sources -> rows: an imagefolder, parquet files or a hub data set as pictures of one size with their captions.

Everything is looked at before any compute. A row whose picture or caption is of no use is skipped, counted and named;
more than a small share of them refuses the data set. Nothing of the user's is written or deleted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .pictures import decode, header, one_line
from .sources import DataError, Split, check_columns, in_split, pick, pictures_in, read, tables

log = logging.getLogger(__name__)

IN_MEMORY = 2**30  # bytes; a smaller source is held decoded


@dataclass(frozen=True)
class Skipped:
    """A row that is left out, and why."""

    name: str
    reason: str


class Rows(Dataset):
    """Pictures and captions by number, made by ``open_rows``.

    ``captions[i]`` belongs to ``pictures([i])``; ``skipped`` are the rows that were left out. An item is
    ``{"picture": uint8 (3, R, R), "caption": str, "index": int}``.
    """

    def __init__(
        self,
        source: str,
        names: Sequence[str],
        values: Sequence[Any],
        captions: list[str],
        digests: Sequence[bytes],
        decoded: Tensor | None,
        resolution: int,
        center_crop: bool,
        skipped: list[Skipped],
    ):
        self.source, self.captions, self.skipped = source, captions, skipped
        self.resolution, self.center_crop = resolution, center_crop
        self._names, self._values, self._digests, self._decoded = names, values, digests, decoded
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"picture": self.pictures([index])[0], "caption": self.captions[index], "index": index}

    def name(self, index: int) -> str:
        """The file or row, for messages."""
        return self._names[index]

    def encoded(self, index: int) -> bytes:
        """The picture's bytes as they are in the source."""
        return _bytes(self._values[index])

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """uint8 (B, 3, R, R). Raises DataError naming the row where a picture no longer decodes."""
        if self._decoded is not None:
            return self._decoded[torch.as_tensor(indices, dtype=torch.int64)]
        out = torch.empty(len(indices), 3, self.resolution, self.resolution, dtype=torch.uint8)

        def fill(job: tuple[int, int]) -> None:
            place, index = job
            try:
                picture = decode(self.encoded(index), self.resolution, self.center_crop)
            except (OSError, ValueError) as error:
                raise DataError(f"{self.name(index)}: {one_line(error)}; mend or remove it") from error
            out[place] = torch.from_numpy(picture)

        _threaded(fill, enumerate(indices))
        return out

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what the rows hold: the bytes of the pictures, how they are cut, and the captions."""
        if self._fingerprint is None:
            total = hashlib.sha256(f"{self.resolution} {self.center_crop}".encode())
            for digest, caption in zip(self._digests, self.captions, strict=True):
                total.update(digest + _digest(caption.encode("utf-8", "surrogatepass")))
            self._fingerprint = total.hexdigest()
        return self._fingerprint


def open_rows(
    path: str | Path,
    *,
    resolution: int,
    split: Split = "train",
    image_column: str = "image",
    caption_column: str | None = "text",
    center_crop: bool = True,
    held_out: float = 0.05,
    max_skipped: float = 0.01,
    verify: bool = True,
    in_memory: int = IN_MEMORY,
) -> Rows:
    """Open one split of a data set through ``datasets``, and look at all of its rows.

    A folder's splits are its subfolders ``train`` and ``test`` (or ``validation``), a parquet file's its name's
    beginning. In a source with one split, a hash of each row's file name (of its bytes, where it has none) holds
    out the share ``held_out``, at least one row: the two splits never meet, and do not depend on the order.

    Args:
        path: imagefolder, folder of parquet files, parquet file, or ``hub:owner/name``.
        resolution: side of the pictures, in pixels.
        caption_column: None where no captions are wanted; all are empty then.
        center_crop: scale the shorter side and cut the middle square; False squeezes the whole picture.
        held_out: share of the rows, in (0, 1).
        max_skipped: the largest share of rows that may be skipped.
        verify: decode every picture now. Without it only headers are read, and a picture that is broken
            further in raises where it is met.
        in_memory: up to this many bytes of decoded pictures are kept in memory.

    Raises:
        DataError: nothing there, nothing in it, a missing column or split, more unusable rows than allowed.
    """
    if resolution < 1:
        raise DataError(f"resolution: expected at least 1 pixel, got {resolution}")
    if not 0 < held_out < 1:
        raise DataError(f"held_out: expected a share between 0 and 1, got {held_out}")
    if split not in ("train", "test"):
        raise DataError(f"split: expected 'train' or 'test', got {split!r}")
    source = str(path)
    parts = tables(source, in_memory)
    part, alone = pick(parts, split, source)
    table = parts[part]
    check_columns(table.features, image_column, caption_column, source)
    values, texts = read(table, image_column, caption_column, source)
    root = str(Path(source).expanduser().resolve())
    paths = [value["path"] if _is_file(value) else None for value in values]
    here = in_split(root, paths, part)
    if not here:
        raise DataError(f"{source}: the data set has no rows in its split {part!r}")
    texts = [""] * len(values) if texts is None else texts
    if len(here) < len(values):
        values, texts, paths = _Chosen(values, here), _Chosen(texts, here), [paths[i] for i in here]
    if caption_column is not None:
        _warn_of_unnamed([path for path in paths if path])

    names = [path or f"{source}, row {i}" for i, path in enumerate(paths)]
    chosen: Sequence[int] = range(len(values))
    if alone:
        chosen = _held_out(_keys(root, paths, values), held_out, split, source)
    skipped: dict[int, str] = {}
    for i in chosen if caption_column is not None else ():
        if not isinstance(texts[i], str) or not texts[i].strip():
            found = "is empty" if texts[i] is None or isinstance(texts[i], str) else f"is {texts[i]!r}, not text"
            skipped[i] = f"its caption (column {caption_column!r}) {found}"

    held = len(chosen) * 3 * resolution**2 <= in_memory
    decoded = torch.empty(len(chosen), 3, resolution, resolution, dtype=torch.uint8) if held else None
    digests: dict[int, bytes] = {}

    def look(job: tuple[int, int]) -> None:
        place, i = job
        try:
            data = _bytes(values[i])
            digests[i] = _digest(data)
            if decoded is not None:
                decoded[place] = torch.from_numpy(decode(data, resolution, center_crop))
            elif verify:
                decode(data, resolution, center_crop)
            else:
                header(data).close()
        except (OSError, ValueError) as error:
            skipped[i] = one_line(error)

    _threaded(look, enumerate(chosen))
    kept = [place for place, i in enumerate(chosen) if i not in skipped]
    left_out = [Skipped(names[i], skipped[i]) for i in sorted(skipped)]
    _check_skipped(left_out, len(chosen), max_skipped, f"{source}, split {split!r}")
    rows = [chosen[place] for place in kept]
    if decoded is not None and len(kept) < len(chosen):
        decoded = decoded[kept]
    return Rows(
        source,
        [names[i] for i in rows],
        values if len(rows) == len(values) else _Chosen(values, rows),
        [texts[i].strip() for i in rows],
        [digests[i] for i in rows],
        decoded,
        resolution,
        center_crop,
        left_out,
    )


def check_rows(rows: Rows, limit: int = 1000) -> dict[str, Any]:
    """What ``ldm check`` tells about rows, from the headers of at most ``limit`` pictures.

    Returns ``rows``, ``skipped``, ``captions`` (different ones), ``longest_caption`` (words), ``looked_at``,
    ``smallest`` and ``largest`` (width, height), ``enlarged``: how many have a side below the resolution.
    """
    step = max(1, -(-len(rows) // limit))

    def size(i: int) -> tuple[int, int]:
        with header(rows.encoded(i)) as picture:
            return picture.size

    sizes = _threaded(size, range(0, len(rows), step))
    return {
        "rows": len(rows),
        "skipped": len(rows.skipped),
        "captions": len(set(rows.captions)),
        "longest_caption": max(len(caption.split()) for caption in rows.captions),
        "looked_at": len(sizes),
        "smallest": min(sizes, key=lambda x: x[0] * x[1]),
        "largest": max(sizes, key=lambda x: x[0] * x[1]),
        "enlarged": sum(min(x) < rows.resolution for x in sizes),
    }


class _Chosen(Sequence):
    """Some rows of a column."""

    def __init__(self, values: Sequence[Any], rows: Sequence[int]):
        self.values, self.rows = values, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.values[self.rows[index]]


def _held_out(keys: list[bytes], share: float, split: Split, source: str) -> list[int]:
    """The rows of a split by the hash of their keys; equal keys go the same way."""
    order = [_digest(key) for key in keys]
    limit = min(order)  # one at least is held out
    test = {i for i, x in enumerate(order) if x == limit or int.from_bytes(x[:8], "big") < share * 2**64}
    if len(test) == len(order):
        raise DataError(f"{source}: {len(order)} row(s) are too few to hold one out; add rows")
    return [i for i in range(len(order)) if (i in test) == (split == "test")]


def _keys(root: str, paths: Sequence[str | None], values: Sequence[Any]) -> list[bytes]:
    """What decides the split of a row: where its file lies below the root, or the picture's bytes."""
    named = [Path(os.path.relpath(path, root)).as_posix().encode() if path else None for path in paths]
    return [key or _maybe_bytes(values[i]) for i, key in enumerate(named)]


def _maybe_bytes(value: Any) -> bytes:
    """A row without a picture is counted later."""
    try:
        return _bytes(value)
    except (OSError, ValueError):
        return b""


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and value.get("bytes") is None and bool(value.get("path"))


def _bytes(value: Any) -> bytes:
    """What a column of pictures holds -> encoded bytes. Raises ValueError or OSError."""
    if _is_file(value):
        return Path(value["path"]).read_bytes()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError("holds no picture")
    return data


def _warn_of_unnamed(paths: Sequence[str]) -> None:
    """Pictures that no row of the metadata names are passed over by ``datasets`` without a word."""
    named, folders = set(paths), sorted({os.path.dirname(path) for path in paths})
    tops = [x for x in folders if not any(x.startswith(y + os.sep) for y in folders)]  # the rest lies below them
    unnamed = [path for top in tops for path in pictures_in(Path(top)) if path not in named]
    if unnamed:
        log.warning("in no row of its metadata, left out: %d picture(s), the first %s", len(unnamed), unnamed[0])


def _check_skipped(skipped: list[Skipped], total: int, limit: float, where: str) -> None:
    if not skipped:
        return
    named = "; ".join(f"{x.name}: {x.reason}" for x in skipped[:5]) + ("; …" if len(skipped) > 5 else "")
    message = f"{where}: {len(skipped)} of {total} rows are of no use: {named}"
    if len(skipped) == total or len(skipped) > limit * total:
        raise DataError(f"{message}. At most {limit:.1%} may be skipped; mend or remove them (nothing was deleted)")
    log.warning("%s. They are skipped", message)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _threaded(work: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
    """In order, on all cores: Pillow decodes and resizes outside the interpreter's lock."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rest, done = iter(jobs), []
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `header` looks at the size itself
        while part := list(islice(rest, 4096)):  # a million futures at once would be a gigabyte
            done += pool.map(work, part)
    return done
