"""What was found out about a large source is kept beside the Arrow files of ``datasets``, for the next process and run.

Known again by the names, sizes and times of its files: where any of them changes, all is looked at anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
VERSION = 1  # of what is kept


def state_of(files: Iterable[str | Path]) -> str:
    """A digest of where files lie, how large they are and when they were written; an absent one counts too."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            about = os.stat(file)
            digest.update(f"{file}\0{about.st_size} {about.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        except OSError:
            digest.update(f"{file}\0\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def remembered(about: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that ``make`` gives, from disk if it gave them before. Of several processes one makes, and the others
    wait for it.

    Args:
        about: all that the arrays depend on.
    """
    from datasets import config
    from filelock import FileLock

    folder = Path(config.HF_DATASETS_CACHE) / "latent_t2i_index"
    name = hashlib.blake2b(f"{VERSION} {about}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("%s: cannot be written (%s); what is found out about the data is not kept", folder, error)
        return make()
    file = folder / f"{name}.npz"
    with FileLock(folder / f"{name}.lock"):
        if file.is_file():
            try:
                with np.load(file, allow_pickle=False) as kept:
                    return dict(kept)
            except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
                log.warning("%s: cannot be read (%s); it is made anew", file, error)
        arrays = make()
        beside = file.with_suffix(f".{os.getpid()}.partial")
        try:
            with beside.open("wb") as out:
                np.savez(out, **arrays)  # type: ignore[arg-type]
            os.replace(beside, file)
        except OSError as error:
            beside.unlink(missing_ok=True)
            log.warning("%s: cannot be written (%s); what is found out about the data is not kept", file, error)
        return arrays
