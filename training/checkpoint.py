"""Checkpoints: written beside and renamed, complete, hashed; a half-written one is never seen. No pickle, ever."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from . import sharded, tensor_files
from .tensor_files import Stored

if TYPE_CHECKING:
    from .mirror import Mirror

MANIFEST = "manifest.json"
BEST = "best.json"
Files = dict[str, dict[str, Tensor]]  # file name -> flat state dict


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what can be done."""


class Keep(NamedTuple):
    """Which checkpoints stay: the newest ``last``, the first of every ``every`` images, and the one in best.json."""

    last: int
    every: int | None = None


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def replace_folder(partial: Path, final: Path) -> None:
    """Put a folder that is complete in the place of ``final``; at no moment is ``final`` half written.

    Raises:
        OSError: it cannot be put there; ``final`` is as it was.
    """
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    _sync_folder(final.parent)  # the names too survive a loss of power
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- writing ---------------------------------------------------------------------------------------------------------


def save(root: Path, images: int, tensors: Files, state: dict[str, Any], keep: Keep, best: Any = None) -> Path:
    """Write ``root/images_000012345`` and delete those that ``keep`` does not hold.

    One tensor at a time is copied to the host, written and hashed. Where tensors are sharded
    (DTensor), every process calls this, and each writes its own shards.

    Args:
        tensors: each written as NAME.safetensors, or as a folder NAME of such files where they are
            sharded.
        state: what is not tensors, as JSON.
        best: what made this the best one so far; written to ``root/best.json``, which then names
            this folder.
    Raises:
        OSError: the disk is full; what was there before is intact and nothing half-written is left.
    """
    final = root / f"images_{images:09d}"
    partial = root / (final.name + ".partial")
    main, split = sharded.is_main(), [k for k, flat in tensors.items() if sharded.is_split(flat)]
    try:
        hashes = _write_tensors(partial, tensors, split)
        if not main:
            return final
        text = json.dumps(state, indent=1).encode()
        (partial / "state.json").write_bytes(text)
        hashes["state.json"] = hashlib.sha256(text).hexdigest()
        manifest = {name: hashes[name] for name in sorted(hashes)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        replace_folder(partial, final)
        if best is not None:
            beside = root / "best.json.partial"
            beside.write_text(json.dumps({"folder": final.name, "best": best}), encoding="utf-8")
            beside.replace(root / BEST)
    except OSError as error:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{final}: could not be written ({error}); the checkpoints before it are whole: "
            "make room, and the same command goes on from them"
        ) from error
    except BaseException:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in superfluous(listed(root), keep, best_of(root)):
        shutil.rmtree(old.rename(old.with_name(old.name + ".old")))  # renamed: no longer listed while it goes
    return final


def _write_tensors(partial: Path, tensors: Files, split: Collection[str]) -> dict[str, str]:
    """The tensor files in a new folder. Hashes by file: on the main process of all files.

    Args:
        split: names of those that are sharded.
    Raises:
        OSError: a file could not be written, by this process or, on the main one, by any.
    """
    hashes: dict[str, str] = {}
    error: OSError | None = None
    main = sharded.is_main()
    try:
        if main:
            for left in partial.parent.glob("images_*.*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
            for name in tensors.keys() - set(split):
                file = f"{name}.safetensors"
                hashes[file] = tensor_files.write(partial / file, tensors[name])
            for name in split:
                (partial / name).mkdir()
    except OSError as caught:
        error = caught
    if split:
        sharded.barrier()  # the folders are there; where they are not, the others fail too
        try:
            for name in split:
                written = sharded.save(partial / name, tensors[name])
                hashes |= {f"{name}/{file}": digest for file, digest in written.items()}
        except OSError as caught:
            error = error or caught
        everyone = sharded.gather_objects((hashes, error and str(error)))
        hashes = {file: digest for part, _ in everyone for file, digest in part.items()}
        if main and error is None:
            error = next((OSError(text) for _, text in everyone if text), None)
    if error is not None:
        raise error
    return hashes


def superfluous(found: list[Path], keep: Keep, best: Path | None) -> list[Path]:
    """Which of the checkpoints, oldest first, ``keep`` does not hold."""
    held = set(found[-keep.last :])
    if keep.every:
        first: dict[int, Path] = {}
        for folder in found:  # oldest first
            first.setdefault(images_of(folder) // keep.every, folder)
        held |= {folder for block, folder in first.items() if block}
    if best is not None:
        held.add(best)
    return [folder for folder in found if folder not in held]


class Saver:
    """Saves in this thread, or copies to the host and writes in another; the next save, or ``close``, waits for that.

    Args:
        mirror: gets each checkpoint after it is on the disk.
    Raises:
        OSError: of ``save`` and ``close``, what the writing met with; in the background that of the save before.
    """

    def __init__(self, root: Path, keep: Keep, background: bool = False, mirror: Mirror | None = None):
        self.root, self.keep, self.mirror = root, keep, mirror
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self.pending: Future[Path] | None = None

    def save(self, images: int, tensors: Files, state: dict[str, Any], best: Any = None) -> None:
        if self.pool is None:
            self._save(images, tensors, state, best)
            return
        self._settle()
        host = {name: {k: v.detach().to("cpu", copy=True) for k, v in flat.items()} for name, flat in tensors.items()}
        state = json.loads(json.dumps(state))
        self.pending = self.pool.submit(self._save, images, host, state, best)

    def _save(self, images: int, tensors: Files, state: dict[str, Any], best: Any) -> Path:
        folder = save(self.root, images, tensors, state, self.keep, best)
        if self.mirror is not None:
            self.mirror.push(folder, self.keep)
        return folder

    def wait(self) -> None:
        """Until what was handed over is on the disk, and on the mirror."""
        self._settle()
        if self.mirror is not None:
            self.mirror.wait()

    def _settle(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            if self.pool is not None:
                self.pool.shutdown()
            if self.mirror is not None:
                self.mirror.close()


# --- reading ---------------------------------------------------------------------------------------------------------


def images_of(folder: Path) -> int:
    return int(folder.name.removeprefix("images_"))


def listed(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (p for p in root.glob("images_*") if p.name.removeprefix("images_").isdigit() and (p / MANIFEST).is_file())
    return sorted(found, key=images_of)


def best_of(root: Path) -> Path | None:
    """The checkpoint with the best held-out measure, where one is kept."""
    try:
        folder = root / json.loads((root / BEST).read_text(encoding="utf-8"))["folder"]
    except FileNotFoundError:
        return None
    return folder if (folder / MANIFEST).is_file() else None


def problem(folder: Path, needed: Collection[str] = (), rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, cut or changed, or None.

    Args:
        needed: names of the tensor files without which a run cannot go on.
        rank, world: of ``world`` processes each hashes its own part of the files.
    """
    try:
        hashes: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return f"{folder / MANIFEST}: damaged ({error})"
    gone = [name for name in hashes if not (folder / name).is_file()]
    if not gone:  # the largest files first, so that the parts are about equal
        order = sorted(hashes, key=lambda name: (-(folder / name).stat().st_size, name))
        gone = [x for x in order[rank::world] if file_hash(folder / x) != hashes[x]]
    if gone:
        return f"{folder / min(gone)}: missing or damaged (hash differs from {MANIFEST})"
    there = {name.split("/")[0].removesuffix(".safetensors") for name in hashes}
    missing = sorted({*needed, "state.json"} - there)
    return f"{folder}: has no {missing[0]}, without which a run cannot go on" if missing else None


def _shared_problem(folder: Path, needed: Collection[str]) -> str | None:
    """``problem``, the same in all processes: each file is hashed once, by one of them."""
    mine = problem(folder, needed, *sharded.rank_and_world())
    return next((x for x in sharded.gather_objects(mine) if x is not None), None)


def opened(folder: Path, needed: Collection[str] = ()) -> tuple[dict[str, Stored], dict[str, Any]]:
    """A checkpoint's tensors, to be read one by one, each process what it needs of them, and its
    state. Every file is checked against the manifest before; all processes call this together.

    Raises:
        CheckpointError: a file is missing or its bytes have changed; the newest earlier one that is
            whole is named.
    """
    if (damage := _shared_problem(folder, needed)) is not None:
        older = [p for p in reversed(listed(folder.parent)) if images_of(p) < images_of(folder)]
        earlier = next((p for p in older if not _shared_problem(p, needed)), None)
        way_out = f"go on from {earlier}" if earlier else "start anew"
        raise CheckpointError(f"{damage}; delete the folder to {way_out}")
    groups = {file.stem: [file] for file in sorted(folder.glob("*.safetensors"))}
    for inner in sorted(folder.iterdir()):
        if inner.is_dir():
            groups[inner.name] = sorted(inner.glob("*.safetensors"))
    try:
        tensors = {name: tensor_files.stored(files) for name, files in groups.items()}
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return dict(tensors), json.loads((folder / "state.json").read_text(encoding="utf-8"))


def load(folder: Path, needed: Collection[str] = ()) -> tuple[Files, dict[str, Any]]:
    """All of a checkpoint, in memory; else as ``opened``."""
    tensors, state = opened(folder, needed)
    whole = {name: {k: tensor_files.read(x) for k, x in flat.items()} for name, flat in tensors.items()}
    return whole, state


def chosen(root: Path, resume: str | Path) -> Path | None:
    """The checkpoint to go on from.

    Args:
        resume: ``auto``: the newest, if any. ``never``: none may be there. Else the folder of one; newer ones of the
            same run are put aside, under ``set_aside``, so that they are not taken for the run's newest afterwards.
    Raises:
        CheckpointError: ``never``, and there are some; or the folder is no checkpoint, or of another run than this one,
            which has its own.
    """
    found = listed(root)
    if resume == "auto":
        return found[-1] if found else None
    if resume == "never":
        if found:
            raise CheckpointError(
                f"{root}: holds checkpoints up to {found[-1].name}, and --resume never was asked for; "
                "go on from them with --resume auto, or choose another output_dir"
            )
        return None
    folder = Path(resume)
    if not (folder.name.removeprefix("images_").isdigit() and (folder / MANIFEST).is_file()):
        raise CheckpointError(f"--resume {folder}: is no checkpoint; expected a folder images_… with a {MANIFEST}")
    if folder.resolve().parent != root.resolve() and found:
        raise CheckpointError(
            f"--resume {folder}: belongs to another run, and {root} holds checkpoints of its own; choose another "
            "output_dir, or --resume auto"
        )
    return folder


def set_aside(root: Path, images: int) -> None:
    """Move what is newer than ``images`` out of the list."""
    for folder in listed(root):
        if images_of(folder) > images:
            (root / "set_aside").mkdir(exist_ok=True)
            shutil.rmtree(root / "set_aside" / folder.name, ignore_errors=True)
            folder.rename(root / "set_aside" / folder.name)
