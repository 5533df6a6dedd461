"""Counter-based randomness: what a row draws depends on its own index and nothing else.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", §4.3) turns a 128-bit counter
and a 64-bit key into four random words. The key is the seed, the counter is (position // 4, stream, index), so
that a row's noise is the same in every batch, on every process and after every resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # the low 32 bits, as which every word is kept in an int64
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the two halves of the key grow by in each round


def philox(counter: Sequence[Tensor], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four counter words, int64 tensors in [0, 2^32) that broadcast, to four random words of that kind."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of them
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        # b and d are only ever read through an xor and a mask: their upper halves need no clearing on the way
        a, c = ((right >> 32) ^ b ^ k0) & WORD, ((left >> 32) ^ d ^ k1) & WORD
        b, d = right, left
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return a, b & WORD, c, d & WORD


def uniform(seed: int, index: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Independent uniforms in the open interval (0, 1), odd multiples of 2^-24.

    Args:
        seed: 0 to 2^63 - 1.
        index: (B,) int64, the number of each row in the whole run.
        shape: of one row. Rows of two shapes share their leading values in flattened order.
        stream: 0 to 2^32 - 1; what is drawn for another purpose takes another stream.
    Returns:
        (B, *shape) float32 on the device of ``index``, the same bits on every device.
    Raises:
        ValueError: a seed, a stream, an index or a shape of another kind.
    """
    words = _words(seed, index, shape, stream)
    return _rows([((w >> 9).float() + 0.5) * 2**-23 for w in words], index, shape)


def normal(seed: int, index: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Independent standard normals (Box and Muller 1958), at most 6.8 in size; arguments as of ``uniform``.

    The transform runs in float64 and is rounded to float32 at its end, so that kernels whose last bit differs
    (vector or scalar, CPU or GPU) give the same number, save where that bit crosses a rounding border: about one
    value in 10^8.
    """
    w0, w1, w2, w3 = _words(seed, index, shape, stream)
    values = []
    for w, v in ((w0, w1), (w2, w3)):
        radius = torch.sqrt(-2 * torch.log((w.double() + 0.5) * 2**-32))  # 0 < u < 1 in float64
        angle = v.double() * (2 * math.pi * 2**-32)
        values += [(radius * angle.cos()).float(), (radius * angle.sin()).float()]
    return _rows(values, index, shape)


def _words(seed: int, index: Tensor, shape: Sequence[int], stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words (B, ceil(n / 4)) for rows of n values: word j of counter i belongs to position 4 i + j."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}: expected a whole number from 0 to 2^63 - 1")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream={stream}: expected a whole number from 0 to 2^32 - 1")
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index: expected shape (B,) of torch.int64, got {tuple(index.shape)} of {index.dtype}")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape={tuple(shape)}: sizes cannot be negative")
    block = torch.arange(-(-math.prod(shape) // 4), device=index.device)[None]  # (1, K)
    row = index[:, None]  # (B, 1)
    counter = (block, torch.full_like(block[:, :1], stream), row & WORD, (row >> 32) & WORD)
    return philox(counter, (seed & WORD, seed >> 32))


def _rows(values: list[Tensor], index: Tensor, shape: Sequence[int]) -> Tensor:
    n = math.prod(shape)
    return torch.stack(values, dim=-1).flatten(1)[:, :n].reshape(len(index), *shape)
