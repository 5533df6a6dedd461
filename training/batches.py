"""Rows -> batches: what the loader hands to a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ldm import rng
from ldm.models.long_text import joined

from .captions import chosen
from .schema import Data
from .store import Reader

Pairs = Sequence[tuple[int, int]]  # (image index in the run, row)


class Stream:
    """One stream of random numbers for each purpose: (seed, stream, image index) decides every draw."""

    NOISE, TIME, POSTERIOR, CAPTION, FLIP, CROP, VARIANT, TAGS = range(8)
    OFFSET, PERTURBATION, MASK, SHOWN, LEVEL = range(8, 13)


class Pictures(Protocol):
    @property
    def captions(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def pictures(self, indices: Sequence[int]) -> Tensor: ...  # uint8 (B, 3, H, W)


class Captioned(Pictures, Protocol):
    """Rows in buckets of one shape each, as ``data.Rows`` has them."""

    @property
    def data(self) -> Data: ...
    @property
    def shapes(self) -> Sequence[tuple[int, int]]: ...  # of the buckets, in pixels
    @property
    def bucket(self) -> np.ndarray: ...  # (N,)
    @property
    def texts(self) -> Sequence[tuple[str, ...]]: ...  # every row's captions
    @property
    def fingerprint(self) -> str: ...
    def digest(self, i: int) -> bytes: ...  # 16 bytes, of the picture and how it is cut
    def mask_digest(self, index: int) -> bytes: ...  # 16 bytes, of the mask and how it is cut
    def size_ids(self, indices: Sequence[int]) -> Tensor: ...  # (B, 6)
    def masks(self, indices: Sequence[int]) -> Tensor | None: ...  # (B, 1, H, W) in [0, 1]


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


# --- latents and text ------------------------------------------------------------------------------------------------


class CachedRows:
    """One field of a store by row: a picture's moments, or its mask.

    Args:
        slots: (N, sides): in ``reader``, of each row as it is and, with two sides, mirrored.
    """

    def __init__(self, reader: Reader, slots: np.ndarray, field: str):
        self.reader, self.slots, self.field = reader, slots, field

    def __call__(self, row: np.ndarray, side: np.ndarray | int = 0) -> Tensor:
        return self.reader.gather(self.slots[row, side])[self.field]


class CachedTexts:
    """Text embeddings by row and caption.

    Args:
        slots: (P,) in ``reader`` of all rows' captions, one row after the other; of a caption in pieces, each piece.
        starts: (N + 1,) where each row's captions begin among all M of them, and the end.
        null: slot of the null prompt.
        parts: (M + 1,) where each caption's pieces begin among the slots, and the end; None where each is one.
        length: tokens of a piece, as ``joined`` has them.
    """

    def __init__(
        self,
        reader: Reader,
        slots: np.ndarray,
        starts: np.ndarray,
        null: int,
        parts: np.ndarray | None = None,
        length: int = 0,
    ):
        self.reader, self.slots, self.starts, self.null = reader, slots, starts, null
        self.parts, self.length = parts, length

    def __call__(self, row: np.ndarray, caption: np.ndarray, dropped: np.ndarray | None = None) -> dict[str, Tensor]:
        at = self.starts[row] + caption  # (B,)
        dropped = np.zeros(len(row), bool) if dropped is None else dropped
        if self.parts is None:
            return self.reader.gather(np.where(dropped, self.null, self.slots[at]))
        counts = np.where(dropped, 1, self.parts[at + 1] - self.parts[at])
        piece = np.arange(counts.max())  # (K,)
        slots = self.slots[np.minimum(self.parts[at][:, None] + piece, len(self.slots) - 1)]  # (B, K)
        slots = np.where(dropped[:, None] | (piece >= counts[:, None]), self.null, slots)
        found = self.reader.gather(slots.reshape(-1))
        found = {k: x.unflatten(0, slots.shape) for k, x in found.items()}
        return joined(found, torch.from_numpy(counts), self.length)


class LatentBatches(Dataset):
    """What the denoiser trains on: from the cache, or pictures and captions for the task to encode.

    A batch has ``moments`` (B, 2C, h, w) of the raw latents, means and log variances, or ``pictures`` (B, 3, H, W) in
    [-1, 1]; ``tokens`` (B, L, D) with ``pooled`` (B, P) and ``bias`` (B, L) where there are such, or ``captions``, a
    list of text; ``size_ids`` (B, 6) if asked for; ``mask`` (B, 1, h, w) where the rows have masks; ``loss_weight``
    (B,) where the rows count differently. What a network is shown beside the latents is made of ``pictures``, of
    ``hint`` (B, 3, H, W) in [-1, 1] and of ``pixel_mask`` (B, 1, H, W) in [0, 1], where they are asked for.

    Args:
        rows: whose shapes differ between buckets only; a batch is of one bucket.
        factor: pixels per latent.
        latents, texts, masks: the caches; None for what is encoded by the task.
        dropout: share of images whose embedding becomes the null prompt's, for classifier-free guidance (Ho and
            Salimans 2022, alg. 1). Captions that the task encodes are dropped there, by ``dropped``.
        flip: mirror half of the pictures.
        sizes: tell SDXL's size conditions.
        pictures: give them even where the latents are cached.
        hints: the rows' second pictures, uint8 (B, 3, H, W).
        pixel_masks: give the rows' masks as they are; then they are no ``mask`` of the loss.
    """

    def __init__(
        self,
        rows: Captioned,
        seed: int,
        *,
        factor: int = 8,
        latents: CachedRows | None = None,
        texts: CachedTexts | None = None,
        masks: CachedRows | None = None,
        dropout: float = 0.0,
        flip: bool = False,
        sizes: bool = False,
        pictures: bool = False,
        hints: Callable[[Sequence[int]], Tensor] | None = None,
        pixel_masks: bool = False,
    ):
        self.rows, self.seed, self.factor, self.dropout, self.flip, self.sizes = (
            rows,
            seed,
            factor,
            dropout,
            flip,
            sizes,
        )
        self.latents, self.texts, self.masks = latents, texts, masks
        self.pictures, self.hints, self.pixel_masks = pictures or latents is None, hints, pixel_masks
        self.masked = masks is not None or (latents is None and rows.masks([0]) is not None)
        self.loss_weights = getattr(rows, "loss_weights", None)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bucket(self) -> np.ndarray:
        return self.rows.bucket

    def __getitems__(self, pairs: Pairs) -> dict[str, Any]:
        index, row = _numbers(pairs)
        at = row.numpy()
        u_flip, u_caption, u_variant = uniforms(self.seed, index.numpy(), Stream.FLIP, Stream.CAPTION, Stream.VARIANT)
        mirrored = (u_flip < 0.5) & self.flip  # (B,)
        batch: dict[str, Any] = {"index": index, "row": row}
        if self.pictures:
            batch["pictures"] = to_unit(_mirror(self.rows.pictures(at.tolist()), mirrored))
        if self.hints is not None:
            batch["hint"] = to_unit(_mirror(self.hints(at.tolist()), mirrored))
        if self.latents is not None:
            batch["moments"] = self.latents(at, mirrored.astype(np.int64) if self.flip else 0)
        if self.texts is None:
            texts = [self.rows.texts[i] for i in at.tolist()]
            batch["captions"] = chosen(texts, index, self.seed, self.rows.data)
        else:
            variant = _one_of(u_variant, self.texts.starts[at + 1] - self.texts.starts[at])
            batch |= self.texts(at, variant, u_caption < self.dropout if self.dropout else None)
        if self.pixel_masks:
            batch["pixel_mask"] = _mirror(_given(self.rows.masks(at.tolist())), mirrored)
        elif self.masked:
            mask = self.masks(at) if self.masks else latent_masks(self.rows, at.tolist(), self.factor)
            batch["mask"] = _mirror(mask, mirrored)
        if self.sizes:
            batch["size_ids"] = self.rows.size_ids(at.tolist())
        if self.loss_weights is not None and (counts := self.loss_weights(at.tolist())) is not None:
            batch["loss_weight"] = counts
        return batch


def uniforms(seed: int, index: np.ndarray, *streams: int) -> np.ndarray:
    """``rng.uniform(seed, index, (), stream)`` of several streams at once, (S, B): the same bits in a quarter of the
    time, of which a small batch would else take most."""
    words: Any = (np.zeros((1, 1), np.int64), np.array(streams)[:, None], index & rng.WORD, (index >> 32) & rng.WORD)
    word = rng.philox(words, (seed & rng.WORD, seed >> 32))[0]
    return (((word >> 9) + 0.5) * 2**-23).astype(np.float32)


def dropped(seed: int, index: Tensor, share: float) -> Tensor:
    """(B,) which images' captions become the null prompt."""
    return rng.uniform(seed, index, (), Stream.CAPTION) < share


def latent_masks(rows: Captioned, indices: Sequence[int], factor: int) -> Tensor:
    """The rows' masks (B, 1, h, w): each latent's is the mean over its pixels."""
    return F.avg_pool2d(_given(rows.masks(indices)).float(), factor)


def _given(masks: Tensor | None) -> Tensor:
    if masks is None:
        raise ValueError("masks: some rows have them, others not")
    return masks


def _one_of(u: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Uniforms in (0, 1) -> whole numbers below the counts. In float64: float32 would round up to the count."""
    return (u.astype(np.float64) * counts).astype(np.int64)


def _mirror(pictures: Tensor, mirrored: np.ndarray) -> Tensor:
    if not mirrored.any():
        return pictures
    return torch.where(torch.from_numpy(mirrored)[:, None, None, None], pictures.flip(-1), pictures)
