"""Raw latents are what is stored; shift and scale are applied just in time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LatentScale(NamedTuple):
    """z = (raw - shift) * scale has zero mean and unit variance (diffusers' ``shift_factor``, ``scaling_factor``)."""

    scale: float = 1.0
    shift: float = 0.0

    def normalize(self, raw: Tensor) -> Tensor:
        return (raw - self.shift) * self.scale

    def denormalize(self, z: Tensor) -> Tensor:
        return z / self.scale + self.shift

    @classmethod
    def measure(cls, raw: Tensor, *, with_shift: bool) -> LatentScale:
        """From raw latents (N, C, H, W). Without a shift the second moment is brought to 1, mean included:
        SD's, SDXL's and PixArt's stock pipelines ignore ``shift_factor``."""
        raw = raw.double()
        shift = raw.mean().item() if with_shift else 0.0
        return cls(scale=1.0 / torch.sqrt(torch.mean((raw - shift) ** 2)).item(), shift=shift)
