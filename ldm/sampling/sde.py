"""The one step that DDPM, DDIM and Euler share, with any amount of fresh noise, and the samplers made of it."""

from __future__ import annotations

import math

from torch import Tensor

from ..paths import Path
from .common import Callback, Denoise, Generators, noise_like, seen, start


def ddim(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 0.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16), on any path: with t the time of x and s < t the next,

        var = sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2) eta^2
        x_s = alpha_s x0 + sqrt(sigma_s^2 - var) eps + sqrt(var) z

    Args:
        eta: 0 follows the probability-flow ODE, 1 draws from DDPM's posterior.
        generator: of z: one for all, or one for each row, so that a row does not depend on its batch.
    Raises:
        ValueError: a grid that is none (``check_times``), or eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; expected a number in [0, 1]")
    x, times, alpha, sigma = start(path, x, times)
    for i in range(len(times) - 1):
        d = denoise(x, times[i])
        ratio = alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i])
        var = (sigma[i + 1] * eta) ** 2 * (1 - ratio**2)
        x = alpha[i + 1] * d.x0 + math.sqrt(sigma[i + 1] ** 2 - var) * d.eps
        if var > 0:
            x = x + math.sqrt(var) * noise_like(x, generator)
        x = seen(callback, i, times[i], x, d)
    return x


def ddpm(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDPM's ancestral sampling (Ho et al. 2020, algorithm 2, with the posterior's variance): the step at eta = 1."""
    return ddim(denoise, path, x, times, eta=1.0, generator=generator, callback=callback)
