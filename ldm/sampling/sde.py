"""The one step that DDPM, DDIM and Euler share, with any amount of fresh noise, and the samplers made of it.

A sampler is ``sampler(denoise, path, x, times, *, generator=None, callback=None, **options) -> x at times[-1]``:
``denoise(x_t, t) -> Denoised`` gets t as a float64 scalar on the CPU, where the times and all coefficients live, so
that the loop never waits for the device. ``callback(i, t, x, denoised)`` sees each new x and may return another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..denoiser import Denoised
from ..paths import Path
from .grids import check_times

Denoise = Callable[[Tensor, Tensor], Denoised]
Callback = Callable[[int, Tensor, Tensor, Denoised], Tensor | None]
Generators = torch.Generator | Sequence[torch.Generator] | None


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


def start(path: Path, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor, list[float], list[float]]:
    """x in float32 at least, the checked grid, and alpha and sigma at its times."""
    times = check_times(times)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x, times, path.alpha(times).tolist(), path.sigma(times).tolist()


def seen(callback: Callback | None, i: int, t: Tensor, x: Tensor, denoised: Denoised) -> Tensor:
    """x, or what the callback gives for it."""
    changed = None if callback is None else callback(i, t, x, denoised)
    return x if changed is None else changed


def noise_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal, drawn on the generator's device.

    Raises:
        ValueError: several generators, but not one for each row.
    """
    if generator is None:
        return torch.randn_like(x)
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    if len(generator) != x.shape[0]:
        raise ValueError(f"{len(generator)} generators for {x.shape[0]} rows; expected one for all or one for each")
    return torch.cat([noise_like(row, g) for row, g in zip(x.split(1), generator, strict=True)])
