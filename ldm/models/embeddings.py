"""Time and position as vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Tensor:
    """Sinusoids of t (DDPM, after Vaswani et al. 2017, §3.5).

    Args:
        t: (B,) in the network's own units (SD's networks: 0 to 1000).
        dim: even width of the result.
    Returns:
        (B, dim) float32: cosines first where ``flip_sin_to_cos``.
    """
    half = dim // 2
    rates = torch.exp(-math.log(1e4) * torch.arange(half, device=t.device, dtype=torch.float32) / (half - freq_shift))
    angles = t.float()[:, None] * rates  # (B, half)
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=-1)


class TimestepMLP(nn.Module):
    """Two layers on top of a sinusoidal or pooled vector; names are those of diffusers' ``TimestepEmbedding``.

    Args:
        extra_width: of a second vector, which is projected and added to the first one.
    """

    def __init__(self, width_in: int, width: int, extra_width: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.cond_proj = None if extra_width is None else nn.Linear(extra_width, width_in, bias=False)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:  # (B, width_in) -> (B, width)
        if self.cond_proj is not None and extra is not None:
            x = x + self.cond_proj(extra)
        return self.linear_2(F.silu(self.linear_1(x)))


def sincos_2d(
    width: int, grid: tuple[int, int], base: int, scale: float = 1.0, device: torch.device | None = None
) -> Tensor:
    """Sinusoids of a patch's column (first half) and row (second half), sines first (Vaswani et al. 2017, §3.5).

    Args:
        width: of the result, a multiple of 4.
        grid: (h, w) patches.
        base, scale: positions run from 0 to just under base / scale along either side, whatever its number of patches.
    Returns:
        (h, w, width) float32.
    Raises:
        ValueError: a width that is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} of the positional table: expected a multiple of 4")
    wide = torch.float32 if device is not None and device.type == "mps" else torch.float64  # MPS has no float64
    rates = 1 / 10_000.0 ** (torch.arange(width // 4, dtype=wide, device=device) / (width // 4))

    def waves(n: int) -> Tensor:  # (n, width / 2)
        position = torch.arange(n, dtype=torch.float32, device=device) / (n / base) / scale
        angles = torch.outer(position.to(wide), rates)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()

    h, w = grid
    return torch.cat([waves(w)[None].expand(h, -1, -1), waves(h)[:, None].expand(-1, w, -1)], dim=-1)


class PatchEmbed(nn.Module):
    """A picture's p × p patches as tokens, with sinusoids of their positions added; named as diffusers' class.

    Args:
        sample_size: side of the picture that the network was laid out for, in pixels of its input.
        scale: positions run from 0 to just under sample_size / patch_size / scale along either side of the table.
        max_size: side of a table that is saved with the weights and of which a picture takes the centre (SD 3), in
            patches. None makes the table of the picture's own size (PixArt), and keeps that of sample_size.
    Raises:
        ValueError: a width that is no multiple of 4, or a sample_size that holds no patch.
    """

    pos_embed: Tensor

    def __init__(
        self,
        channels: int,
        width: int,
        patch_size: int,
        sample_size: int,
        *,
        scale: float = 1.0,
        max_size: int | None = None,
    ):
        super().__init__()
        if sample_size < patch_size:
            raise ValueError(f"sample_size={sample_size} holds no patch of patch_size={patch_size}")
        self.width, self.patch_size, self.max_size = width, patch_size, max_size
        self.base, self.scale = sample_size // patch_size, scale
        self.side = max_size or self.base
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        table = sincos_2d(width, (self.side, self.side), self.base, scale)
        self.register_buffer("pos_embed", table.flatten(0, 1)[None], persistent=max_size is not None)  # (1, side², D)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), N = H · W / p², row by row.

        Raises:
            ValueError: a size that is no multiple of the patch, or larger than the table.
        """
        self._check(*x.shape[-2:])
        y = self.proj(x).permute(0, 2, 3, 1)  # (B, h, w, D)
        return (y + self.table(*y.shape[1:3])).to(y.dtype).contiguous().flatten(1, 2)

    def table(self, h: int, w: int) -> Tensor:
        """(h, w, D) for a picture of so many patches."""
        if self.max_size is None and (h, w) != (self.side, self.side):
            return sincos_2d(self.width, (h, w), self.base, self.scale, self.pos_embed.device)
        top, left = (self.side - h) // 2, (self.side - w) // 2
        return self.pos_embed.unflatten(1, (self.side, self.side))[0, top : top + h, left : left + w]

    def _check(self, height: int, width: int) -> None:
        p, largest = self.patch_size, self.max_size and self.patch_size * self.max_size
        fits = [max(p, (n + p // 2) // p * p) for n in (height, width)]
        fits = [min(n, largest) for n in fits] if largest else fits
        if [height, width] != fits:
            raise ValueError(
                f"input of {height} × {width} (height × width): sides must be multiples of the patch, {p}"
                f"{f', up to {largest}' if largest else ''}; the nearest that fits is {fits[0]} × {fits[1]}"
            )
