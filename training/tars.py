"""Webdataset tars: a picture and the members with its name and another ending are one row, read at their offsets.

Nothing is unpacked. A member that is a link or whose name leads out of the archive is refused.
"""

from __future__ import annotations

import json
import logging
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from .folders import log_once, plural, printable
from .pictures import one_line, picture_endings
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
        self.files, self.caption_column, self.caption_files = list(files), caption_column, True
        self.names = list(names) if names is not None else [str(file) for file in files]
        known, one = picture_endings(), f".{image_column.lower()}"
        pictures = frozenset((one,)) if PurePosixPath(f"x{one}").suffix in known else known
        texts = {caption_extension.lower(), f".{caption_column}".lower()} if caption_column else set()
        endings = _Endings(pictures, texts, f".{mask_column.lstrip('.')}".lower() if mask_column else None)
        rows, left = _Index(), Counter[str]()
        for number, file in enumerate(self.files):
            left += _index(rows, number, _members(file, self.names[number]), endings)
        if not len(rows):
            raise DataError(f"{source}: the data set is empty: no picture in its {plural(len(self.files), 'tar file')}")
        if left:
            log_once(logging.INFO, f"{source}: passed over: {', '.join(f'{n:,} {x}' for x, n in sorted(left.items()))}")
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
        return printable(f"{self.names[self.file[row]]}: {self._stem(row)}")

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
            return utf8(text, printable(f"{self._stem(row)}, text"))
        about = self._read(row, JSON)
        if about is None:
            return None
        try:
            values = json.loads(about)
            return values.get(self.caption_column) if isinstance(values, dict) else None
        except ValueError as error:
            raise ValueError(f"its .json cannot be read ({one_line(error)})") from error

    def _stem(self, row: int) -> str:
        names, starts, ends = self.stems
        return names[starts[row] : ends[row]].decode("utf-8", "surrogateescape")

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
        self.dropped: set[int] = set()  # rows that turned out to be none

    def __len__(self) -> int:
        return len(self.file) - len(self.dropped)

    @property
    def next(self) -> int:
        return len(self.file)

    def add(self, file: int, stem: str, members: list[tuple[int, int]]) -> None:
        self.file.append(file)
        self.names += stem.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.names))
        for offset, size in members:
            self.members.extend((offset, size))

    def set(self, row: int, kind: int, where: tuple[int, int]) -> None:
        start = 8 * row + 2 * kind
        self.members[start : start + 2] = array("q", where)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, tuple[bytes, np.ndarray, np.ndarray]]:
        file = np.frombuffer(self.file, self.file.typecode).astype(np.uint32)
        members = np.frombuffer(self.members, np.int64).reshape(-1, 4, 2)
        ends = np.frombuffer(self.ends, np.int64)
        kept = np.setdiff1d(np.arange(len(file)), list(self.dropped)) if self.dropped else slice(None)
        return file[kept], members[kept], (bytes(self.names), ends[:-1][kept], ends[1:][kept])


@dataclass(frozen=True)
class _Endings:
    """Endings in lower case; those that a config names may hold several dots."""

    pictures: frozenset[str]
    texts: set[str]
    mask: str | None

    def split(self, name: str) -> tuple[str, str, int | None]:
        """Stem, ending and kind of a member: the longest ending that is known, else from the last dot on."""
        lower = name.lower()
        for ending in self._dotted:
            if lower.endswith(ending) and len(lower) > len(ending):
                return name[: -len(ending)], ending, self._kind(ending)
        path = PurePosixPath(name)
        return str(path.with_suffix("")), path.suffix.lower(), self._kind(path.suffix.lower())

    @cached_property
    def _dotted(self) -> list[str]:
        endings = (*self.texts, *self.pictures, self.mask)
        return sorted((x for x in endings if x and (x.count(".") > 1 or x[0] != ".")), key=len, reverse=True)

    def _kind(self, ending: str) -> int | None:
        if ending == self.mask:
            return MASK
        if ending in self.texts:
            return TEXT
        if ending == ".json":
            return JSON
        return PICTURE if ending in self.pictures else None


def _sample(stem: str) -> str:
    """The stem up to the first dot of its name: the key of a sample in webdataset's convention."""
    path = PurePosixPath(stem)
    return str(path.with_name(path.name.partition(".")[0] or path.name)) if path.name else stem


@dataclass
class _Open:
    """A row of which members may follow."""

    row: int
    ending: str
    kinds: set[int]
    extra: bool = False  # beside a picture whose name has no dots: a second picture of its sample

    @property
    def captioned(self) -> bool:
        return bool(self.kinds & {TEXT, JSON})


def _index(rows: _Index, file: int, members: Iterable[tuple[str, int, int]], endings: _Endings) -> Counter[str]:
    """Add one tar's rows in the order of their pictures.

    A row is a picture and the members that have its name with another ending, wherever they are in the tar. Dots
    belong to the name. Where webdataset's convention, by which a name ends at its first dot, decides more, it is kept:
    beside ``a.png``, a picture ``a.depth.png`` without a caption of its own is no row; and where ``a.orig.png`` is the
    only picture of ``a``, ``a.txt`` is its caption.

    Returns:
        Number of members that belong to no row, by ending.
    """
    left = Counter[str]()
    wanted = {kind for kind, asked in ((TEXT, endings.texts), (MASK, endings.mask)) if asked}
    unfinished: dict[str, _Open] = {}
    waiting: dict[str, dict[int, tuple[int, int, str]]] = {}  # captions and masks whose picture may follow
    sample: str | None = None
    run: dict[str, _Open] = {}  # rows of adjacent members of one sample
    plain = False  # one of them is a picture without dots in its name, used or not

    def finish_run() -> None:
        for stem, row in run.items():
            row.extra = plain and stem != sample
            if wanted <= row.kinds and not (row.extra and not endings.texts):
                unfinished.pop(stem, None)

    for name, offset, size in members:
        stem, ending, kind = endings.split(name)
        if _sample(stem) != sample:
            finish_run()
            sample, run, plain = _sample(stem), {}, False
        plain |= stem == sample and ending in picture_endings()
        row = run.get(stem) or unfinished.get(stem)
        if kind is None:
            left[ending or "without an ending"] += 1
        elif kind == PICTURE and row is not None:
            left[ending] += 1  # of a.jpg and a.png the first is taken
        elif kind == PICTURE:
            early = waiting.pop(stem, {})
            run[stem] = unfinished[stem] = _Open(rows.next, ending, {PICTURE, *early})
            found = [(-1, 0)] * 4
            found[PICTURE] = offset, size
            for other, (start, length, _) in early.items():
                found[other] = start, length
            rows.add(file, stem, found)
        elif row is not None:
            rows.set(row.row, kind, (offset, size))
            row.kinds.add(kind)
        else:
            waiting.setdefault(stem, {})[kind] = offset, size, ending
    finish_run()
    alone = {stem: row for stem, row in unfinished.items() if endings.texts and not (row.captioned or row.extra)}
    pictures = Counter(map(_sample, alone))
    for stem, row in alone.items():
        if pictures[_sample(stem)] > 1:
            continue
        shared = waiting.get(_sample(stem), {})
        for kind in (TEXT, JSON):
            if kind in shared:
                rows.set(row.row, kind, shared.pop(kind)[:2])
    extras = [row for row in unfinished.values() if row.extra and not row.captioned]
    rows.dropped.update(row.row for row in extras)
    left.update(row.ending for row in extras)
    left.update(ending for kinds in waiting.values() for _, _, ending in kinds.values())
    return left


def _hidden(name: str) -> bool:
    """Files that macOS adds to archives (``._a.png``, ``__MACOSX/``), and other hidden ones."""
    path = PurePosixPath(name)
    return path.name.startswith(".") or "__MACOSX" in path.parts


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
                if member.isfile() and not _hidden(member.name):
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
