"""Checkpoints on an object store: copied there in the background, and brought back on a fresh machine.

``URL/images_000012345/…`` as in the run's own ``checkpoints``, with ``URL/config.yaml`` beside them. The
manifest, which holds the hash of every file, is written last and removed first: a folder without one is
not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from .checkpoint import BEST, MANIFEST, Keep, images_of, listed, problem, replace_folder, superfluous
from .remote import RemoteError, download, filesystem, retried

log = logging.getLogger(__name__)
CONFIG = "config.yaml"
STAGED = ".mirror"  # hard links to what is being uploaded, in the folder of the checkpoints


class Mirror:
    """The mirror of one run.

    Args:
        url: of the run's folder there, as fsspec reads it; credentials come from the environment.
        run: the run's own folder.
    Raises:
        RemoteError: no such kind of URL, or a package that is not installed.
    """

    def __init__(self, url: str, run: Path):
        self.url, self.root = url.rstrip("/"), run / "checkpoints"
        self._fs, self._path = filesystem(self.url, {})
        self._lock, self._pool = Lock(), ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._staged: tuple[Path, Keep] | None = None
        self._pending: Future[None] | None = None

    # --- there ---

    def check(self) -> None:
        """Raises RemoteError where nothing can be written: no such bucket, access denied, no connection."""
        self._put(b"", ".probe")
        self._remove(".probe")

    def config(self) -> str | None:
        """The config of the run that is mirrored there, if any."""
        file = f"{self._path}/{CONFIG}"
        found = retried(self.url, lambda: self._fresh().exists(file))
        return retried(f"{self.url}/{CONFIG}", lambda: self._fs.cat_file(file)).decode() if found else None

    def put_config(self, text: str) -> None:
        self._put(text.encode(), CONFIG)

    def names(self) -> list[str]:
        """Complete checkpoints, oldest first."""
        found = retried(self.url, lambda: self._fresh().glob(f"{self._path}/images_*/{MANIFEST}"))
        names = {PurePosixPath(x).parent.name for x in found}
        return sorted((x for x in names if re.fullmatch(r"images_\d+", x)), key=lambda x: int(x[7:]))

    # --- from here to there ---

    def push(self, folder: Path, keep: Keep) -> None:
        """Upload a checkpoint in the background; one that still waits for its turn is left out for it.

        Args:
            keep: which checkpoints stay on the mirror.
        """
        staged = self.root / STAGED / folder.name
        with self._lock:
            if self._staged is not None:
                shutil.rmtree(self._staged[0], ignore_errors=True)
            shutil.rmtree(staged, ignore_errors=True)
            # Links cost no room, and the run may delete the checkpoint meanwhile.
            shutil.copytree(folder, staged, copy_function=_link)
            if (self.root / BEST).is_file():
                shutil.copy(self.root / BEST, staged / BEST)
            self._staged = staged, keep
        self._pending = self._pool.submit(self._upload_staged)

    def wait(self) -> None:
        """Until everything is uploaded, or has failed."""
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()
        with suppress(OSError):
            (self.root / STAGED).rmdir()

    def _upload_staged(self) -> None:
        with self._lock:
            if self._staged is None:
                return
            (staged, keep), self._staged = self._staged, None
            working = staged.with_name(f"{staged.name}.uploading")
            shutil.rmtree(working, ignore_errors=True)
            staged.rename(working)
        try:
            self._upload(working, staged.name, keep)
        except Exception as error:  # the run is worth more than its mirror
            log.error("%s: %s was not mirrored (%s); the next checkpoint will be", self.url, staged.name, error)
        finally:
            shutil.rmtree(working, ignore_errors=True)

    def _upload(self, folder: Path, name: str, keep: Keep) -> None:
        self._remove(f"{name}/{MANIFEST}")
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for inner in [*sorted(hashes), MANIFEST]:
            self._put(folder / inner, f"{name}/{inner}")
        if (folder / BEST).is_file():
            self._put(folder / BEST, BEST)
        log.info("%s: holds %s", self.url, name)
        names = self.names()
        # What is newer than the newest is of a branch of the run that was left.
        old = [x for x in names if int(x[7:]) > int(name[7:])]
        kept = [Path(x) for x in names if x not in old]
        best = self._best()
        for gone in [*old, *(x.name for x in superfluous(kept, keep, Path(best) if best else None))]:
            self._remove(f"{gone}/{MANIFEST}")
            retried(f"{self.url}/{gone}", lambda gone=gone: self._fs.rm(f"{self._path}/{gone}", recursive=True))

    def _best(self) -> str | None:
        file = f"{self._path}/{BEST}"
        if not retried(self.url, lambda: self._fresh().exists(file)):
            return None
        return json.loads(retried(f"{self.url}/{BEST}", lambda: self._fs.cat_file(file)))["folder"]

    def _put(self, content: bytes | Path, name: str) -> None:
        """A file, whose size there is looked at afterwards."""
        path, size = f"{self._path}/{name}", len(content) if isinstance(content, bytes) else content.stat().st_size

        def put() -> None:
            if isinstance(content, bytes):
                self._fs.pipe_file(path, content)
            else:
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)  # nothing to do on an object store
                self._fs.put_file(str(content), path)
            there = self._fresh().info(path)["size"]
            if there != size:
                raise ConnectionError(f"{there} of {size} bytes arrived")

        retried(f"{self.url}/{name}", put)

    def _remove(self, name: str) -> None:
        path = f"{self._path}/{name}"

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(path)

        retried(f"{self.url}/{name}", remove)

    def _fresh(self) -> Any:
        self._fs.invalidate_cache()
        return self._fs

    # --- from there to here ---

    def restore(self, config: str, beside: Collection[str] = ()) -> Path | None:
        """Bring back the newest checkpoint that is whole, where it is newer than those here.

        Of several processes of a machine one downloads it. A folder with other files is left as it is.

        Args:
            config: what ``config.yaml`` says if the run's folder is not there yet.
            beside: names that may be in the folder of a run that has not begun.
        Raises:
            RemoteError: the mirror cannot be read.
        """
        from filelock import FileLock

        digest = hashlib.blake2b(str(self.root.resolve()).encode(), digest_size=8).hexdigest()
        with FileLock(Path(tempfile.gettempdir()) / f"ldm-mirror-{digest}.lock"):
            here = max((images_of(x) for x in listed(self.root)), default=-1)
            newer = [x for x in self.names() if int(x[7:]) > here]
            written = self.root.parent / CONFIG
            if newer and not written.is_file():
                run = written.parent
                if run.exists() and any(x.name not in beside for x in run.iterdir()):
                    return None
                run.mkdir(parents=True, exist_ok=True)
                first = run.with_name(f".{run.name}.{socket.gethostname()}-{os.getpid()}")
                first.write_text(config, encoding="utf-8")
                first.replace(written)  # at once: other machines may be looking
            for name in reversed(newer):
                if self._restore(name):
                    return self.root / name
        return None

    def _restore(self, name: str) -> bool:
        final = self.root / name
        partial = self.root / f"{name}.{socket.gethostname()}-{os.getpid()}"
        log.info("%s/%s: is copied to %s", self.url, name, self.root)
        try:
            partial.mkdir(parents=True)
            self._get(f"{name}/{MANIFEST}", partial / MANIFEST)
            for inner in json.loads((partial / MANIFEST).read_text(encoding="utf-8")):
                path = PurePosixPath(inner)
                if path.is_absolute() or ".." in path.parts:
                    raise RemoteError(f"{self.url}/{name}/{MANIFEST}: names a file outside of it, {inner!r}")
                (partial / inner).parent.mkdir(parents=True, exist_ok=True)
                self._get(f"{name}/{inner}", partial / inner)
            if (damage := problem(partial)) is not None:
                log.warning("%s/%s: is not used, an older one is tried: %s", self.url, name, damage)
                return False
            if not final.exists():  # else another machine was faster
                replace_folder(partial, final)
            return True
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, RemoteError) and "no such file" not in str(error):
                raise
            log.warning("%s/%s: is not used, an older one is tried: %s", self.url, name, error)
            return False
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _get(self, name: str, target: Path) -> None:
        url = f"{self.url}/{name}"
        info = retried(url, lambda: self._fresh().info(f"{self._path}/{name}"))
        with target.open("wb") as file:
            download(url, {}, info, file, target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
