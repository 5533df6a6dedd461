"""Rows, encoders and configs that the cache and its batches are tested with."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.text import TextEncoder
from ldm.models.vae import VAE
from tests import tiny
from training.cache import Caches, Together, open_caches
from training.encoders import Encoders
from training.schema import Data
from training.schema.cache import Cache

SHAPES = [(16, 16), (8, 24), (24, 8)]
CAPTIONS = ["a red apple", "", "zebra", "hot dog", "a cat's face"]


class Bucketed:
    """Pictures of random bytes in three shapes, one to three captions each."""

    def __init__(self, total: int = 14, seed: int = 0, masked: bool = False):
        generator = torch.Generator().manual_seed(seed)
        self.shapes, self.masked, self.data = SHAPES, masked, Data(path="unused")
        self.bucket = np.arange(total, dtype=np.uint16) % 3
        self.bytes = [
            torch.randint(0, 256, (3, *SHAPES[b]), generator=generator, dtype=torch.uint8) for b in self.bucket
        ]
        self.texts = [tuple(CAPTIONS[(i + k) % len(CAPTIONS)] for k in range(1 + i // 3 % 3)) for i in range(total)]

    @property
    def captions(self) -> list[str]:
        return [x[0] for x in self.texts]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(map(self.digest, range(len(self)))) + repr(self.texts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.bytes)

    def pictures(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self.bytes[i] for i in indices])

    def digest(self, i: int) -> bytes:
        return hashlib.blake2b(self.bytes[i].numpy().tobytes() + bytes(self.bucket[i : i + 1]), digest_size=16).digest()

    def mask_digest(self, index: int) -> bytes:
        masks = self.masks([index])
        told = b"none" if masks is None else masks.numpy().tobytes() + bytes(self.bucket[index : index + 1])
        return hashlib.blake2b(told, digest_size=16).digest()

    def size_ids(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor([[100.0 + i, 200.0, i, 0.0, *SHAPES[self.bucket[i]]] for i in indices])

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        if not self.masked:
            return None
        return torch.stack([(self.bytes[i][:1] > 100).float() for i in indices])


def text_of(name: str) -> TextEncoder:
    """Of a family in ``families.PIPELINES``."""
    from tests import families  # here: it takes seconds to import

    pipe: Any = families.PIPELINES[name]()
    family = name.split()[0]
    towers = {}
    for i in ("", "_2", "_3"):
        if getattr(pipe, f"text_encoder{i}", None) is not None:
            towers[f"text_encoder{i}"] = (getattr(pipe, f"tokenizer{i}"), getattr(pipe, f"text_encoder{i}"))
    joint = families.T5_WIDTH if family == "sd3" else None
    short = {"max_sequence_length": 20} if family in ("sd3", "pixart") else {}
    return TextEncoder.from_towers(towers, family, joint, zeros_for_empty="no zeros" not in name, **short).eval()


class Given(Encoders):
    """Encoders that are there already."""

    def __init__(self, vae: VAE | None = None, text: TextEncoder | None = None):
        self._vae, self._text, self.device = vae or tiny.vae(), text or tiny.text(), torch.device("cpu")


def made(
    root: Path,
    rows: Any,
    encoders: Encoders | None = None,
    *,
    flip: bool = False,
    together: Together | None = None,
    long_captions: str = "cut",
    **how: Any,
) -> tuple[Caches, dict[str, int]]:
    """The caches of one split."""
    config: Any = SimpleNamespace(
        output_dir=str(root), cache=Cache(dir=str(root), **how), data=SimpleNamespace(long_captions=long_captions)
    )
    encoders = encoders or Given()
    caches, counts = open_caches(config, [(rows, flip)], encoders, encoders.about(), together or Together())
    return caches[0], counts


def forked(work: Callable[[Connection], None]) -> tuple[Any, Connection]:
    """Another process that has all that this one has, and a pipe to it: it starts at once, without a single import."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=work, args=(there,))
    gc.freeze()  # a destructor of what is this process's could wait for a thread that the child has not
    child.start()
    gc.unfreeze()
    there.close()
    return child, here


def all_of(caches: Caches, rows: Bucketed, sides: int = 1) -> dict[str, bytes]:
    """Every number in the cache, row by row."""
    assert caches.latents and caches.texts
    found = [caches.latents(np.array([i]), s).numpy().tobytes() for i in range(len(rows)) for s in range(sides)]
    out = {"moments": b"".join(found)}
    for i, texts in enumerate(rows.texts):
        for k in range(len(texts)):
            for name, x in caches.texts(np.array([i]), np.array([k])).items():
                out[name] = out.get(name, b"") + x.numpy().tobytes()
    null = caches.texts(np.array([0]), np.array([0]), np.array([True]))
    return out | {f"null {name}": x.numpy().tobytes() for name, x in null.items()}
