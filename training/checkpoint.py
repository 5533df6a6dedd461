"""Checkpoints: written beside and renamed, complete, hashed; a half-written one is never seen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what can be done."""


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
    shutil.rmtree(old, ignore_errors=True)


def save(root: Path, images: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep_last: int) -> Path:
    """Write ``root/images_000012345`` and delete all but the newest ``keep_last``.

    Args:
        tensors: file name -> flat state dict, each written as NAME.safetensors.
        state: what is not tensors, as JSON.
    Raises:
        OSError: the disk is full; what was there before is intact and nothing half-written is left.
    """
    final = root / f"images_{images:09d}"
    partial = root / (final.name + ".partial")
    for left in root.glob("images_*.*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, flat in tensors.items():
            save_file({k: v.detach().contiguous().clone() for k, v in flat.items()}, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        hashes = {f.name: file_hash(f) for f in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(hashes, indent=1))
        replace_folder(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in listed(root)[:-keep_last]:
        shutil.rmtree(old.rename(old.with_name(old.name + ".old")))  # renamed: no longer listed while it goes
    return final


def listed(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(
        p for p in root.glob("images_*") if p.name.removeprefix("images_").isdigit() and (p / MANIFEST).is_file()
    )


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint after checking every file against the manifest.

    Raises:
        CheckpointError: a file is missing or its bytes have changed; the previous checkpoint is named.
    """
    earlier = [p for p in listed(folder.parent) if p < folder]
    way_out = f"delete the folder to go on from {earlier[-1]}" if earlier else "delete the folder to start anew"
    try:
        hashes: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST}: damaged ({error}); {way_out}") from error
    for name, expected in hashes.items():
        file = folder / name
        if not file.is_file() or file_hash(file) != expected:
            raise CheckpointError(f"{file}: missing or damaged (hash differs from {MANIFEST}); {way_out}")
    tensors = {Path(name).stem: load_file(folder / name) for name in hashes if name.endswith(".safetensors")}
    return tensors, json.loads((folder / "state.json").read_text())
