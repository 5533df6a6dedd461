"""Rows of a source by number, read when they are asked for: of all that a data set holds nothing stays in memory."""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .folders import printable
from .remembered import state_of

AT_ONCE = 4096  # rows


class DataError(ValueError):
    """A data set that cannot be used; the message names the file, column or row, and what to do."""


class Column(Sequence):
    """A column of an Arrow table, which may be mapped from disk: one value at a time becomes a Python object."""

    def __init__(self, chunked: Any):
        self.chunks = [chunk for chunk in chunked.chunks if len(chunk)]
        self.starts = np.cumsum([0] + [len(chunk) for chunk in self.chunks]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: Any) -> Any:
        chunk = bisect_right(self.starts, index) - 1
        return self.chunks[chunk][index - self.starts[chunk]].as_py()


class Lazy(Sequence):
    """A sequence that reads its items when they are asked for: one, a slice (a list), or ``take`` of any indices.

    It equals any sequence of the same items. Iterating reads some thousand items at a time.
    """

    def __init__(self, length: int, take: Callable[[Sequence[int]], list[Any]]):
        self.length, self.take = length, take

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(self.length)))
        if not -self.length <= index < self.length:
            raise IndexError(index)
        return self.take([int(index) % self.length])[0]

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, self.length, AT_ONCE):
            yield from self.take(range(first, min(first + AT_ONCE, self.length)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Computed(Sequence):
    """A column that is worked out from another one, value by value."""

    def __init__(self, function: Callable[[Any], Any], column: Sequence[Any]):
        self.function, self.column = function, column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
        return self.function(self.column[index])


def path_from_bytes(raw: bytes) -> str:
    """A path as the file system has it: a name that is not UTF-8 is no text for Arrow."""
    return os.fsdecode(raw)


class Beside:
    """Reads the file that has a picture's name and another ending, when it is asked for.

    Args:
        endings: tried in this order, as in ``(".txt", ".TXT")``.
        text: return text, not bytes.
    """

    def __init__(self, *endings: str, text: bool):
        self.endings, self.text = endings, text

    def file(self, path: str) -> Path:
        """The file beside a picture; the first that there might be where there is none."""
        files = [Path(os.path.splitext(path)[0] + ending) for ending in self.endings]
        return next((file for file in files[1:] if not files[0].is_file() and file.is_file()), files[0])

    def __call__(self, path: str) -> Any:
        """Text, bytes, or None where there is no such file. Raises ValueError where text is not UTF-8."""
        file = self.file(path)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        return utf8(content, printable(file.name)) if self.text else content


class Table:
    """One split of one source.

    Args:
        source: as the user wrote it.
        pictures: paths, bytes, or ``{"bytes", "path"}`` as ``datasets`` stores pictures.
        captions: texts, lists of texts, or None where no captions are asked for.
        masks: like ``pictures``; a row without one counts everywhere.
        root: paths below it tell the rows apart; None where they have none.
        about_captions: where the captions stand, for messages.
        state: changes whenever the files do; None where that is to be told from the rows' own files.

    Attributes:
        caption_of_all: of every row, in place of ``captions``.
        loss_weight: what each row counts in the loss.
    """

    def __init__(
        self,
        source: str,
        pictures: Sequence[Any],
        captions: Sequence[Any] | None = None,
        masks: Sequence[Any] | None = None,
        root: str | None = None,
        about_captions: str = "",
        state: str | None = None,
    ):
        self.source, self.pictures, self.captions, self.masks, self.root = source, pictures, captions, masks, root
        self.about_captions, self._state, self.also = about_captions, state, ""
        self.caption_files = isinstance(captions, Computed)  # each caption is a file, which may be missing
        self.caption_of_all: str | None = None
        self.loss_weight = 1.0

    def __len__(self) -> int:
        return len(self.pictures)

    def path(self, row: int) -> str | None:
        """The row's own file, if it has one."""
        return path_in(self.pictures[row])

    def state(self) -> str:
        """Changes whenever a file does that the rows are read from."""
        return self._state if self._state is not None else state_of(self._files()) + self.also

    def _files(self) -> Iterator[str | Path]:
        for column in (self.pictures, self.captions, self.masks):
            for i in range(len(column or ())):
                if isinstance(column, Computed) and isinstance(column.function, Beside):
                    yield column.function.file(column.column[i])
                elif path := path_in(column[i] if column else None):
                    yield path

    def name(self, row: int) -> str:
        """The file or row, for messages."""
        path = self.path(row)
        return printable(path) if path else f"{self.source}, row {row}"

    def key(self, row: int) -> bytes | None:
        """What tells the row apart wherever the data set lies; None where nothing but its content does."""
        path = self.path(row) if self.root is not None else None
        return Path(os.path.relpath(path, self.root)).as_posix().encode("utf-8", "surrogateescape") if path else None

    def picture(self, row: int) -> bytes:
        """Encoded. Raises OSError or ValueError."""
        return bytes_of(self.pictures[row])

    def caption(self, row: int) -> Any:
        """As it is in the source. Raises ValueError where it is not UTF-8."""
        try:
            return self.captions[row] if self.captions is not None else ""
        except UnicodeDecodeError as error:
            raise ValueError(f"its caption is not UTF-8 ({error.reason} at byte {error.start})") from error

    def mask(self, row: int) -> bytes | None:
        """Encoded. Raises OSError or ValueError."""
        value = self.masks[row] if self.masks is not None else None
        return None if value is None else bytes_of(value)


def path_in(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return value["path"] if isinstance(value, dict) and value.get("bytes") is None and value.get("path") else None


def bytes_of(value: Any) -> bytes:
    """What a column of pictures holds -> encoded bytes. Raises ValueError or OSError."""
    if path := path_in(value):
        return Path(path).read_bytes()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError("holds no picture")
    return data


def utf8(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"its caption ({name}) is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        raise ValueError(reason) from error


def columns(rows: Iterable[dict[str, Any]], schema: Any) -> dict[str, Column]:
    """Rows -> columns in an Arrow file that has no name, on disk and mapped."""
    import pyarrow as pa

    handle, name = tempfile.mkstemp(suffix=".arrow")
    os.close(handle)
    try:
        with pa.OSFile(name, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for some in batched(rows, AT_ONCE):
                writer.write_batch(pa.RecordBatch.from_pylist(some, schema))
        table = pa.ipc.open_file(pa.memory_map(name)).read_all()
    finally:
        with suppress(PermissionError):  # Windows keeps the name of a mapped file
            os.unlink(name)
    return {field: Column(table.column(field)) for field in schema.names}


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    some: list[Any] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
