"""Sources -> rows: an imagefolder, parquet files or a hub data set as pictures of one size with their captions.

Everything is looked at before any compute. A row whose picture or caption is of no use is skipped, counted and named;
more than a small share of them refuses the data set. Nothing of the user's is written or deleted.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .pictures import decode, header, one_line

log = logging.getLogger(__name__)

HUB = "hub:"
IN_MEMORY = 2**30  # bytes; a smaller source is held decoded
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_HELD_OUT_NAMES = ("test", "validation")

Split = Literal["train", "test"]


class DataError(ValueError):
    """A data set that cannot be used; the message names the file, column or row, and what to do."""


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
    tables = _tables(source, in_memory)
    table, alone = _pick(tables, split, source)
    _check_columns(table.features, image_column, caption_column, source)
    values, texts = _read(table, image_column, caption_column, source)
    if not len(values):
        raise DataError(f"{source}: the data set has no rows")

    names = [_name(source, value, i) for i, value in enumerate(values)]
    chosen: Sequence[int] = range(len(values))
    if alone:
        chosen = _held_out(_keys(source, values), held_out, split, source)
    texts = [""] * len(values) if texts is None else texts
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


# ---- through `datasets`


def _tables(source: str, in_memory: int) -> dict[str, Any]:
    """Splits by name. Streamed where that costs nothing, so that no copy of the data is written into a cache."""
    if source.startswith(HUB):
        return _loaded(source, source.removeprefix(HUB))
    root = Path(source).expanduser()
    if not root.exists():
        raise DataError(f"{source}: no such folder or file (a data set of the hub is written {HUB}owner/name)")
    parquet = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    parquet = [x for x in parquet if x.name != "metadata.parquet" and not _hidden(x, root)]
    if root.is_file() and root.suffix != ".parquet":
        raise DataError(f"{source}: expected a folder or a .parquet file")
    if parquet:
        parts: dict[str, list[str]] = {}
        for file in parquet:
            parts.setdefault(_split_of(file, root) or "", []).append(glob.escape(str(file.resolve())))
        if len(parts) > 1 and "" in parts:
            raise DataError(f"{parts[''][0]}: belongs to no split, but other files here do ({', '.join(parts)})")
        files = {name or "train": part for name, part in parts.items()}
        # A small file is read in one go; a large one is converted to Arrow once, in datasets' cache, and mapped.
        small = sum(x.stat().st_size for x in parquet) <= in_memory
        return _loaded(source, "parquet", data_files=files, streaming=small)
    escaped = glob.escape(str(root.resolve()))
    folders = {x.name: _SPLITS[x.name.lower()] for x in sorted(root.iterdir()) if x.is_dir() and _is_split(x.name)}
    patterns: dict[str, list[str]] = {}
    for folder, name in folders.items():
        patterns.setdefault(name, []).append(f"{escaped}/{glob.escape(folder)}/**")
    if not _holds_pictures(root):
        raise DataError(f"{source}: the data set is empty: no picture and no parquet file in this folder")
    return _loaded(source, "imagefolder", data_files=patterns or {"train": [f"{escaped}/**"]}, streaming=True)


def _loaded(source: str, builder: str, **options: Any) -> dict[str, Any]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(builder, **options))
    except Exception as error:  # every builder raises its own kinds
        what = "could not be had from the hub" if source.startswith(HUB) else "could not be opened"
        raise DataError(f"{source}: {what}: {one_line(error)}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _pick(tables: dict[str, Any], split: Split, source: str) -> tuple[Any, bool]:
    """The table of a split, and whether it is the only one, which is then to be parted."""
    if len(tables) == 1:
        return next(iter(tables.values())), True
    for name in ("train",) if split == "train" else _HELD_OUT_NAMES:
        if name in tables:
            return tables[name], False
    raise DataError(f"{source}: no split for {split!r} among {', '.join(tables)}")


def _check_columns(features: Any, image_column: str, caption_column: str | None, source: str) -> None:
    from datasets import Image as ImageFeature
    from datasets import Value

    columns = dict(features or {})
    there = ", ".join(f"{name} ({_kind(feature)})" for name, feature in columns.items()) or "none"
    for key, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is not None and column not in columns:
            hint = "; captions of an imagefolder stand in its metadata.jsonl" if key == "caption_column" else ""
            raise DataError(f"{source}: no column {column!r} ({key}); there are: {there}{hint}")
    feature = columns[image_column]
    binary = isinstance(feature, Value) and "binary" in feature.dtype
    if not (isinstance(feature, ImageFeature) or binary or (isinstance(feature, dict) and "bytes" in feature)):
        raise DataError(f"{source}: column {image_column!r} (image_column) holds no pictures; there are: {there}")
    if caption_column is not None:
        feature = columns[caption_column]
        if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view", "null")):
            raise DataError(f"{source}: column {caption_column!r} (caption_column) is no text; there are: {there}")


def _read(table: Any, image_column: str, caption_column: str | None, source: str) -> tuple[Any, Any]:
    """Encoded pictures and captions, (N,) each; captions None where none are asked for."""
    from datasets import Image as ImageFeature
    from datasets import IterableDataset

    if isinstance(table.features[image_column], ImageFeature):
        table = table.cast_column(image_column, ImageFeature(decode=False))
    if not isinstance(table, IterableDataset):  # mapped from disk, one by one
        return table[image_column], list(table[caption_column]) if caption_column else None
    columns = [image_column, caption_column] if caption_column else [image_column]
    try:
        rows = list(table.select_columns(columns))
    except Exception as error:
        raise DataError(f"{source}: could not be read: {one_line(error)}") from error
    return [row[image_column] for row in rows], [row[caption_column] for row in rows] if caption_column else None


# ---- small things


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


def _keys(source: str, values: Iterable[Any]) -> list[bytes]:
    root = Path(source).expanduser().resolve()
    return [_relative(value["path"], root).encode() if _is_file(value) else _bytes(value) for value in values]


def _name(source: str, value: Any, index: int) -> str:
    return value["path"] if _is_file(value) else f"{source}, row {index}"


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


def _relative(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith((".", "__")) for part in file.relative_to(root).parts)


def _is_split(name: str) -> bool:
    return name.lower() in _SPLITS


def _split_of(file: Path, root: Path) -> str | None:
    """By a folder below root, or by the file's name: train/0.parquet, train-00000-of-00001.parquet, test.parquet."""
    parts = file.relative_to(root).parts[:-1] if file != root else ()
    for word in (*parts, re.split(r"[-._ ]", file.stem)[0]):
        if _is_split(word):
            return _SPLITS[word.lower()]
    return None


def _holds_pictures(root: Path) -> bool:
    known = set(Image.registered_extensions())
    for _, inner, files in os.walk(root):
        inner[:] = [x for x in inner if not x.startswith(".")]
        if any(not x.startswith(".") and os.path.splitext(x)[1].lower() in known for x in files):
            return True
    return False


def _check_skipped(skipped: list[Skipped], total: int, limit: float, where: str) -> None:
    if not skipped:
        return
    named = "; ".join(f"{x.name}: {x.reason}" for x in skipped[:5]) + ("; …" if len(skipped) > 5 else "")
    message = f"{where}: {len(skipped)} of {total} rows are of no use: {named}"
    if len(skipped) == total or len(skipped) > limit * total:
        raise DataError(f"{message}. At most {limit:.1%} may be skipped; mend or remove them (nothing was deleted)")
    log.warning("%s. They are skipped", message)


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


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
