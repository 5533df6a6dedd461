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


def sincos_2d(width: int, grid: tuple[int, int], base: float) -> Tensor:
    """Sinusoids of a patch's column (first half) and row (second half), sines first (Vaswani et al. 2017, §3.5).

    Args:
        width: of the result, a multiple of 4.
        grid: (h, w) patches.
        base: positions run from 0 to just under this along either side, whatever its number of patches.
    Returns:
        (h · w, width) float32, row by row.
    Raises:
        ValueError: a width that is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} of the positional table: expected a multiple of 4")
    rates = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def waves(n: int) -> Tensor:  # (n, width / 2)
        position = torch.arange(n, dtype=torch.float32) / (n / base)
        angles = torch.outer(position.double(), rates)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    h, w = grid
    columns, rows = waves(w)[None].expand(h, -1, -1), waves(h)[:, None].expand(-1, w, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


class PatchEmbed(nn.Module):
    """A picture's p × p patches as tokens, with the positions of the centre of a larger table added.

    Names are those of diffusers' ``PatchEmbed`` with a ``pos_embed_max_size``.

    Args:
        sample_size: side of the picture that the network was laid out for, in pixels of its input.
        max_size: side of the table and of the largest picture, in patches.
    """

    pos_embed: Tensor

    def __init__(self, channels: int, width: int, patch_size: int, sample_size: int, max_size: int):
        super().__init__()
        self.patch_size, self.max_size = patch_size, max_size
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        table = sincos_2d(width, (max_size, max_size), sample_size // patch_size)
        self.register_buffer("pos_embed", table[None])  # (1, max_size², D)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), N = H · W / p², row by row.

        Raises:
            ValueError: a size that is no multiple of the patch, or larger than the table.
        """
        h, w = self._grid(*x.shape[-2:])
        top, left = (self.max_size - h) // 2, (self.max_size - w) // 2
        table = self.pos_embed.unflatten(1, (self.max_size, self.max_size))[:, top : top + h, left : left + w]
        y = self.proj(x).permute(0, 2, 3, 1)  # (B, h, w, D)
        return (y + table).to(y.dtype).contiguous().flatten(1, 2)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        p, largest = self.patch_size, self.patch_size * self.max_size
        fits = [min(max(p, (size + p // 2) // p * p), largest) for size in (height, width)]
        if [height, width] != fits:
            raise ValueError(
                f"input of {height} × {width} (height × width): sides must be multiples of the patch, {p}, up to "
                f"{largest}; the nearest that fits is {fits[0]} × {fits[1]}"
            )
        return height // p, width // p
