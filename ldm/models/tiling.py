"""Large pictures through an autoencoder in overlapping tiles, with the memory of one tile.

A tile differs from the same place of the whole picture for three reasons, and each is met where it arises:

- Attention sees the tile alone. So nothing at the latents' resolution is tiled: in a network of SD's shape its
  activations are 1/32 of the largest one's.
- A group norm takes the tile's mean and variance for the picture's, which shifts colour and contrast from tile to
  tile. So all tiles share one mean and variance per norm, measured beforehand on patches spread over the picture.
- A convolution sees zeros past the tile's border. So what these zeros reach gets weight 0 where the overlap is wide
  enough, and between there and the neighbour's own such border one tile fades into the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, HALO = 4, 1  # side of a patch on which norms are measured, its border that is left out; in latents
PLASTIC = 1.32471795724474602596  # the real root of x³ = x + 1

Part = Callable[..., Tensor]  # part(x) or part(x, act), where act(norm, x) stands for silu(norm(x))


class Tiling(NamedTuple):
    """Side of a tile and overlap of two neighbours, in latents."""

    side: int
    overlap: int


class Tiled:
    """What an autoencoder with an ``encoder``, a ``decoder`` and a ``factor`` offers to save memory."""

    encoder: Any
    decoder: Any
    factor: Any
    config: dict[str, Any]
    use_slicing = False
    tiling: Tiling | None = None

    def enable_slicing(self) -> None:
        """Encode and decode the rows of a batch one after the other: the memory of one, the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self, tile_sample_min_size: int | None = None, overlap: float | None = None) -> None:
        """Encode and decode pictures larger than a tile in overlapping tiles.

        Args:
            tile_sample_min_size: side of a tile in pixels, a multiple of ``factor``; None: the config's sample_size.
            overlap: of two neighbours, as a part of the side, at most 0.5; None: a quarter, or more (up to a half)
                where a tile's border is felt further.
        Raises:
            ValueError: a side that does not fit, an overlap outside [0, 0.5], an autoencoder of one level.
        """
        side = self.config["sample_size"] if tile_sample_min_size is None else tile_sample_min_size
        reach = max(self.encoder.reach, self.decoder.reach / self.factor)  # in latents
        self.tiling = plan(min(side) if isinstance(side, Sequence) else side, overlap, self.factor, reach)

    def disable_tiling(self) -> None:
        self.tiling = None

    def _by_row(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([f(row) for row in x.split(1)]) if self.use_slicing and len(x) > 1 else f(x)

    def _in_tiles(self, part: Part, x: Tensor, unit_in: int, unit_out: int, reach: int) -> Tensor:
        if self.tiling is None or max(x.shape[-2:]) <= self.tiling.side * unit_in:
            return part(x)
        return in_tiles(part, x, self.tiling, unit_in, unit_out, reach)


def plan(pixels: int, overlap: float | None, factor: int, reach: float) -> Tiling:
    """Tiles of ``pixels`` for an autoencoder whose tile borders are felt over ``reach`` latents.

    Raises:
        ValueError: ``factor`` does not divide ``pixels``, overlap outside [0, 0.5], factor 1.
    """
    if factor == 1:
        raise ValueError("tiling: an autoencoder of one level has the picture's resolution throughout; use slicing")
    side = pixels // factor
    if pixels % factor or side < 2:
        nearest = max(2, math.floor(pixels / factor + 0.5)) * factor
        raise ValueError(
            f"tile_sample_min_size={pixels}: expected a multiple of the autoencoder's factor {factor}, at least "
            f"{2 * factor}; the nearest that fits is {nearest}"
        )
    if overlap is None:
        return Tiling(side, min(max(side // 4, math.ceil(2 * reach)), side // 2))
    if not 0 <= overlap <= 0.5:
        raise ValueError(f"tiling overlap={overlap}: expected a part of the tile's side in [0, 0.5], for example 0.25")
    return Tiling(side, math.floor(overlap * side + 0.5))


def in_tiles(part: Part, x: Tensor, tiling: Tiling, unit_in: int, unit_out: int, reach: int) -> Tensor:
    """``part(x, act)`` tile by tile, all rows of the batch at once.

    Args:
        part: (B, C, h unit_in, w unit_in) -> (B, C', h unit_out, w unit_out), at any size.
        x: its input, h by w latents large.
        reach: how far from a border of its output the border is felt.
    """
    h, w = (n // unit_in for n in x.shape[-2:])

    def cut(top: int, left: int, high: int, wide: int) -> Tensor:
        return x[..., top * unit_in : (top + high) * unit_in, left * unit_in : (left + wide) * unit_in]

    norms = SharedNorms(len(x))
    patches = [cut(*place, min(PATCH, h), min(PATCH, w)) for place in _patches(h, w, tiling.side)]
    part(torch.stack(patches, 1).flatten(0, 1), norms.measure)  # (B K, C, .., ..)

    tops, lefts = _starts(h, tiling), _starts(w, tiling)
    high, wide = min(tiling.side, h), min(tiling.side, w)
    wide_dtype = torch.promote_types(x.dtype, torch.float32)  # weights that sum to 1 in half precision do not
    rows, columns = (
        _weights(starts, n, length, tiling, unit_out, reach).to(x.device, wide_dtype)
        for starts, n, length in ((tops, high, h), (lefts, wide, w))
    )
    out = None
    for (i, top), (j, left) in product(enumerate(tops), enumerate(lefts)):
        tile = part(cut(top, left, high, wide), norms.apply)  # (B, C', high unit_out, wide unit_out)
        if out is None:
            out = tile.new_zeros((*tile.shape[:2], h * unit_out, w * unit_out), dtype=wide_dtype)
        place = slice(top * unit_out, (top + high) * unit_out), slice(left * unit_out, (left + wide) * unit_out)
        out[(..., *place)] += tile * (rows[i, place[0], None] * columns[j, place[1]])
    assert out is not None
    return out.to(x.dtype)


class SharedNorms:
    """Group norms with the statistics of a whole picture, measured on patches of it.

    The patches go through the network together, so that each norm is measured on what the norms before it, with
    the statistics of all patches, have made.

    Args:
        batch: rows B of the batch; the patches come as (B K, C, .., ..), a row's K in succession.
    """

    def __init__(self, batch: int):
        self.batch = batch
        self.found: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}  # factor and shift, (B, C, 1, 1) each

    def measure(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        top, left = (HALO * n // PATCH for n in x.shape[-2:])
        inner = wide[..., top : x.shape[-2] - top, left : x.shape[-1] - left]
        groups = inner.unflatten(1, (norm.num_groups, -1)).unflatten(0, (self.batch, -1))  # (B, K, G, C/G, .., ..)
        variance, mean = torch.var_mean(groups, (1, 3, 4, 5), correction=0)  # (B, G)
        spread = (variance + norm.eps).rsqrt()
        each = norm.num_channels // norm.num_groups
        factor = spread.repeat_interleave(each, 1) * norm.weight  # (B, C)
        shift = norm.bias - mean.repeat_interleave(each, 1) * factor
        self.found[norm] = factor[..., None, None], shift[..., None, None]
        return self.apply(norm, x)

    def apply(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        factor, shift = (t.repeat_interleave(len(x) // self.batch, 0) for t in self.found[norm])
        h = torch.addcmul(shift, x, factor)  # in float32 at least, as a group norm's sums are
        return F.silu(h, inplace=not h.requires_grad).to(x.dtype)


def _patches(h: int, w: int, side: int) -> list[tuple[int, int]]:
    """Corners of patches spread evenly over h by w, together no larger than a tile.

    They follow the plane's golden ratio (Roberts 2018, the R2 sequence): a lattice of patches would keep step with
    a pattern in the picture.
    """
    rooms = [n - min(PATCH, n) + 1 for n in (h, w)]
    steps = 1 / PLASTIC, 1 / PLASTIC**2
    points = ([(0.5 + i * step) % 1 for step in steps] for i in range(max(1, side // PATCH) ** 2))
    return [(int(v * rooms[0]), int(u * rooms[1])) for v, u in points]


def _starts(length: int, tiling: Tiling) -> list[int]:
    """First positions of equal tiles that cover ``length`` and overlap by at least what is asked for."""
    side, overlap = tiling
    n = max(1, math.ceil((length - overlap) / (side - overlap)))
    return [max(length - side, 0) * i // max(n - 1, 1) for i in range(n)]


def _weights(starts: list[int], side: int, length: int, tiling: Tiling, unit: int, reach: int) -> Tensor:
    """What each tile counts at each place of one axis: (tiles, length unit), columns that sum to 1."""
    overlap, n = tiling.overlap * unit, side * unit
    margin = reach if 2 * reach <= overlap else overlap // 4
    into = torch.arange(n, dtype=torch.float64) + 0.5 - margin  # distance from the part that does not count
    ramp = (into / max(overlap - 2 * margin, 1)).clamp(0, 1) * (math.pi / 2)
    ramp = ramp.sin().square()  # (side unit,); with its mirror image it sums to 1 over the overlap
    weights = torch.zeros(len(starts), length * unit, dtype=torch.float64)
    for row, start in zip(weights, starts, strict=True):
        own = row[start * unit : start * unit + n]
        own[:] = 1.0
        if start > 0:
            own *= ramp
        if start + side < length:
            own *= ramp.flip(0)
    return weights / weights.sum(0)
