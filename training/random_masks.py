"""Masks to learn inpainting from, by each image's number: rectangles, strokes of a brush, halves, the whole picture.

Every shape is a distance field on the grid of pixels: nothing is drawn row by row, and nothing leaves the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm import rng

from .batches import Stream

RECTANGLES, SEGMENTS = 3, 6  # at most, in one mask
KINDS = 3  # rectangles, strokes, halves, as often each
PARTS = (2, 5 * RECTANGLES, 2 + 2 * (SEGMENTS + 1), 2)  # uniform numbers for: the kind, and each of the kinds


def random_masks(seed: int, index: Tensor, size: tuple[int, int], whole: float = 0.25) -> Tensor:
    """Masks (B, 1, H, W) of 0 and 1, 1 where a picture is to be painted anew.

    A share ``whole`` of them is 1 everywhere, so that the network does not forget how to draw from nothing. Of the
    others a third each are: one to three rectangles with sides of 0.1 to 0.6 of the picture's; a brush of 0.04 to 0.16
    of the shorter side along two to six segments between random points; all that lies on one side of a line parallel
    to a side, from a quarter to three quarters of the picture.

    Args:
        index: (B,) image indices in the run; with the seed they decide everything. A picture twice as large has the
            same mask, drawn finer.
    """
    u = rng.uniform(seed, index, (sum(PARTS),), Stream.MASK)  # (B, N)
    first, boxes, brush, half = u[..., None, None].split(PARTS, dim=1)  # (B, n, 1, 1)
    height, width = size
    short = min(size)
    y = ((torch.arange(height, device=u.device) + 0.5) / short)[None, :, None]  # in shorter sides
    x = ((torch.arange(width, device=u.device) + 0.5) / short)[None, None, :]
    sides = height / short, width / short
    kind = (first[:, 1] * KINDS).long()  # (B, 1, 1)
    inside = torch.where(kind == 0, _rectangles(boxes, y, x, sides), _strokes(brush, y, x, sides))
    inside = torch.where(kind == 2, _half(half, y, x, sides), inside)
    return (inside | (first[:, 0] < whole))[:, None].float()


def _rectangles(u: Tensor, y: Tensor, x: Tensor, sides: tuple[float, float]) -> Tensor:
    """u (B, 5 R, 1, 1): of each, is it there (the first is), where is its middle, how large is it -> (B, H, W)."""
    inside = torch.zeros((), dtype=torch.bool, device=u.device)
    for i in range(RECTANGLES):
        there, middle_y, middle_x, tall, wide = u[:, 5 * i : 5 * (i + 1)].unbind(1)  # (B, 1, 1) each
        within = (y - sides[0] * middle_y).abs() <= sides[0] * (0.05 + 0.25 * tall)
        within = within & ((x - sides[1] * middle_x).abs() <= sides[1] * (0.05 + 0.25 * wide))
        inside = inside | (within & (there < 0.5) if i else within)
    return inside


def _strokes(u: Tensor, y: Tensor, x: Tensor, sides: tuple[float, float]) -> Tensor:
    """u (B, 2 + 2 (S + 1), 1, 1): how thick the brush is, how many segments, which points -> (B, H, W)."""
    radius, segments = 0.02 + 0.06 * u[:, 0], 2 + (u[:, 1] * (SEGMENTS - 1)).long()
    ys, xs = (side * u[:, 2 + k :: 2] for k, side in enumerate(sides))  # (B, S + 1, 1, 1)
    nearest = torch.full((), math.inf, device=u.device)
    for i in range(SEGMENTS):
        ay, ax, dy, dx = ys[:, i], xs[:, i], ys[:, i + 1] - ys[:, i], xs[:, i + 1] - xs[:, i]
        along = (((y - ay) * dy + (x - ax) * dx) / (dy**2 + dx**2).clamp(min=1e-6)).clamp(0, 1)
        square = (y - ay - along * dy) ** 2 + (x - ax - along * dx) ** 2
        nearest = torch.where(i < segments, torch.minimum(nearest, square), nearest)
    return nearest <= radius**2


def _half(u: Tensor, y: Tensor, x: Tensor, sides: tuple[float, float]) -> Tensor:
    """u (B, 2, 1, 1): from which side of the picture, and how far -> (B, H, W)."""
    side, share = (u[:, 0] * 4).long(), 0.25 + 0.5 * u[:, 1]
    across = torch.where(side < 2, y / sides[0], x / sides[1])
    return torch.where(side % 2 == 0, across, 1 - across) < share
