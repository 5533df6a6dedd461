"""Output files and folders: checked before anything is computed, and never lost at the end."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)


def check_output(path: str | Path, option: str, kind: Literal["file", "folder", "either"] = "either") -> Path:
    """Check that ``path`` can be written; nothing is created there.

    The nearest existing folder is tested with a temporary file: permission bits say nothing to
    root, of a read-only mount, or of /proc.

    Args:
        option: what the user called it, for the message (``--out``, ``output_dir``).
        kind: what will be written there.
    Returns:
        The absolute path.
    Raises:
        ValueError: a file is in the way of a folder or a folder of a file, or it cannot be written.
    """
    target = Path(path).expanduser().absolute()
    try:
        if target.exists() and kind != "either" and target.is_dir() != (kind == "folder"):
            there = "a folder" if target.is_dir() else "a file"
            raise ValueError(f"{option} {path}: is {there}, and a {kind} is needed; choose another name")
        parent = target if target.is_dir() else target.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise ValueError(f"{option} {path}: {parent} is a file, not a folder; choose another name")
        if target.is_file():
            with target.open("ab"):
                pass
        with tempfile.TemporaryFile(prefix=".ldm-", dir=parent):
            pass
        for name in target.parts[len(parent.parts) :]:  # a name that is too long for the file system
            (parent / name).exists()
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written ({error.strerror}); choose another place") from error
    return target


def write_or_keep(path: Path, write: Callable[[Path], object], suffix: str) -> Path:
    """Write ``path``; where that fails, write under another name beside it or in the temporary folder.

    Args:
        write: writes the file that it is called with.
        suffix: of the other name: a format that takes any content (JPEG and WebP have size limits).
    Returns:
        The file that was written.
    Raises:
        OSError, ValueError: none of the places can be written.
    """
    try:
        write(path)
        return path
    except (OSError, ValueError) as error:
        first = error
    for folder in (path.parent, Path(tempfile.gettempdir())):
        names = (folder / f"{path.stem}-{i}{suffix}" for i in count(2))
        try:
            other = next(name for name in names if not name.exists())
            write(other)
        except (OSError, ValueError):
            continue
        log.warning("%s: cannot be written (%s); written to %s", path, first, other)
        return other
    raise first
