"""What drawings are compared with: real pictures' features, computed once; and what is asked for: their captions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data import DataError, Rows
from ..encoders import weights_hash
from ..pictures import decode
from ..sources import pictures_in
from .features import extract

log = logging.getLogger(__name__)
VERSION = 1  # of how features are made of pictures
MOST = 50_000  # real pictures, as many as published numbers are from
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class Real(NamedTuple):
    """Rows of a data set and the features (N, F) of these; ``chosen``: their numbers in ``rows``."""

    rows: Rows
    chosen: list[int]
    features: Tensor


def real(rows: Rows, net: nn.Module, name: str, batch_size: int, cache: Path | None, progress: Progress) -> Real:
    """Features of at most ``MOST`` rows, which a fixed seed chooses: from the cache, where nothing has changed.

    They are found there by the content of the pictures, how these are cut, and the network's weights.

    Args:
        name: of the network.
        cache: folder; None: they are not kept.
    """
    chosen = list(range(len(rows)))
    if len(rows) > MOST:
        chosen = sorted(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MOST].tolist())
    digest = hashlib.sha256(f"{VERSION} {name} {weights_hash(net)} {rows.shapes} {rows.center_crop}".encode())
    digest.update(str(getattr(net, "kind", "")).encode())
    for buffer in net.buffers():  # how pictures are normalized is not saved with the weights
        digest.update(buffer.cpu().contiguous().numpy().tobytes())
    digest.update(rows.content()[chosen].tobytes())
    digest.update(np.ascontiguousarray(rows.bucket[chosen]).tobytes())
    file = cache / f"{digest.hexdigest()[:32]}.safetensors" if cache else None
    kept = _kept(file, len(chosen)) if file else None
    if kept is None:
        kept = _features(net, lambda some: rows.pictures([chosen[i] for i in some]), len(chosen), batch_size, progress)
        if file:
            _keep(file, kept)
    return Real(rows, chosen, kept)


def _features(
    net: nn.Module, pictures: Callable[[range], Tensor], count: int, batch_size: int, progress: Progress
) -> Tensor:
    found = []
    for start in range(0, count, batch_size):
        some = range(start, min(start + batch_size, count))
        found.append(extract(net, pictures(some), batch_size))
        progress("looking at real pictures", some[-1] + 1, count)
    return torch.cat(found)


def _kept(file: Path, count: int) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        found = load_file(file)["features"]
    except (SafetensorError, OSError, KeyError) as error:
        log.warning("%s: cannot be read (%s); it is made anew", file, error)
        return None
    return found if found.ndim == 2 and len(found) == count else None


def _keep(file: Path, features: Tensor) -> None:
    beside = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": features.contiguous()}, beside)
        os.replace(beside, file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            beside.unlink()
        log.warning("%s: cannot be written (%s); the next time looks at all real pictures again", file, error)


class Prompt(NamedTuple):
    text: str
    held_out: bool  # no training row has it


def prompt_order(train: Rows, held_out: Rows | None, seed: int) -> list[Prompt]:
    """All different captions in an order that the seed chooses, those that training never saw first."""
    known = list(dict.fromkeys(train.captions))
    seen = set(known)
    new = [] if held_out is None else [x for x in dict.fromkeys(held_out.captions) if x not in seen]
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(texts[i], texts is new)
        for texts in (new, known)
        for i in torch.randperm(len(texts), generator=generator).tolist()
    ]


class Drawn(NamedTuple):
    """Pictures that lie in files, and the prompts that they were drawn for, where these are known."""

    files: list[Path]
    prompts: list[Prompt] | None

    def pictures(self, some: range | list[int], side: int) -> Tensor:
        """uint8 (B, 3, side, side)."""
        found = []
        for i in some:
            try:
                found.append(torch.from_numpy(decode(self.files[i].read_bytes(), side)))
            except ValueError as error:
                raise ValueError(f"{self.files[i]}: {error}") from error
        return torch.stack(found)


def drawn_already(folder: Path, known: set[str] | None = None) -> Drawn:
    """A folder of pictures, with the captions of its metadata.jsonl (``file_name``, ``text``) where it has one.

    Args:
        known: captions of training; None: nothing is said of which prompts are held out.
    Raises:
        ValueError: no picture in it, or a metadata.jsonl that does not say which text each was drawn for.
    """
    files = [Path(file) for file in pictures_in(folder)]
    if not files:
        raise ValueError(f"{folder}: no pipeline (model_index.json) and no pictures in it")
    table = folder / "metadata.jsonl"
    if not table.is_file():
        return Drawn(files, None)
    try:
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = {str(folder / row["file_name"]): str(row["text"]) for row in rows}
        asked = [texts[str(file)] for file in files]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{table}: expected file_name and text of every picture beside it ({error!r})") from error
    return Drawn(files, [Prompt(text, known is not None and text not in known) for text in asked])
