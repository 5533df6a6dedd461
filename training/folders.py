"""The files of a folder of pictures: pictures, their caption files, and what else lies beside them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from .pictures import HEIF, HEIF_ADVICE, picture_endings

log = logging.getLogger(__name__)

CAPTIONS = (".txt", ".caption", ".cap", ".captions", ".tags", ".prompt", ".text")  # the first is the default
METADATA = tuple(f"metadata.{ending}" for ending in ("jsonl", "csv", "parquet"))


@lru_cache(maxsize=1024)
def log_once(level: int, text: str) -> None:
    """Both splits of a data set are opened; what holds for the folder is logged once."""
    log.log(level, "%s", text)


def plural(count: int, noun: str, many: str | None = None) -> str:
    """``1 picture``, ``2,000 pictures``."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def printable(path: str) -> str:
    """A file name for messages: bytes that are not UTF-8 are shown as ``\\xe9``."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder at and below ``root`` with its files, in a fixed order, without hidden ones.

    Linked folders are followed. None is entered twice: a link to a folder that contains ``root``, or
    that lies below it, is passed over.
    """
    top, entered = os.path.realpath(root), set[tuple[int, int]]()

    def leads_outside(link: str) -> bool:
        one, other = os.path.join(top, ""), os.path.join(os.path.realpath(link), "")
        return not (one.startswith(other) or other.startswith(one))

    def unreadable(error: OSError) -> None:
        log_once(logging.WARNING, f"{printable(str(error.filename))}: left out, cannot be read ({error.strerror})")

    for folder, inner, files in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        if identity in entered:
            inner.clear()
            continue
        entered.add(identity)
        inner[:] = sorted(
            x
            for x in inner
            if not x.startswith((".", "__"))
            and (not os.path.islink(path := os.path.join(folder, x)) or leads_outside(path))
        )
        yield folder, sorted(x for x in files if not x.startswith("."))


def pictures_in(root: Path, beside: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of all pictures at and below ``root``, in a fixed order.

    Args:
        beside: endings of files that belong to other pictures, such as masks.
    """
    for folder, files in walk(root):
        for file in files:
            if _is_picture(file, beside):
                yield os.path.join(folder, file)


def metadata_in(root: Path) -> list[Path]:
    """Metadata files at and below ``root``."""
    return [Path(folder, file) for folder, files in walk(root) for file in files if file in METADATA]


@dataclass
class Survey:
    """What lies in folders of pictures.

    Attributes:
        pictures: how many there are.
        captions: how many pictures have a file of the same name with this ending (in lower case).
        spellings: the endings as they are written, by ending in lower case.
        others: files that are neither pictures nor metadata, by ending in lower case.
        first: the path of the first picture.
    """

    pictures: int = 0
    first: str = ""
    captions: Counter[str] = field(default_factory=Counter)
    spellings: dict[str, set[str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    def ending(self, wanted: str) -> str:
        """The ending of the caption files: ``wanted``; for the default the one that most pictures have."""
        if wanted.lower() != CAPTIONS[0]:
            return wanted.lower()
        return max(CAPTIONS, key=lambda ending: self.captions[ending])  # of equals the first

    def variants(self, ending: str) -> tuple[str, ...]:
        """The ending as the folder's files spell it; as it is where there are none."""
        return tuple(sorted(self.spellings.get(ending, {ending}), key=lambda x: (x != ending, x)))

    def expected(self, ending: str) -> str:
        """What a caption file should be called, by the example of the first picture."""
        name = os.path.basename(self.first)
        return printable(f"{os.path.splitext(name)[0]}{ending} beside {name}")

    def unused_text(self, ending: str) -> str:
        """Names endings of files beside the pictures that could be captions."""
        found = [f"{count:,} {other}" for other, count in self.captions.most_common() if other != ending]
        return f"; beside the pictures are {', '.join(found[:3])} (data.caption_extension)" if found else ""

    def describe_others(self, ending: str | None) -> str:
        """The files that are passed over, by ending; empty where there are none."""
        rest = Counter(self.others)
        if ending is not None:
            rest[ending] -= self.captions[ending]
        rest = +rest
        return ", ".join(f"{n:,} {x or 'without an ending'}" for x, n in sorted(rest.items()) if x not in HEIF)

    @property
    def heif(self) -> int:
        """HEIF pictures that cannot be read, as pillow-heif is not installed."""
        return sum(count for ending, count in self.others.items() if ending in HEIF)


def survey(folders: Iterable[Path], beside: tuple[str, ...] = (), extension: str = CAPTIONS[0]) -> Survey:
    """Look through folders once.

    Args:
        extension: ``data.caption_extension``, which may hold several dots.
    """
    result = Survey()
    for root in folders:
        for folder, files in walk(root):
            pictures = [file for file in files if _is_picture(file, beside)]
            stems = {os.path.splitext(file)[0] for file in pictures}
            if pictures and not result.first:
                result.first = os.path.join(folder, pictures[0])
            result.pictures += len(pictures)
            captioned: dict[str, set[str]] = {}
            for file in files:
                if file in METADATA or (beside and file.endswith(beside)) or _is_picture(file):
                    continue
                stem, ending = _split(file, extension)
                result.others[ending.lower()] += 1
                if stem in stems and ending.lower() not in HEIF:
                    captioned.setdefault(ending.lower(), set()).add(stem)
                    result.spellings.setdefault(ending.lower(), set()).add(ending)
            if captioned:
                names = Counter(os.path.splitext(file)[0] for file in pictures)  # a.jpg and a.png share a.txt
                for ending, some in captioned.items():
                    result.captions[ending] += sum(names[stem] for stem in some)
    return result


def report_others(source: str, found: Survey, ending: str | None) -> None:
    """Log what is passed over, and HEIF pictures that cannot be read."""
    if others := found.describe_others(ending):
        log_once(logging.INFO, f"{source}: passed over: {others}")
    if found.heif:
        log_once(logging.WARNING, f"{source}: left out: {plural(found.heif, 'HEIF picture')}; {HEIF_ADVICE}")


def _is_picture(file: str, beside: tuple[str, ...] = ()) -> bool:
    return os.path.splitext(file)[1].lower() in picture_endings() and not file.endswith(beside)


def _split(file: str, extension: str) -> tuple[str, str]:
    if file.lower().endswith(extension.lower()) and len(file) > len(extension):
        return file[: -len(extension)], file[-len(extension) :]
    return os.path.splitext(file)
