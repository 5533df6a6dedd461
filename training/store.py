"""Arrays on disk by key: written in shards that are complete or not there, read by the batch from memory maps."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor

from .sums import row_sums, sums_in_pieces
from .tables import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")
Part = list[tuple[str, np.ndarray]]  # shards by name, and which of their rows (N,) are kept

KEY = np.dtype("S16")  # 16 bytes; numpy compares them as numbers of fixed length, zeros at the end included
SEGMENT = 2**32  # bytes: small shards are put together up to this size
CHUNK = 2**26  # bytes copied at a time
CHECKED = 2**31  # bytes: a store that is no larger is checked in whole when it is swept
KEYS, SUMS, SUSPECT = "keys", "sums", "suspect"  # files beside the fields'
HIDDEN = "."  # begins the names of what is being written or on its way out
STALE = 86400.0  # seconds after which another machine's half-written shard is nobody's


class Store:
    """Rows of named arrays under keys of 16 bytes, in ``folder/SHARD/{keys,sums,FIELD…}.npy``.

    A shard is written beside and renamed. Rows are never changed: what depends on something else has another key,
    or lies in another folder. Rows of one shard have equal shapes. The sum of each row is written with it and checked
    when it is first read; shards of older versions, which have none, get them when they are tidied.

    Args:
        folder: made at the first write. Several runs may write and read it at once.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def shards(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*") if p.is_dir() and not p.name.startswith(HIDDEN))

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(file.stat().st_size for shard in self.shards() for file in shard.iterdir())

    def keys(self) -> np.ndarray:
        """(N,) of all rows."""
        return _settled(lambda: np.concatenate([np.empty(0, KEY), *(_keys(x) for x in self.shards())]))

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Where in ``keys`` (N,) the first of each stands that has no row here, in rising order."""
        distinct, first = np.unique(keys, return_index=True)
        return np.sort(first[~np.isin(distinct, self.keys())])

    def write(self, keys: np.ndarray, fields: Mapping[str, np.ndarray]) -> None:
        """A shard of the rows ``keys`` (B,), each field (B, …).

        Raises:
            OSError: the disk is full; nothing half-written is left.
        """

        named = {KEYS: keys, SUMS: row_sums(fields), **fields}
        self._publish(keys, list(named), lambda file, name: np.save(file, named[name]))

    def _publish(self, keys: np.ndarray, names: Sequence[str], fill: Callable[[BinaryIO, str], None]) -> None:
        final = self.folder / hashlib.blake2b(keys.tobytes(), digest_size=12, person=b"with sums").hexdigest()
        partial = self.folder / _hidden(final.name)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for name in names:
                with (partial / f"{name}.npy").open("wb") as file:
                    fill(file, name)
                    file.flush()
                    os.fsync(file.fileno())
            try:
                partial.rename(final)
            except OSError:
                if not final.is_dir():
                    raise  # else another run has written the same rows meanwhile
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed runs left half written, shards that do not open, and rows that are not what was written:
        looked for in a small store, and in a shard in which a reader met one."""
        for left in self.folder.glob(f"{HIDDEN}*"):
            if _abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        every = _settled(lambda: self.bytes) <= CHECKED
        for shard in self.shards():
            try:
                lengths = {len(x) for x in _arrays(shard).values()} | {len(_keys(shard))}
                lengths |= {len(_sums(shard))} if _has_sums(shard) else set()
                if len(lengths) > 1:
                    raise ValueError(f"its arrays have {sorted(lengths)} rows")
                whole = _whole(shard) if every or (shard / SUSPECT).exists() else np.ones(1, bool)
            except (OSError, ValueError, EOFError) as error:
                if shard.is_dir():  # else another run has just put it together with others
                    log.warning("%s: damaged (%s), removed; its rows are made anew", shard, error)
                    _remove(shard)
                continue
            if not whole.all():
                bad = len(whole) - int(whole.sum())
                log.warning("%s: %d of its %d rows are damaged; they are made anew", shard, bad, len(whole))
                self.join([(shard.name, whole)]) if whole.any() else _remove(shard)

    def tidy(self, used: np.ndarray | None = None) -> None:
        """Put small shards together, so that a large store is a few files.

        Args:
            used: rows of other keys are dropped, if given. No other run may be reading them.
        """
        for part in self.to_join(used):
            self.join(part)

    def to_join(self, used: np.ndarray | None = None) -> list[Part]:
        """What ``tidy`` would ``join``. Shards without a row that is kept are removed here."""
        shards = _settled(lambda: sorted(self.shards(), key=_size, reverse=True))  # of equal rows the larger's stays
        keys = [_keys(x) for x in shards]
        together = np.concatenate([np.empty(0, KEY), *keys])
        keep = np.zeros(len(together), bool)
        keep[np.unique(together, return_index=True)[1]] = True
        if used is not None:
            keep &= np.isin(together, used)
        groups: dict[tuple, list[tuple[str, np.ndarray, float]]] = {}
        for shard, kept in zip(shards, np.split(keep, np.cumsum([len(k) for k in keys])[:-1]), strict=True):
            size = _size(shard)
            if not kept.any():
                _remove(shard)
            elif not (kept.all() and size >= SEGMENT / 2 and _has_sums(shard)):
                groups.setdefault(_signature(shard), []).append((shard.name, kept, size * kept.mean()))
        parts = [part for group in groups.values() for part in _cut(group)]
        return [x for x in parts if len(x) > 1 or not x[0][1].all() or not _has_sums(self.folder / x[0][0])]

    def join(self, part: Part) -> None:
        """One shard in the place of several, of their rows that are kept."""
        shards = [(self.folder / name, kept) for name, kept in part]
        try:
            first = _arrays(shards[0][0])
            keys = np.concatenate([_keys(shard)[kept] for shard, kept in shards])
            sums = np.concatenate([_sums(shard)[kept] for shard, kept in shards])  # as they are: damage goes on showing
        except FileNotFoundError:  # another run has done it
            return

        def fill(file: BinaryIO, name: str) -> None:
            if name in (KEYS, SUMS):
                return np.save(file, keys if name == KEYS else sums)
            like = first[name]
            header = {"descr": like.dtype.str, "fortran_order": False, "shape": (len(keys), *like.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
            step = max(1, CHUNK // max(1, like[:1].nbytes))
            for shard, kept in shards:
                array, rows = _arrays(shard)[name], np.flatnonzero(kept)
                for i in range(0, len(rows), step):
                    file.write(np.ascontiguousarray(array[rows[i : i + step]]).data)

        with suppress(FileNotFoundError):
            self._publish(keys, [KEYS, SUMS, *first], fill)
            for shard, _ in shards:
                _remove(shard)

    def open(self, keys: np.ndarray) -> Reader:
        """For reading rows of these keys (N,).

        Raises:
            KeyError: some of them are not here.
        """
        return _settled(lambda: Reader(self.shards(), keys))


class Reader:
    """Rows of a store by slot. ``slots[i]`` is the slot of ``keys[i]``."""

    def __init__(self, shards: Sequence[Path], keys: np.ndarray):
        found = [_keys(x) for x in shards]
        together = np.concatenate([np.empty(0, KEY), *found])
        slots = _first_places(together, keys)
        wrong = len(keys) if not len(together) else int((together[slots] != keys).sum())
        if wrong:
            raise KeyError(f"{wrong} of {len(keys)} rows are not in {shards[0].parent if shards else 'the store'}")
        ends = np.cumsum([len(k) for k in found])
        used = np.unique(np.searchsorted(ends, slots, side="right"))  # shards without any of these rows stay shut
        starts = ends - [len(k) for k in found]
        lengths = (ends - starts)[used]
        self.starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)  # of each shard's slots
        shard = np.searchsorted(used, np.searchsorted(ends, slots, side="right"))
        self.slots: np.ndarray = slots - starts[used][shard] + self.starts[shard]
        self._open([shards[i] for i in used])

    def _open(self, shards: Sequence[Path]) -> None:
        _allow_files(sum(len(list(x.iterdir())) for x in shards))
        self.shards, self.arrays = list(shards), [_arrays(x) for x in shards]
        self.sums = [_sums(x, "r") if _has_sums(x) else None for x in shards]
        parts = [np.full(len(next(iter(x.values()))), y is None) for x, y in zip(self.arrays, self.sums, strict=True)]
        self.checked = np.concatenate([np.empty(0, bool), *parts])  # by slot: read once, and as it was written

    def __getstate__(self) -> dict[str, Any]:
        own = ("arrays", "sums", "checked")  # a pickled map would be a copy of the file
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open(self.shards)

    def gather(self, slots: np.ndarray) -> dict[str, Tensor]:
        """The rows at ``slots`` (B,): each field (B, …), in the type it is stored in.

        Raises:
            DataError: a row is not what was written; it is made anew when the cache is next filled.
            ValueError: they do not have one shape.
        """
        fresh = np.flatnonzero(~self.checked[slots])
        if len(self.arrays) == 1:
            parts = [(0, slots, slice(None))]
            out = {name: np.take(x, slots, axis=0) for name, x in self.arrays[0].items()}
        else:
            parts, out = self._by_shard(slots), {}
            for name, like in self.arrays[parts[0][0]].items():
                out[name] = np.empty((len(slots), *like.shape[1:]), like.dtype)
                for shard, offsets, rows in parts:
                    out[name][rows] = np.take(self.arrays[shard][name], offsets, axis=0)
        if len(fresh):
            self._check(slots, fresh, parts, out)
        return {name: _tensor(x) for name, x in out.items()}

    def _by_shard(self, slots: np.ndarray) -> list[tuple[int, np.ndarray, Any]]:
        """Shard, rows in it, and places of them in ``slots`` (B,)."""
        shard = np.searchsorted(self.starts, slots, side="right") - 1  # (B,)
        order = np.argsort(shard, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(shard[order])) + 1)
        return [(int(shard[rows[0]]), slots[rows] - self.starts[shard[rows[0]]], rows) for rows in groups]

    def _check(self, slots: np.ndarray, fresh: np.ndarray, parts: list, out: dict[str, np.ndarray]) -> None:
        """That the places ``fresh`` of ``slots``, which were never read before, are what was written."""
        written = np.empty(len(slots), np.uint64)
        for shard, offsets, rows in parts:
            if (sums := self.sums[shard]) is not None:
                written[rows] = sums[offsets]
        part = out if len(fresh) == len(slots) else {name: x[fresh] for name, x in out.items()}
        bad = slots[fresh[row_sums(part) != written[fresh]]]
        if len(bad):
            shard, offsets, _ = self._by_shard(bad[:1])[0]
            with suppress(OSError):
                (self.shards[shard] / SUSPECT).touch()  # for the next sweep, which looks at all of its rows
            raise DataError(
                f"{self.shards[shard]}: row {offsets[0]} is not what was written, the file is damaged; give the same "
                "command again: what is damaged is made anew (and look after the disk)"
            )
        self.checked[slots] = True


def as_stored(x: Tensor, precision: str) -> np.ndarray:
    """float32 -> what is written; bfloat16, which numpy lacks, as the uint16 of the same bits.

    Raises:
        ValueError: a finite number that is none in float16.
    """
    x = x.detach().float().cpu()
    if precision == "bf16":
        return x.bfloat16().view(torch.uint16).numpy()
    if precision == "fp16":
        half = x.half()
        if not torch.equal(half.isfinite(), x.isfinite()):
            worst = x[x.isfinite()].abs().max().item()
            raise ValueError(f"{worst:.4g} does not fit into float16, which ends at 65504")
        return half.numpy()
    return x.numpy()


# --- parts -----------------------------------------------------------------------------------------------------------


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def _first_places(together: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(N,) where each of ``keys`` (N,) first stands in ``together`` (M,); any place for one that does not.

    Both sides are sorted first. The binary searches of neighboring keys then read the same cache
    lines; for millions of keys in random order, cache misses cost ten times the sorting.
    """
    if not len(together):
        return np.zeros(len(keys), np.int64)
    order, ascending = np.argsort(together, kind="stable"), np.argsort(keys, kind="stable")
    place = np.empty(len(keys), np.int64)
    place[ascending] = np.searchsorted(together[order], keys[ascending])
    return order[np.minimum(place, len(order) - 1)]


def _keys(shard: Path) -> np.ndarray:
    return np.load(shard / f"{KEYS}.npy")


def _has_sums(shard: Path) -> bool:
    return (shard / f"{SUMS}.npy").exists()


def _sums(shard: Path, mode: Any = None) -> np.ndarray:
    """(N,) as they were written; of an older shard's rows as they are."""
    if _has_sums(shard):
        return np.load(shard / f"{SUMS}.npy", mmap_mode=mode).view(np.ndarray)
    return sums_in_pieces(_arrays(shard))


def _whole(shard: Path) -> np.ndarray:
    """(N,) which rows are what was written."""
    return sums_in_pieces(_arrays(shard)) == _sums(shard) if _has_sums(shard) else np.ones(len(_keys(shard)), bool)


def _arrays(shard: Path) -> dict[str, np.ndarray]:
    """Memory-mapped, without numpy's subclass, whose indexing is slow."""
    files = sorted(x for x in shard.glob("*.npy") if x.stem not in (KEYS, SUMS))
    if not files:
        raise FileNotFoundError(shard)
    return {x.stem: np.load(x, mmap_mode="r").view(np.ndarray) for x in files}


def _signature(shard: Path) -> tuple:
    return tuple((name, x.dtype.str, x.shape[1:]) for name, x in _arrays(shard).items())


def _size(shard: Path) -> int:
    return sum(file.stat().st_size for file in shard.iterdir())


def _cut(group: list[tuple[str, np.ndarray, float]]) -> Iterator[Part]:
    """Into runs of at most a segment's bytes, or one shard."""
    part: Part = []
    total = 0.0
    for name, kept, size in group:
        if part and total + size > SEGMENT:
            yield part
            part, total = [], 0.0
        part.append((name, kept))
        total += size
    yield part


def _remove(shard: Path) -> None:
    gone = shard.with_name(_hidden(f"{shard.name}.old"))
    try:
        shard.rename(gone)  # no longer listed while it goes
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def _hidden(name: str) -> str:
    return f"{HIDDEN}{socket.gethostname()}~{os.getpid()}~{name}"


def _abandoned(partial: Path) -> bool:
    """The process that was writing it is gone, as far as can be told from here."""
    host, pid, *_ = f"{partial.name.removeprefix(HIDDEN)}~0".split("~")
    if host == socket.gethostname() and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return int(pid) in (0, os.getpid())  # a number that was given again: this process writes nothing yet
    try:
        return time.time() - partial.stat().st_mtime > STALE
    except FileNotFoundError:
        return False


def _settled(read: Callable[[], T]) -> T:
    """What ``read`` gives, also while another run puts shards together."""
    for _ in range(50):
        try:
            return read()
        except FileNotFoundError:
            time.sleep(0.1)
    return read()


def _allow_files(count: int) -> None:
    """Each map holds its file open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and count + 256 > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
