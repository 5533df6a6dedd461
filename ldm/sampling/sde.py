"""The one step that DDPM, DDIM and Euler share, with any amount of fresh noise, and the samplers made of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..denoiser import Denoised
from ..paths import Path
from .common import Callback, Denoise, Generators, noise_like, seen, start

VARIANCES = ("fixed_small", "fixed_large", "learned")


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

    Defined everywhere, also from alpha_t = 0.

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
    variance: str = "fixed_small",
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDPM's ancestral sampling (Ho et al. 2020, algorithm 2): x_s = posterior mean + sqrt(var) z, no noise in a step
    that ends clean. With ``fixed_small`` it is DDIM's step at eta = 1, and Euler's "ancestral" one (Karras et al.
    2022 call it so; k-diffusion's sampler of that name). Defined everywhere, also from alpha_t = 0.

    Args:
        variance: diffusers' names: ``fixed_small``, beta tilde, the posterior's own; ``fixed_large``, beta, that of
            q(x_t | x_s); ``learned``, between them as the network says (Nichol & Dhariwal 2021, eq. 15).
    Raises:
        ValueError: a grid that is none, an unknown variance, a ``learned`` one that the network does not give.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance {variance!r} is not one of {', '.join(VARIANCES)}")
    x, times, alpha, sigma = start(path, x, times)
    for i in range(len(times) - 1):
        d = denoise(x, times[i])
        fresh = 1 - (alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i])) ** 2  # 1 - SNR_t / SNR_s
        small, large = sigma[i + 1] ** 2 * fresh, sigma[i] ** 2 * fresh
        x = alpha[i + 1] * d.x0 + math.sqrt(sigma[i + 1] ** 2 - small) * d.eps
        if small > 0:
            x = x + _std(variance, d, small, large) * noise_like(x, generator)
        x = seen(callback, i, times[i], x, d)
    return x


def _std(variance: str, d: Denoised, small: float, large: float) -> Tensor | float:
    if variance != "learned":
        return math.sqrt(small if variance == "fixed_small" else large)
    if d.var_frac is None:
        raise ValueError(
            "variance='learned', but this denoiser tells none: train it with Denoiser(…, learned_variance=True), or "
            "take 'fixed_small' or 'fixed_large'"
        )
    return torch.exp(0.5 * (d.var_frac * math.log(large) + (1 - d.var_frac) * math.log(small)))
