"""Samplers of the probability-flow ODE that look at one step at a time, and the way back up. Their form is described in
``common``; those that remember earlier steps are in ``multistep`` and ``exponential``.

Two ways to write the ODE are used. Over nu = sigma / alpha it is d(x / alpha) = eps dnu (EDM, Karras et al. 2022, eq.
4). Along the path, which also starts from alpha = 0, it is dx = x0 dalpha + eps dsigma.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoised
from ..paths import Path
from .common import Callback, Denoise, Generators, noise_like, seen, start


def euler(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method over nu, x_s = alpha_s x0 + sigma_s eps: DDIM, and on the straight path Euler's method in t,
    x + (s - t)(eps - x0). Defined everywhere, also from alpha_t = 0. The churn is ``heun``'s."""
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    return _edm(denoise, path, x, times, churn, second_order=False, generator=generator, callback=callback)


def heun(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method over nu (Karras et al. 2022, algorithm 2, here for any path). Two calls of the network a step, but
    one where nu has no bound (alpha_t = 0, the first) and where no noise is left (sigma_s = 0, the last): those are
    Euler steps.

    Args:
        s_churn: before a step with s_tmin <= nu <= s_tmax, noise is added until nu has grown by the factor
            1 + min(s_churn / n, sqrt(2) - 1), though not beyond the path's own end. 0: a deterministic sampler.
        s_noise: what that noise is multiplied with.
    Raises:
        ValueError: a grid that is none (``check_times``), or a negative churn.
    """
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    return _edm(denoise, path, x, times, churn, second_order=True, generator=generator, callback=callback)


def _edm(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    churn: tuple[float, float, float, float],
    *,
    second_order: bool,
    generator: Generators,
    callback: Callback | None,
) -> Tensor:
    s_churn, s_tmin, s_tmax, s_noise = churn
    if not s_churn >= 0:
        raise ValueError(f"s_churn is {s_churn}; expected 0 or more")
    x, times, alpha, sigma = start(path, x, times)
    n = len(times) - 1
    growth = 1 + min(s_churn / n, math.sqrt(2) - 1)
    for i in range(n):
        t, a, s = times[i], alpha[i], sigma[i]
        if s_churn > 0 and a > 0 and s_tmin <= s / a <= s_tmax:
            x, t, a, s = _churned(path, x, a, s, growth, s_noise, generator)
        d = denoise(x, t)
        ahead = alpha[i + 1] * d.x0 + sigma[i + 1] * d.eps
        if second_order and a > 0 and sigma[i + 1] > 0:
            step = sigma[i + 1] - alpha[i + 1] * s / a  # alpha_s (nu_s - nu_t): the step in nu, at the scale of x_s
            ahead = ahead + step / 2 * (denoise(ahead, times[i + 1]).eps - d.eps)
        x = seen(callback, i, times[i], ahead, d)
    return x


def _churned(
    path: Path, x: Tensor, alpha: float, sigma: float, growth: float, s_noise: float, generator: Generators
) -> tuple[Tensor, Tensor, float, float]:
    """x with fresh noise at the time where nu is ``growth`` times as large; that time, its alpha and its sigma."""
    log_snr = torch.tensor(2 * math.log(alpha / (sigma * growth)), dtype=torch.float64)
    t = path.time_at(log_snr).clamp(max=1.0)
    a, s = path.alpha(t).item(), path.sigma(t).item()
    fresh = math.sqrt(max((s / a) ** 2 - (sigma / alpha) ** 2, 0.0))
    return a * (x / alpha + fresh * s_noise * noise_like(x, generator)), t, a, s


def flow_heun(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method along the path, dx = x0 dalpha + eps dsigma by the trapezoidal rule: on the straight path Heun's
    method in t for flow matching, where variance explodes EDM's. Two calls a step, but one where no noise is left.
    Defined everywhere, also from alpha_t = 0."""
    x, times, alpha, sigma = start(path, x, times)
    for i in range(len(times) - 1):
        d = denoise(x, times[i])
        ahead = alpha[i + 1] * d.x0 + sigma[i + 1] * d.eps
        if sigma[i + 1] > 0:
            end = denoise(ahead, times[i + 1])
            rise, fall = alpha[i + 1] - alpha[i], sigma[i + 1] - sigma[i]
            ahead = x + rise / 2 * (d.x0 + end.x0) + fall / 2 * (d.eps + end.eps)
        x = seen(callback, i, times[i], ahead, d)
    return x


def midpoint(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """The midpoint rule along the path, with (x0, eps) seen half-way in t: x_s = x + (alpha_s - alpha_t) x0 +
    (sigma_s - sigma_t) eps. On the straight path the midpoint method of flow matching. Two calls a step. Defined
    everywhere, also from alpha_t = 0."""
    x, times, alpha, sigma = start(path, x, times)
    for i in range(len(times) - 1):
        d = denoise(x, times[i])
        half = (times[i] + times[i + 1]) / 2
        d = denoise(path.alpha(half).item() * d.x0 + path.sigma(half).item() * d.eps, half)
        x = x + (alpha[i + 1] - alpha[i]) * d.x0 + (sigma[i + 1] - sigma[i]) * d.eps
        x = seen(callback, i, times[i], x, d)
    return x


def rk45(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Adaptive Runge-Kutta of order 5 (Dormand & Prince 1980, torchdiffeq's) from the first time of the grid to the
    last; those between are not used, and the callback sees the end alone.

    With phi = atan2(sigma, alpha), y = x / hypot(alpha, sigma) turns by dy / dphi = cos(phi) eps - sin(phi) x0, the
    v-prediction (Salimans & Ho 2022, appendix D): bounded at both ends of every path. A grid that ends without noise
    is followed to phi = 1e-4; the rest is DDIM's step, since not every prediction can be asked at sigma = 0. The error
    is held for the batch as a whole, so a row's last digits, below the tolerances, depend on its batch; and the host
    waits for each step.
    """
    from torchdiffeq import odeint  # half a second, of scipy

    x, times, alpha, sigma = start(path, x, times)
    ends = torch.atan2(path.sigma(times[[0, -1]]), path.alpha(times[[0, -1]]))
    ends[1] = ends[1].clamp(min=min(1e-4, ends[0].item() / 2))
    latest: list[Denoised] = []

    def turn(phi: Tensor, y: Tensor) -> Tensor:
        phi = phi.detach().to("cpu", torch.float64).clamp(ends[1], ends[0])
        t = path.time_at(2 * (phi.cos().log() - phi.sin().log())).clamp(max=times[0])
        d = denoise(torch.hypot(path.alpha(t), path.sigma(t)).item() * y, t)
        latest[:] = [d]
        return (math.cos(phi) * d.eps - math.sin(phi) * d.x0).to(y.dtype)

    y = x / math.hypot(alpha[0], sigma[0])
    grid = ends.to(x.device)
    # step_t: no step beyond the end, where there is no noise to take away
    solved: Any = odeint(turn, y, grid, rtol=rtol, atol=atol, method="dopri5", options={"step_t": grid[1:]})
    d = latest[0]  # seen at that very end
    x = math.hypot(alpha[-1], sigma[-1]) * solved[-1] if sigma[-1] > 0 else alpha[-1] * d.x0
    return seen(callback, 0, times[0], x, d)


def ddim_inversion(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    iterations: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM's steps walked back up: from x at times[-1] to the x at times[0] from which ``ddim`` leads to it.

    A step down is x_s = alpha_s x0(x_t) + sigma_s eps(x_t), so the way up has to solve

        x_t = alpha_t / alpha_s x_s + (sigma_t - alpha_t sigma_s / alpha_s) eps(x_t, t)

    for x_t: by fixed-point iteration from x_s. One iteration is the usual DDIM inversion, off by what eps changes in a
    step; with more it becomes exact wherever the step is small enough for them to converge (Pan et al. 2023). Up to
    alpha_t = 0, where this says nothing, x_t = x_s + (alpha_t - alpha_s) x0(x_t) + (sigma_t - sigma_s) eps(x_t) is
    solved instead.

    Args:
        times: the falling grid of the sampler; walked from its end.
        iterations: calls of the network a step.
    Raises:
        ValueError: a grid that is none, or no iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; expected 1 or more")
    x, times, alpha, sigma = start(path, x, times)
    for i in reversed(range(len(times) - 1)):
        scale, below = alpha[i] / alpha[i + 1], x
        for _ in range(iterations):
            d = denoise(x, times[i])
            if alpha[i] > 0:
                x = scale * below + (sigma[i] - scale * sigma[i + 1]) * d.eps
            else:
                x = below + (alpha[i] - alpha[i + 1]) * d.x0 + (sigma[i] - sigma[i + 1]) * d.eps
        x = seen(callback, i, times[i], x, d)
    return x
