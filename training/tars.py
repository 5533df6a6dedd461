"""Webdataset tars: members that share a name up to its first dot are one row, read at their offsets.

Nothing is unpacked. A member that is a link or whose name leads out of the archive is refused.
"""

from __future__ import annotations

import json
import logging
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from .pictures import one_line
from .remembered import state_of
from .tables import DataError, Table, utf8

log = logging.getLogger(__name__)

PICTURE, TEXT, JSON, MASK = range(4)


class TarTable(Table):
    """The rows of tars, by an index of 4 bytes for the tar and 16 for each member that is used.

    Args:
        image_column: the ending of the pictures ("jpg"), or anything that is no ending of theirs for all kinds.
        caption_column: the ending of the captions, or the key in the row's .json.
        caption_extension: the ending of the captions where ``caption_column`` is none.
        mask_column: the ending of the masks, as in "mask.png".
        names: what messages call the files; None: their paths.
    Raises:
        DataError: no tar that can be read, a member that leads outside, no row with a picture.
    """

    def __init__(
        self,
        source: str,
        files: Sequence[Path],
        *,
        image_column: str = "image",
        caption_column: str | None = "text",
        caption_extension: str = ".txt",
        mask_column: str | None = None,
        names: Sequence[str] | None = None,
    ):
        captions = () if caption_column else None  # read from the tars, not from here
        masks = () if mask_column else None
        super().__init__(source, (), captions, masks, about_captions=f"{caption_extension} or .json {caption_column!r}")
        self.files, self.caption_column = list(files), caption_column
        self.names = list(names) if names is not None else [str(file) for file in files]
        known = set(Image.registered_extensions())
        pictures = {f".{image_column}"} if f".{image_column}" in known else known
        texts = {caption_extension, f".{caption_column}"} if caption_column else set()
        rows = _Index()
        for number, file in enumerate(self.files):
            for stem, members in _grouped(file, self.names[number]):
                found: list[tuple[int, int]] = [(-1, 0)] * 4
                for ending, where in members.items():
                    if mask_column and ending == f".{mask_column.lstrip('.')}":
                        found[MASK] = where
                    elif ending in texts:
                        found[TEXT] = where
                    elif ending == ".json":
                        found[JSON] = where
                    elif ending in pictures and found[PICTURE][0] < 0:
                        found[PICTURE] = where
                if found[PICTURE][0] >= 0:
                    rows.add(number, stem, found)
        if not len(rows):
            raise DataError(f"{source}: the data set is empty: no picture in its {len(self.files)} tar file(s)")
        self.file, self.members, self.stems = rows.arrays()
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.file)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a process opens the files for itself

    def path(self, row: int) -> str | None:
        return None

    def state(self) -> str:
        return state_of(self.files)

    def name(self, row: int) -> str:
        return f"{self.names[self.file[row]]}: {self._stem(row)}"

    def key(self, row: int) -> bytes | None:
        """Its name in the tar; that of the tar too, for names may come again in each."""
        return f"{self.files[self.file[row]].name}/{self._stem(row)}".encode("utf-8", "surrogateescape")

    def picture(self, row: int) -> bytes:
        return self._read(row, PICTURE) or b""

    def mask(self, row: int) -> bytes | None:
        return self._read(row, MASK)

    def caption(self, row: int) -> Any:
        if self.caption_column is None:
            return ""
        text = self._read(row, TEXT)
        if text is not None:
            return utf8(text, f"{self._stem(row)}, text")
        about = self._read(row, JSON)
        if about is None:
            return None
        try:
            values = json.loads(about)
            return values.get(self.caption_column) if isinstance(values, dict) else None
        except ValueError as error:
            raise ValueError(f"its .json cannot be read ({one_line(error)})") from error

    def _stem(self, row: int) -> str:
        start, end = self.stems[1][row : row + 2]
        return self.stems[0][start:end].decode("utf-8", "surrogateescape")

    def _read(self, row: int, kind: int) -> bytes | None:
        offset, size = (int(x) for x in self.members[row, kind])
        if offset < 0:
            return None
        number = int(self.file[row])
        if number not in self._open:
            self._open[number] = np.memmap(self.files[number], np.uint8, "r")
        content = self._open[number][offset : offset + size].tobytes()
        if len(content) < size:
            raise ValueError("the tar ends before it does")
        return content


class _Index:
    """Grows row by row in packed arrays."""

    def __init__(self):
        self.file, self.members, self.names, self.ends = array("L"), array("q"), bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self.file)

    def add(self, file: int, stem: str, members: list[tuple[int, int]]) -> None:
        self.file.append(file)
        self.names += stem.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.names))
        for offset, size in members:
            self.members.extend((offset, size))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, tuple[bytes, np.ndarray]]:
        members = np.frombuffer(self.members, np.int64).reshape(-1, 4, 2)
        names = bytes(self.names), np.frombuffer(self.ends, np.int64)
        return np.frombuffer(self.file, self.file.typecode).astype(np.uint32), members, names


def _grouped(file: Path, shown: str) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Rows in their order: the name up to the first dot, and by ending the offset and size of each member."""
    stem, members = None, {}
    for name, offset, size in _members(file, shown):
        path = PurePosixPath(name)
        first, dot, ending = path.name.partition(".")
        own = str(path.with_name(first)) if first else name
        if own != stem:
            if stem is not None:
                yield stem, members
            stem, members = own, {}
        members[(dot + ending).lower()] = (offset, size)
    if stem is not None:
        yield stem, members


def _members(file: Path, shown: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each plain file; headers alone are read."""
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                path = PureWindowsPath(member.name)  # knows both separators
                if path.anchor or ".." in path.parts:
                    raise DataError(f"{shown}: member {member.name!r} leads out of the archive; the tar is not used")
                if not (member.isfile() or member.isdir()) or member.issparse():
                    raise DataError(f"{shown}: member {member.name!r} is a link or no plain file; the tar is not used")
                if member.isfile():
                    yield member.name, member.offset_data, member.size
            with file.open("rb") as rest:  # tarfile takes a damaged header for the end
                rest.seek(tar.offset)
                mark = rest.read(512)
                if not mark:
                    log.warning("%s: has no end; perhaps it was cut off, and rows are lost", shown)
                if mark.strip(b"\0"):
                    raise DataError(
                        f"{shown}: is damaged at byte {tar.offset}: no member begins there; mend or remove it"
                    )
    except (tarfile.TarError, OSError, EOFError) as error:
        hint = "; unpack a compressed tar first" if file.suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst") else ""
        raise DataError(f"{shown}: is no tar file that can be read ({one_line(error)}){hint}") from error
