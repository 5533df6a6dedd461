"""Samplers as free functions, and the grids of times that they walk down."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .common import noise_like
from .grids import GRIDS, check_times, time_grid
from .ode import dpmpp_2m, euler, heun
from .sde import ddim, ddpm

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}

__all__ = [
    "GRIDS", "SAMPLERS", "check_times", "ddim", "ddpm", "dpmpp_2m", "euler", "heun", "noise_like", "time_grid",
]  # fmt: skip
