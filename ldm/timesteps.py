"""At which t to train: functions of uniform numbers u in (0, 1), so that the caller owns the randomness."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def uniform(u: Tensor) -> Tensor:
    """Every t alike (DDPM, rectified flow)."""
    return u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """logit(t) is normal, so that the middle is seen most (SD3, Esser et al. 2024, eq. 19).

    Raises:
        ValueError: std is not above 0.
    """
    if not std > 0:
        raise ValueError(f"logit_normal: std is {std}; expected a number above 0")
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def shift(t: Tensor, s: float) -> Tensor:
    """Later times for larger pictures: s t / (1 + (s - 1) t) (SD3, Esser et al. 2024, eq. 23); 1 changes nothing.

    Raises:
        ValueError: s is not above 0.
    """
    if not s > 0:
        raise ValueError(f"shift is {s}; expected a number above 0, 1 for no shift")
    return s * t / (1 + (s - 1) * t)


def stratified(u: Tensor) -> Tensor:
    """One u in each of B equal parts of (0, 1) for a batch (B,): each part once, so the batch's loss varies less
    (Kingma et al. 2021, appendix I.1). Still uniform over batches if rows come in random order."""
    return (torch.arange(len(u), device=u.device, dtype=u.dtype) + u) / len(u)


TIMESTEPS: dict[str, Callable[..., Tensor]] = {"uniform": uniform, "logit_normal": logit_normal}
