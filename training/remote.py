"""Files on object stores and web servers, by fsspec: listed, retried, and read from local copies.

``s3://``, ``gs://``, ``hf://``, ``https://`` and whatever else fsspec knows. Credentials come from the
environment, as s3fs, gcsfs and huggingface_hub read them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any, BinaryIO, TypeVar

from ldm.extras import pip_install

from .pictures import one_line
from .tables import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 6  # of one request, besides those that s3fs and gcsfs make themselves
FIRST_WAIT = 0.5  # seconds; doubled after each attempt
LONGEST_WAIT = 30.0
RANGE = 2**23  # bytes of one request
AT_ONCE = 4  # ranges of one file
ROOM_WAIT = 60.0  # seconds that a file waits for others that are in use
COPIES_AT_ONCE = 16  # files of a folder
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of the local disk, where a copy is written
# What tells two versions of a file apart, as the file systems name it. Times only where there is nothing better.
CONTENT_KEYS = ("ETag", "etag", "md5Hash", "generation", "blob_id")
TIME_KEYS = ("LastModified", "last_modified", "updated", "mtime")
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


class RemoteError(DataError):
    """A remote file that cannot be read or written; the message names its URL and what to do."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL of fsspec."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        RemoteError: no such kind of URL, a package that is not installed, or an option that is unknown.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        name = PACKAGES.get(url.partition("://")[0])
        command = pip_install(name) if name else "install its package"
        raise RemoteError(f"{url}: needs a package that is not installed ({one_line(error)}): {command}") from error
    except (TypeError, ValueError) as error:
        hint = "; look at data.storage_options" if options else ""
        raise RemoteError(f"{url}: cannot be opened{hint} ({one_line(error)})") from error


def retried(url: str, request: Callable[[], T]) -> T:
    """The result of a request, repeated with growing waits where that can help.

    Raises:
        RemoteError: not there, access denied, or a failure at each attempt.
        OSError: the local disk is full.
    """
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RemoteError(f"{url}: no such file, folder or bucket ({one_line(error)})") from error
        except Exception as error:
            if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                raise RemoteError(
                    f"{url}: access denied ({one_line(error)}); credentials are read from the environment, as "
                    "AWS_ACCESS_KEY_ID and AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS or HF_TOKEN"
                ) from error
            if isinstance(error, RemoteError | TypeError | NotImplementedError | UnicodeError):
                raise
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            if attempt == ATTEMPTS:
                raise RemoteError(f"{url}: failed {ATTEMPTS} times, at last with: {_reason(error)}") from error
            log.info("%s: attempt %d failed (%s)", url, attempt, _reason(error))
        time.sleep(wait * random.SystemRandom().uniform(0.5, 1.0))  # leaves the seeded generators alone
        wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError("unreachable")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


# --- listing ---------------------------------------------------------------------------------------------------------


def expand_braces(url: str) -> list[str]:
    """``a-{000..012}.tar`` and ``{a,b}.tar`` as webdataset writes them -> each file."""
    braces = re.search(r"\{([^{}]*)\}", url)
    if braces is None:
        return [url]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if numbers:
        first, last = numbers.groups()
        words = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        words = braces[1].split(",")
    return [x for word in words for x in expand_braces(url[: braces.start()] + word + url[braces.end() :])]


def list_files(url: str, options: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, Any]]]:
    """All files under a folder, of a pattern, or the one file, in a fixed order: URL -> info.

    Returns:
        The URL of the folder that holds them, and the files. Those that braces name are not looked up.
    Raises:
        RemoteError: nothing there.
    """
    names = expand_braces(url)
    if len(names) > 1:
        return os.path.commonpath([os.path.dirname(x.partition("://")[2]) for x in names]), {x: {} for x in names}
    fs, path = filesystem(url, options)

    def look() -> dict[str, dict[str, Any]]:
        fs.invalidate_cache()
        if any(x in path for x in "*[") or ("?" in path and not url.startswith("http")):
            return fs.glob(path, detail=True)
        if url.endswith((".tar", ".parquet")):
            return {path: fs.info(path)}
        return fs.find(path, detail=True)

    found = {k: v for k, v in sorted(retried(url, look).items()) if v.get("type", "file") == "file"}
    if not found:
        raise RemoteError(f"{url}: no such folder or bucket, or nothing in it")
    folder = path if "*" not in path else path.partition("*")[0].rpartition("/")[0]
    return folder.rstrip("/"), {fs.unstrip_protocol(k): v for k, v in found.items()}


# --- copies ----------------------------------------------------------------------------------------------------------


def _version(url: str, info: Mapping[str, Any]) -> str:
    keys = [key for keys in (CONTENT_KEYS, TIME_KEYS) for key in keys if info.get(key) is not None]
    values = [getattr(x, "timestamp", lambda x=x: x)() for x in (info[key] for key in keys[:1])]
    about = [url, str(info.get("size")), *map(str, values)]
    return hashlib.blake2b("\n".join(about).encode(), digest_size=12).hexdigest()


def download(url: str, options: Mapping[str, Any], info: Mapping[str, Any], file: BinaryIO, target: Path) -> None:
    """Write a remote file to ``file``, which is open at ``target``; a range that fails is asked for again.

    Raises:
        RemoteError: it cannot be read, has another size than its listing says, or the local disk is full.
    """
    try:
        _download(url, options, info, file, target)
    except OSError as error:
        raise RemoteError(f"{url}: cannot be copied to {target.parent} ({one_line(error)})") from error


def _download(url: str, options: Mapping[str, Any], info: Mapping[str, Any], file: BinaryIO, target: Path) -> None:
    fs, path = filesystem(url, options)
    size = info.get("size")
    if size is None or (url.startswith("http") and not info.get("partial")):  # the server knows no ranges

        def whole() -> None:
            file.truncate(0)
            fs.get_file(path, str(target))
            got = target.stat().st_size
            if size is not None and got != size:
                raise ConnectionError(f"{got} of {size} bytes came")

        return retried(url, whole)
    for first in range(0, size, RANGE * AT_ONCE):
        starts = list(range(first, min(first + RANGE * AT_ONCE, size), RANGE))
        wanted = {start: min(start + RANGE, size) for start in starts}

        def some(wanted: dict[int, int] = wanted) -> None:
            starts, ends = list(wanted), list(wanted.values())
            parts = fs.cat_ranges([path] * len(starts), starts, ends, on_error="return")
            failure = None
            for start, end, part in zip(starts, ends, parts, strict=True):
                if isinstance(part, bytes) and len(part) == end - start:
                    file.seek(start)
                    file.write(part)
                    del wanted[start]
                elif isinstance(part, bytes):
                    failure = ConnectionError(f"{len(part)} of {end - start} bytes came")
                else:
                    failure = part
            if failure is not None:
                raise failure

        retried(url, some)
    file.flush()


class Lease:
    """A file of the cache, which stays there until this is closed or collected."""

    def __init__(self, path: Path, handle: BinaryIO, version: str):
        self.path, self.version, self._handle = path, version, handle

    def close(self) -> None:
        self._handle.close()


class ShardCache:
    """Copies of remote files on the local disk, shared by the processes of a machine.

    Of several that want a file one downloads it. Where there is no room, the files that were not used
    for the longest time go; one that is open (a lock on it says so) stays.

    Args:
        folder: on a local disk.
        max_bytes: of all copies together, those that are being written included.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes

    def fetch(self, url: str, options: Mapping[str, Any]) -> Lease:
        """A local copy of the file as it is now.

        Raises:
            RemoteError: it cannot be read, or there is no room for it.
        """
        from filelock import FileLock

        fs, path = filesystem(url, options)
        info = retried(url, lambda: fs.info(path))
        version = _version(url, info)
        file = self.folder / version / PurePosixPath(url.partition("://")[2]).name
        _make_folder(self.folder)
        while True:
            if (lease := self._open(file, version)) is not None:
                return lease
            with FileLock(self.folder / f".{version}.lock"):
                if not file.exists():
                    return self._download(url, options, info, file, version)

    def prefetch(self, url: str, options: Mapping[str, Any]) -> None:
        """Begin to fetch a file that will be wanted. A failure shows when it is fetched."""

        def work() -> None:
            with suppress(Exception):
                self.fetch(url, options).close()

        Thread(target=work, daemon=True, name="prefetch").start()

    def _open(self, file: Path, version: str) -> Lease | None:
        try:
            handle = file.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        try:
            here = file.stat().st_ino == os.fstat(handle.fileno()).st_ino
        except FileNotFoundError:  # it went before the lock was there
            here = False
        if not here:
            handle.close()
            return None
        os.utime(file)
        return Lease(file, handle, version)

    def _download(
        self, url: str, options: Mapping[str, Any], info: Mapping[str, Any], file: Path, version: str
    ) -> Lease:
        partial = file.with_name(f".partial-{os.getpid()}")
        file.parent.mkdir(exist_ok=True)
        handle = self._reserve(url, partial, int(info.get("size") or 0))
        try:
            download(url, options, info, handle, partial)
            partial.rename(file)
        except OSError as error:
            raise RemoteError(f"{url}: cannot be copied to {self.folder} ({one_line(error)})") from error
        finally:
            partial.unlink(missing_ok=True)
            if not file.exists():
                handle.close()
        fcntl.flock(handle, fcntl.LOCK_SH)
        return Lease(file, handle, version)

    def _reserve(self, url: str, partial: Path, size: int) -> BinaryIO:
        """An open, locked file of this size, after room was made for it.

        Files in use may be what another process fetched ahead, so it waits a while for room.
        """
        limit = time.monotonic() + ROOM_WAIT
        while True:
            try:
                return self._make_room(url, partial, size)
            except RemoteError:
                if time.monotonic() > limit:
                    raise
            time.sleep(ROOM_WAIT / 100)

    def _make_room(self, url: str, partial: Path, size: int) -> BinaryIO:
        from filelock import FileLock

        with FileLock(self.folder / ".room.lock"):
            entries = []
            for x in self.folder.glob("*/*"):
                with suppress(FileNotFoundError):
                    entries.append((x, x.stat()))
            total = sum(about.st_size for _, about in entries)
            for x, about in sorted(entries, key=lambda e: e[1].st_mtime):
                if (x.name.startswith(".") or total + size > self.max_bytes) and _remove_unused(x):
                    total -= about.st_size
            if total + size > self.max_bytes:
                raise RemoteError(
                    f"{url}: no room for its {size / 1e9:.3g} GB in {self.folder}: {total / 1e9:.3g} GB are in use; "
                    f"raise data.shard_cache_gb ({self.max_bytes / 1e9:.3g})"
                )
            partial.parent.mkdir(exist_ok=True)
            handle = partial.open("w+b")
            fcntl.flock(handle, fcntl.LOCK_EX)
            handle.truncate(size)  # counts as its size from now on
            return handle


def _remove_unused(file: Path) -> bool:
    """Whether a file was removed: nobody has it open."""
    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    with suppress(OSError):
        file.parent.rmdir()
    return True


def copy_of(url: str, options: Mapping[str, Any], folder: Path, max_bytes: int) -> Path:
    """A local copy of a whole data set, brought up to date: what did not change is not copied again.

    Returns:
        The folder or file.
    Raises:
        RemoteError: it cannot be read, or is larger than ``max_bytes``.
    """
    from filelock import FileLock

    root, files = list_files(url, options)
    total = sum(int(info.get("size") or 0) for info in files.values())
    if total > max_bytes:
        raise RemoteError(
            f"{url}: {len(files)} files of {total / 1e9:.3g} GB would be copied to {folder}, where data.shard_cache_gb "
            f"allows {max_bytes / 1e9:.3g}; raise it, or read tars or parquet files with data.streaming"
        )
    place = f"{url.partition('://')[0]}/{root.partition('://')[2] or root}"
    target = folder / "copies" / re.sub(r"[^\w./=-]+", "_", place)
    _make_folder(target.parent)
    inside = {x: _relative(x, root) for x in files}
    single = list(inside.values()) == [""]
    base = target.parent if single else target
    with FileLock(target.parent / f".{target.name}.lock"):
        record = target.parent / f".{target.name}.json"
        old: dict[str, str] = json.loads(record.read_text()) if record.is_file() else {}
        new = {x: _version(x, info) for x, info in files.items()}
        local = {x: base / (target.name if single else inside[x]) for x in files}
        gone = [x for x in old if x not in new and not single]
        for x in gone:
            (base / _relative(x, root)).unlink(missing_ok=True)
        wanted = [x for x in files if old.get(x) != new[x] or not local[x].is_file()]

        def one(x: str) -> None:
            file = local[x]
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".partial-{file.name}")
            try:
                info = files[x] or _info(x, options)
                with partial.open("wb") as handle:
                    download(x, options, info, handle, partial)
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)

        if wanted:
            log.info("%s: %d of %d files are copied to %s", url, len(wanted), len(files), target)
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            list(pool.map(one, wanted))
        record.write_text(json.dumps(new))
    return target


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RemoteError(f"data.shard_cache: {folder} cannot be made ({one_line(error)})") from error


def _info(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    fs, path = filesystem(url, options)
    return retried(url, lambda: fs.info(path))


def _relative(url: str, root: str) -> str:
    """Of a file below ``root``; nothing leads out of it. Empty for the root itself."""
    bare, base = (x.partition("://")[2] or x for x in (url, root))
    inner = bare.removeprefix(base).strip("/")
    if ".." in PurePosixPath(inner).parts:
        raise RemoteError(f"{url}: its name leads out of its folder")
    return inner
