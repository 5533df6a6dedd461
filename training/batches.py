"""Rows -> batches: what the loader hands to a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm import rng

Pairs = Sequence[tuple[int, int]]  # (image index in the run, row)


class Stream:
    """One stream of random numbers for each purpose: (seed, stream, image index) decides every draw."""

    NOISE, TIME, POSTERIOR, CAPTION, FLIP, CROP = range(6)


class Pictures(Protocol):
    @property
    def captions(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def pictures(self, indices: Sequence[int]) -> Tensor: ...  # uint8 (B, 3, H, W)


def _numbers(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(B,) image indices and (B,) rows."""
    index, row = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    return index, row


class PictureBatches(Dataset):
    """Pictures in [-1, 1], cropped and flipped by each image's own randomness, with their token ids if given.

    Args:
        rows: where the pictures come from.
        ids: (N, L) token ids of the captions.
        crop: side of a random crop, in pixels.
        flip: mirror half of the pictures.
    """

    def __init__(
        self, rows: Pictures, seed: int, *, ids: Tensor | None = None, crop: int | None = None, flip: bool = False
    ):
        self.rows, self.seed, self.ids, self.crop, self.flip = rows, seed, ids, crop, flip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, pairs: Pairs) -> dict[str, Tensor]:
        index, row = _numbers(pairs)
        pictures = self.rows.pictures(row.tolist())  # (B, 3, H, W) uint8
        if self.crop:
            pictures = random_crop(pictures, self.crop, rng.uniform(self.seed, index, (2,), Stream.CROP))
        if self.flip:
            mirrored = rng.uniform(self.seed, index, (1, 1, 1), Stream.FLIP) < 0.5
            pictures = torch.where(mirrored, pictures.flip(-1), pictures)
        batch = {"index": index, "row": row, "pictures": to_unit(pictures)}
        return batch if self.ids is None else {**batch, "ids": self.ids[row]}


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_bytes(pictures: Tensor) -> Tensor:
    """[-1, 1] -> uint8, clamped."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def random_crop(pictures: Tensor, size: int, u: Tensor) -> Tensor:
    """Crop (B, C, H, W) to (B, C, size, size) at the corners that the uniforms u (B, 2) choose."""
    room = torch.tensor([pictures.shape[2] - size + 1, pictures.shape[3] - size + 1])
    corner = (u * room).long()  # (B, 2)
    span = torch.arange(size)
    y, x = corner[:, :1] + span, corner[:, 1:] + span  # (B, size) each
    batch = torch.arange(len(pictures))[:, None, None]
    return pictures[batch, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


class Encoded(NamedTuple):
    """A data set after its encoders, memory-mapped. The last caption is the empty one.

    moments: (F·N, 2C, h, w) means and log variances of the raw latents; the second N are the mirrored pictures.
    tokens: (U, L, D) of the distinct captions; pooled: (U, P); bias: (U, L).
    caption: (N,) which of them a row has.
    """

    moments: np.ndarray
    tokens: np.ndarray
    caption: np.ndarray
    pooled: np.ndarray | None = None
    bias: np.ndarray | None = None


class LatentBatches(Dataset):
    """Cached moments and text embeddings; captions are dropped to the empty one for classifier-free guidance.

    Args:
        encoded: the cache.
        dropout: share of images whose caption is dropped (Ho and Salimans 2022, alg. 1).
    """

    def __init__(self, encoded: Encoded, seed: int, *, dropout: float = 0.0, flip: bool = False):
        self.encoded, self.seed, self.dropout, self.flip = encoded, seed, dropout, flip

    def __len__(self) -> int:
        return len(self.encoded.caption)

    def __getitems__(self, pairs: Pairs) -> dict[str, Tensor]:
        index, row = _numbers(pairs)
        picture, caption = row.numpy(), self.encoded.caption[row.numpy()]
        if self.flip:
            mirrored = rng.uniform(self.seed, index, (), Stream.FLIP).numpy() < 0.5
            picture = np.where(mirrored, picture + len(self), picture)
        if self.dropout:
            dropped = rng.uniform(self.seed, index, (), Stream.CAPTION).numpy() < self.dropout
            caption = np.where(dropped, len(self.encoded.tokens) - 1, caption)
        batch = {"index": index, "row": row, "moments": torch.from_numpy(self.encoded.moments[picture])}
        batch["tokens"] = torch.from_numpy(self.encoded.tokens[caption])
        if self.encoded.pooled is not None:
            batch["pooled"] = torch.from_numpy(self.encoded.pooled[caption])
        if self.encoded.bias is not None:
            batch["bias"] = torch.from_numpy(self.encoded.bias[caption])
        return batch
