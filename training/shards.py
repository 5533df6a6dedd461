"""Files that a stream reads from front to back: parquet (here or on the hub) and tars, opened when they are reached."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np

from .index import digest_of
from .pictures import one_line
from .remembered import state_of
from .remote import filesystem, is_remote, list_files
from .schema import Data
from .schema.data import Source
from .sources import HUB, SHARDS, SPLITS, cache_of, check_columns, columns_of, files_of, pick, split_of
from .tables import DataError, Table, bytes_of
from .tars import TarTable

log = logging.getLogger(__name__)

HF = "hf://"


@dataclass(frozen=True)
class Shard:
    """One file of a source."""

    place: Source
    file: str  # a path or a URL

    def open(self, data: Data) -> Table:
        """Its rows. Raises DataError naming the file."""
        if not self.file.lower().endswith(".tar"):
            return ParquetTable(self.place, self.file, data)
        if is_remote(self.file):
            return RemoteTar(self.place, self.file, data)
        return TarTable(self.file, [Path(self.file)], **_members_of(self.place, data))

    def prefetch(self, data: Data) -> None:
        """Begin to copy a remote file that will soon be opened."""
        if is_remote(self.file):
            cache_of(data).prefetch(self.file, data.storage_options)


def _members_of(place: Source, data: Data) -> dict[str, Any]:
    own = {key: getattr(place, key) for key in ("image_column", "caption_column", "mask_column")}
    return {**own, "caption_extension": data.caption_extension}


def shards(data: Data, split: str) -> list[Shard]:
    """The files of a split, in a fixed order. In a source with one split some whole files are held out by their names.

    Raises:
        DataError: a source that is no set of parquet or tar files, or of a single one.
    """
    found = []
    for place in data.places:
        if place.path.startswith(HUB):
            parts = _hub_files(place.path)
        elif is_remote(place.path):
            parts = _remote_files(place.path, data)
        else:
            parts = _local_files(place.path)
        part, alone = pick(parts, split, place.path)  # type: ignore[arg-type]
        files = sorted(parts[part])
        if alone:
            files = _parted(files, data.held_out, split, place.path)
        found += [Shard(place, file) for file in files]
    return found


def _local_files(source: str) -> dict[str, list[str]]:
    kind, parts = files_of(source)
    if kind == "imagefolder":
        raise DataError(
            f"{source}: data.streaming reads parquet and tar files; leave it out for a folder of pictures, which are "
            "read from it as they are needed anyway"
        )
    return {name: [str(file) for file in files] for name, files in parts.items()}


def _remote_files(source: str, data: Data) -> dict[str, list[str]]:
    root, listed = list_files(source, data.storage_options)
    files = {ending: [x for x in listed if x.lower().endswith(ending)] for ending in SHARDS}
    if not any(files.values()):
        raise DataError(f"{source}: data.streaming reads parquet and tar files; none of its {len(listed)} files is one")
    if all(files.values()):
        raise DataError(f"{source}: holds parquet files and tars; name one of the two, or both in data.sources")
    parts: dict[str, list[str]] = {}
    for file in files[".parquet"] or files[".tar"]:
        bare, base = (PurePosixPath(x.partition("://")[2] or x) for x in (file, root))
        parts.setdefault(split_of(bare, base) or "", []).append(file)
    if len(parts) > 1 and "" in parts:
        raise DataError(f"{parts[''][0]}: belongs to no split, but other files here do ({', '.join(parts)})")
    return {name or "train": part for name, part in parts.items()}


def _hub_files(source: str) -> dict[str, list[str]]:
    """The data set's own parquet or tar files, or the parquet files that the hub has made of it."""
    name = source.removeprefix(HUB)
    converted, files = f"datasets/{name}@refs/convert/parquet", []
    try:
        system, _ = filesystem(HF, {})
        for root, ending in ((f"datasets/{name}", "parquet"), (f"datasets/{name}", "tar"), (converted, "parquet")):
            if files := sorted(str(x) for x in system.glob(f"{root}/**/*.{ending}")):
                break
    except Exception as error:
        raise DataError(f"{source}: could not be had from the hub: {one_line(error)}") from error
    if not files:
        raise DataError(f"{source}: has no parquet files and no tars to be streamed")
    if any("/partial-" in file.removeprefix(converted) for file in files if file.startswith(converted)):
        log.warning("%s: the hub has converted its first part alone to parquet; no more of it is read", source)
    parts: dict[str, list[str]] = {}
    for file in files:
        words = file.replace("-", "/").replace(".", "/").lower().split("/")[3:]
        parts.setdefault(next((SPLITS[x] for x in words if x in SPLITS), "train"), []).append(f"{HF}{file}")
    return parts


def _parted(files: list[str], share: float, split: str, source: str) -> list[str]:
    if share == 0:
        return files
    if len(files) < 2:
        raise DataError(f"{source}: a stream of one file has none to hold out; part it, or name another one test")
    order = sorted(files, key=lambda file: digest_of(Path(file).name.encode()))
    test = set(order[: max(1, round(share * len(files)))])
    if len(test) == len(files):
        raise DataError(f"{source}: {len(files)} files are too few to hold out {share:.0%} of them")
    return [file for file in files if (file in test) == (split == "test")]


class ParquetTable(Table):
    """A parquet file by row, one row group in memory at a time."""

    def __init__(self, place: Source, file: str, data: Data):
        import pyarrow.parquet as pq

        super().__init__(place.path, (), about_captions=f"column {place.caption_column!r}")
        self.file, self.place, self._data = file, place, data
        self._lease = cache_of(data).fetch(file, data.storage_options) if is_remote(file) else None
        try:
            self._parquet = pq.ParquetFile(file if self._lease is None else self._lease.path)
            about = self._parquet.metadata
        except Exception as error:
            raise DataError(f"{file}: is no parquet file that can be read ({one_line(error)})") from error
        check_columns(self._parquet.schema_arrow, place)
        self.captions = () if place.caption_column else None
        self.masks = () if place.mask_column else None
        counts = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        self._starts = np.cumsum([0, *counts])
        self._lock, self._group, self._table = Lock(), -1, None  # one reading head for all threads

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> Any:
        return ParquetTable, (self.place, self.file, self._data)  # a process opens the file for itself

    def state(self) -> str:
        return state_of([self.file]) if self._lease is None else self._lease.version

    def name(self, row: int) -> str:
        return f"{self.file}, row {row}"

    def _value(self, column: str | None, row: int) -> Any:
        if column is None:
            return None
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        with self._lock:
            if group != self._group:
                try:
                    self._table = self._parquet.read_row_group(group, columns=columns_of(self.place))
                except Exception as error:
                    raise DataError(f"{self.file}: row group {group} cannot be read ({one_line(error)})") from error
                self._group = group
            return self._table.column(column)[row - int(self._starts[group])].as_py()  # type: ignore[union-attr]

    def path(self, row: int) -> str | None:
        return None

    def picture(self, row: int) -> bytes:
        return bytes_of(self._value(self.place.image_column, row))

    def mask(self, row: int) -> bytes | None:
        value = self._value(self.place.mask_column, row)
        return None if value is None else bytes_of(value)

    def caption(self, row: int) -> Any:
        try:
            return self._value(self.place.caption_column, row) if self.place.caption_column else ""
        except UnicodeDecodeError as error:
            raise ValueError(f"its caption is not UTF-8 ({error.reason} at byte {error.start})") from error


class RemoteTar(TarTable):
    """A tar of which a local copy is read: its members lie where only its headers say."""

    def __init__(self, place: Source, file: str, data: Data):
        self._lease = cache_of(data).fetch(file, data.storage_options)
        self._again = place, file, data
        super().__init__(file, [self._lease.path], **_members_of(place, data), names=[file])

    def __reduce__(self) -> Any:
        return RemoteTar, self._again  # a process has a lease of its own

    def state(self) -> str:
        return self._lease.version


def subset(rows: int, share: float, epoch: int = 0) -> np.ndarray:
    """Row numbers of an evenly spread share of a shard's rows: others in each epoch, each row in that share of them."""
    return np.flatnonzero(np.diff(np.floor((np.arange(rows + 1) + epoch) * share + 1e-9)))


def passes(found: Sequence[Shard]) -> list[tuple[int, float]]:
    """(shard, share of its rows) for each time that an epoch goes through a shard."""
    listed: list[tuple[int, float]] = []
    for number, shard in enumerate(found):
        whole, rest = divmod(shard.place.repeats, 1)
        listed += [(number, 1.0)] * int(whole) + ([(number, rest)] if rest else [])
    return listed
