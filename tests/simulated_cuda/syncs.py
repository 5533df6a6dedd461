"""Where the host would wait for the device: kind and place of each, while a region is watched."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = tuple(f"{ROOT / name}/" for name in ("ldm", "pipelines", "training"))


class Sync(NamedTuple):
    """One wait: ``item``, ``nonzero``, ``D2H copy`` …; the innermost line of ours, and the function that it is in."""

    kind: str
    file: str  # of the package's, as training/optim.py; of another where none of ours is on the stack
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.file}:{self.line} ({self.function})"


class _Log:
    def __init__(self) -> None:
        self.watching = False
        self.found: list[Sync] = []


LOG = _Log()


def note(kind: str) -> None:
    """The host waits here."""
    if LOG.watching:
        LOG.found.append(_place(kind))


def _place(kind: str) -> Sync:
    frame = _ours(sys._getframe(1))
    if frame is None and threading.current_thread() is not threading.main_thread():
        # Of autograd's thread for the device: what the main thread waits in.
        frame = _ours(sys._current_frames().get(threading.main_thread().ident or 0))
    if frame is None:
        return Sync(kind, "?", 0, "?")
    file = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
    return Sync(kind, file, frame.f_lineno, frame.f_code.co_qualname)


def _ours(frame: FrameType | None) -> FrameType | None:
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    return frame


@contextmanager
def watched() -> Iterator[list[Sync]]:
    """The waits within this context. Not to be nested."""
    LOG.found, LOG.watching = [], True
    try:
        yield LOG.found
    finally:
        LOG.watching = False
