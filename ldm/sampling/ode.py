"""Samplers of the probability-flow ODE. Their form is described in ``common``."""

from __future__ import annotations

import math

from torch import Tensor

from ..paths import Path
from .common import Callback, Denoise, Generators, seen, start
from .sde import ddim


def euler(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method in x / alpha over sigma / alpha (EDM's ODE, Karras et al. 2022, eq. 4), which is DDIM, and on
    the straight path also Euler's method in t: x + (s - t)(eps - x0)."""
    return ddim(denoise, path, x, times, eta=0.0, generator=generator, callback=callback)


def heun(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1, without churn) for y = x / alpha over nu = sigma / alpha, where
    dy / dnu = eps. Two calls of the network a step, but one where nu has no bound (alpha(t) = 0, the first) and
    where there is no noise left (sigma(s) = 0, the last): those are Euler steps."""
    x, times, alpha, sigma = start(path, x, times)
    for i in range(len(times) - 1):
        d = denoise(x, times[i])
        ahead = alpha[i + 1] * d.x0 + sigma[i + 1] * d.eps
        if alpha[i] > 0 and sigma[i + 1] > 0:
            # alpha_s (nu_s - nu_t): the step in nu, at the scale of x_s
            step = sigma[i + 1] - alpha[i + 1] * sigma[i] / alpha[i]
            ahead = ahead + step / 2 * (denoise(ahead, times[i + 1]).eps - d.eps)
        x = seen(callback, i, times[i], ahead, d)
    return x


def dpmpp_2m(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2, midpoint form): with lambda = log(alpha / sigma), h its step
    and r = h_before / h,

        D   = x0 + (x0 - x0_before) / (2 r)
        x_s = sigma_s / sigma_t x - alpha_s (exp(-h) - 1) D

    The first step is of first order, and so is the last where it ends without noise or fewer than 15 are taken.
    """
    x, times, alpha, sigma = start(path, x, times)
    lam = (path.log_snr(times) / 2).tolist()
    n = len(times) - 1
    before, h_before = None, 0.0
    for i in range(n):
        d = denoise(x, times[i])
        h = lam[i + 1] - lam[i]
        best = d.x0
        first_order = i == n - 1 and (sigma[-1] == 0 or n < 15)
        if before is not None and not first_order and math.isfinite(h_before):
            best = d.x0 + h / (2 * h_before) * (d.x0 - before)
        decay = alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i])  # exp(-h), also where h has no bound
        before, h_before = d.x0, h
        x = sigma[i + 1] / sigma[i] * x + alpha[i + 1] * (1 - decay) * best
        x = seen(callback, i, times[i], x, d)
    return x
