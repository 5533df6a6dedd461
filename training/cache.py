"""Latents and text embeddings, computed once and kept beside the run, keyed by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from rich.progress import track
from torch import nn

from ldm.cond import Cond
from ldm.models.text import TextEncoder
from ldm.models.vae import VAE

from .batches import Encoded, Pictures, to_unit
from .checkpoint import replace_folder

log = logging.getLogger(__name__)


def weights_hash(*modules: nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def encode(
    rows: Pictures, fingerprint: str, vae: VAE, text: TextEncoder, root: Path, *, flip: bool = False, batch: int = 32
) -> Encoded:
    """The rows' moments and captions through the encoders, from ``root/KEY`` where they are there already.

    Args:
        fingerprint: of the rows' content.
        flip: also encode the mirrored pictures.
        batch: pictures per call of the autoencoder.
    """
    about = {
        "rows": fingerprint,
        "vae": weights_hash(vae),
        "text": weights_hash(text.model),
        "family": [text.family, text.width, text.max_length],
        "flip": flip,
    }
    folder = root / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _encode_pictures(partial / "moments.npy", rows, vae, flip, batch)
        _encode_captions(partial, rows.captions, text, batch)
        (partial / "about.json").write_text(json.dumps(about, indent=1))
        replace_folder(partial, folder)
    arrays: dict[str, Any] = {f.stem: np.load(f, mmap_mode="r") for f in folder.glob("*.npy")}
    return Encoded(**arrays)


def _encode_pictures(file: Path, rows: Pictures, vae: VAE, flip: bool, batch: int) -> None:
    total, out = len(rows), None
    for first in track(range(0, total, batch), description="encoding pictures", transient=True):
        pictures = to_unit(rows.pictures(list(range(first, min(first + batch, total))))).to(vae.device, vae.dtype)
        for side in range(1 + flip):
            moments = vae.encode(pictures.flip(-1) if side else pictures)
            both = torch.cat([moments.mean, moments.log_var], dim=1).float().cpu().numpy()  # (B, 2C, h, w)
            if out is None:
                out = open_memmap(file, "w+", dtype=np.float32, shape=(total * (1 + flip), *both.shape[1:]))
            out[side * total + first : side * total + first + len(both)] = both
    if out is not None:
        out.flush()


def _encode_captions(folder: Path, captions: Iterable[str], text: TextEncoder, batch: int) -> None:
    captions = list(captions)
    distinct = [c for c in dict.fromkeys(captions) if c] + [""]
    number = {caption: i for i, caption in enumerate(distinct)}
    cut = sum(n > text.max_length for n in text.count_tokens(distinct))
    if cut:
        log.warning("%d captions have more than %d tokens; their ends are cut", cut, text.max_length)
    parts = [text.encode(distinct[i : i + batch]) for i in range(0, len(distinct), batch)]
    np.save(folder / "caption.npy", np.array([number[c] for c in captions]))
    together = Cond.cat(parts)
    np.save(folder / "tokens.npy", together.tokens.float().cpu().numpy())
    if together.pooled is not None:
        np.save(folder / "pooled.npy", together.pooled.float().cpu().numpy())
    if together.bias is not None:
        np.save(folder / "bias.npy", together.bias.float().cpu().numpy())
