"""The noise that a step trains on: white, or with an offset of each channel, and with more of it in the input alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ldm import rng

from .batches import Stream


def noises(
    seed: int, index: Tensor, shape: Sequence[int], offset: float = 0.0, perturbation: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """``eps`` and ``noisy_eps`` of ``Denoiser.loss`` for the images ``index`` (B,), each by its own number.

    Args:
        shape: of one row, (C, h, w).
        offset: times one normal number for each row and channel, added to all of its noise: pictures far brighter or
            darker than grey can then be drawn (noise offset, Guttenberg 2023). A value has the variance 1 + offset²,
            two of one channel the correlation offset² / (1 + offset²). diffusers' scripts' ``noise_offset``.
        perturbation: times normal noise, added to what x_t is made with and not to what is predicted (Ning et al.
            2023, algorithm 1). diffusers' scripts' ``input_perturbation``.
    Returns:
        (B, C, h, w) float32 each; the second is None without ``perturbation``. With both at 0 the first is
        ``rng.normal`` of the stream NOISE, to the bit.
    """
    eps = rng.normal(seed, index, shape, Stream.NOISE)
    if offset:
        eps = eps + offset * rng.normal(seed, index, (shape[0], *[1] * (len(shape) - 1)), Stream.OFFSET)
    if not perturbation:
        return eps, None
    return eps, eps + perturbation * rng.normal(seed, index, shape, Stream.PERTURBATION)
