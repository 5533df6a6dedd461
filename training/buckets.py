"""Aspect-ratio buckets: shapes of one area, of which each picture takes the nearest to its own."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

Shape = tuple[int, int]  # height, width


def shapes(resolution: int, step: int, max_aspect_ratio: float = 2.0) -> list[Shape]:
    """All (H, W) of multiples of ``step`` whose area is resolution² or just below, from wide to tall.

    For each side the other is the longest that fits the area (NovelAI's buckets, as SDXL and kohya have them), so no
    bucket needs more memory than the square. The square is always among them. Where the longest allowed ratio falls
    between two of them, its own shape is added, if that has three quarters of the area at least.

    Raises:
        ValueError: ``resolution`` is no multiple of ``step``, or a ratio below 1.
    """
    if resolution % step:
        raise ValueError(f"resolution {resolution}: expected a multiple of the buckets' step, {step}")
    if max_aspect_ratio < 1:
        raise ValueError(f"max_aspect_ratio: expected at least 1, got {max_aspect_ratio}")
    found, widest = {(resolution, resolution)}, 1.0
    for side in range(resolution - step, 0, -step):
        other = resolution**2 // side // step * step
        longest = int(side * max_aspect_ratio / step + 1e-9) * step
        if other > longest:
            if 4 * side * longest >= 3 * resolution**2 and longest / side > widest:
                found |= {(side, longest), (longest, side)}
            break
        found |= {(side, other), (other, side)}
        widest = other / side
    return sorted(found, key=lambda s: s[0] / s[1])


def default_step(resolution: int) -> int:
    """Where nobody says what the networks need: the largest power of two that divides the resolution, up to 64."""
    return math.gcd(resolution, 64)


def nearest(height: int, width: int, among: Sequence[Shape]) -> int:
    """Which shape's log aspect ratio is nearest to a picture's own; of two, the wider. ``among`` from ``shapes``."""
    return bisect_left(_between(tuple(among)), math.log(height / width))


@lru_cache(maxsize=64)
def _between(among: tuple[Shape, ...]) -> list[float]:
    """Where one shape ends and the next begins."""
    ratios = [math.log(h / w) for h, w in among]
    return [(a + b) / 2 for a, b in pairwise(ratios)]


def cropped(heights: np.ndarray, widths: np.ndarray, shape: Shape) -> np.ndarray:
    """(N,) share of each picture's area that is cut off where it is scaled to cover ``shape``."""
    scale = np.maximum(shape[0] / np.asarray(heights, np.float64), shape[1] / np.asarray(widths, np.float64))
    return 1 - shape[0] * shape[1] / (heights * widths * scale**2)


def size_ids(heights: np.ndarray, widths: np.ndarray, shape: Shape, center_crop: bool) -> np.ndarray:
    """(N, 6) float32: original height and width, top and left of the crop, target height and width.

    SDXL's micro-conditioning (Podell et al. 2023, sec. 2.2); the crop is in pixels of the scaled picture.
    """
    heights, widths = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    top, left = np.zeros(len(heights)), np.zeros(len(heights))
    if center_crop:
        scale = np.maximum(shape[0] / heights, shape[1] / widths)
        top, left = (np.floor((np.round(a * scale) - s) / 2) for a, s in ((heights, shape[0]), (widths, shape[1])))
    target = np.broadcast_to(shape, (len(heights), 2))
    return np.column_stack([heights, widths, top, left, target]).astype(np.float32)
