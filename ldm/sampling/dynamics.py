"""Samplers that follow the score: the reverse SDE with any amount of noise, and Langevin dynamics on one p_t or on
one after another. Their form is described in ``common``; each takes the score from the denoiser, -eps / sigma."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..paths import Path
from ..process import Coeffs, diffusion, reverse_drift, score, transition, velocity
from .common import Callback, Denoise, Generators, noise_like, seen, start

NORMS = ("expected", "row")


def euler_maruyama(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    g: Callable[[float], float] | float | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """The Euler-Maruyama method for the SDE that, run from noise to data, has the path's marginals for every g(t) >= 0
    (Song et al. 2021, eq. 6, and 13 for g = 0):

        dx  = [u - g^2 / 2 score] dt + g dW
        x_s = x - (t - s) (u - g^2 / 2 score) + g sqrt(t - s) z

    A step that ends without noise (sigma(s) = 0) is the denoiser's answer alpha_s x0, with no noise added
    (Jolicoeur-Martineau et al. 2021; Song et al. 2021 take it over). A grid that ends above gives a draw from the
    marginal there, its last noise included.

    Args:
        g: a number, or a function of t: 0 is Euler's method in t on the probability-flow ODE. If not given, the
            forward SDE's own (``process.diffusion``), as in Anderson's reverse SDE.
    Raises:
        ValueError: a grid that is none (``check_times``); a g that is no number of at least 0; a step that starts
            where g or a rate of the path has no bound: for the forward SDE's own g, alpha = 0.
    """
    x, times, alpha, sigma = start(path, x, times)
    plan = [_rates(path, times[i], x.ndim, g) if sigma[i + 1] > 0 else None for i in range(len(times) - 1)]
    for i, at_t in enumerate(plan):
        d = denoise(x, times[i])
        if at_t is None:
            x = alpha[i + 1] * d.x0
        else:
            c, g2 = at_t
            step = (times[i] - times[i + 1]).item()
            x = x - step * reverse_drift(velocity(d.x0, d.eps, c), score(d.eps, c), g2)
            if g2 > 0:
                x = x + math.sqrt(g2 * step) * noise_like(x, generator)
        x = seen(callback, i, times[i], x, d)
    return x


def predictor_corrector(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    corrector_steps: int = 1,
    snr: float = 0.16,
    norms: str = "expected",
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Predictor and corrector (Song et al. 2021, algorithms 1 to 5). From t to s the predictor is the reverse
    diffusion of their eq. 46, with q(x_t | x_s) = N(k x_s, var) in the place of one step of their chain:

        x_s = (2 - k) x + var score + sqrt(var) z

    after which the corrector takes Langevin steps on p_s:

        x <- x + e score + sqrt(2 e) z,   e = 2 a (snr |z| / |score|)^2

    with a = 1 - beta of the step that comes next, (alpha_s / alpha_r)^2 from s to r: 1 where variance explodes, and
    at the end of the grid. They take |z| and |score| as means over the batch. A row must not depend on its batch, so
    here they are what |z| and |eps| / sigma_s are on average, whose ratio is sigma_s: e = 2 a (snr sigma_s)^2.
    Each row's own norms are an option. In thousands of dimensions d they hardly vary; in a few they do, and Langevin
    dynamics whose step depends on score and noise find another law than p_s: |score|^2 p_s^(d / (d + 2)) where steps
    are small. In no case is e above sigma_s^2, beyond which the dynamics need not be stable (the Hessian of log p_s
    is at least -1 / sigma_s^2).

    A step that starts where alpha(t) = 0 has DDIM's x_s = alpha_s x0 + sigma_s eps for its predictor. So has one that
    ends where sigma(s) = 0, and no corrector.

    Args:
        corrector_steps: Langevin steps at each s, a call of the network each.
        snr: the ratio r of the paper.
        norms: ``expected``, or ``row``: |z| and |score| of each row, as the paper has them for a batch of one.
    Raises:
        ValueError: a grid that is none (``check_times``), corrector_steps below 0, snr not above 0, or unknown norms.
    """
    if corrector_steps < 0:
        raise ValueError(f"corrector_steps is {corrector_steps}; expected a whole number of at least 0")
    if not 0 < snr < math.inf:
        raise ValueError(f"snr is {snr}; expected a number above 0 (Song et al. 2021 take about 0.16)")
    if norms not in NORMS:
        raise ValueError(f"norms {norms!r} is not one of {', '.join(NORMS)}")
    x, times, alpha, sigma = start(path, x, times)
    n = len(times) - 1
    for i in range(n):
        d = denoise(x, times[i])
        if alpha[i] == 0 or sigma[i + 1] == 0:
            x = alpha[i + 1] * d.x0 + sigma[i + 1] * d.eps
        else:
            scale, var = (v.item() for v in transition(path, times[i + 1], times[i]))
            x = (2 - scale) * x - var / sigma[i] * d.eps + math.sqrt(var) * noise_like(x, generator)
        if sigma[i + 1] > 0:
            a = (alpha[i + 1] / alpha[i + 2]) ** 2 if i + 2 <= n else 1.0
            for _ in range(corrector_steps):
                grad, z = -denoise(x, times[i + 1]).eps / sigma[i + 1], noise_like(x, generator)
                largest = sigma[i + 1] ** 2
                if norms == "row":
                    step = (2 * a * (snr * _norm(z) / _norm(grad)) ** 2).clamp(max=largest)
                else:
                    step = min(2 * a * (snr * sigma[i + 1]) ** 2, largest)
                x = _langevin_step(x, grad, z, step)
        x = seen(callback, i, times[i], x, d)
    return x


def langevin(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    t: Tensor | float,
    *,
    steps: int,
    step_size: float,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Unadjusted Langevin dynamics on p_t at a frozen t: ``steps`` times

        x <- x + e score + sqrt(2 e) z

    Its law goes to one that differs from p_t by the order of e. Stable for e up to sigma(t)^2.

    Args:
        x: (B, …), near a draw from p_t. t: of shape (), with sigma(t) > 0.
        step_size: e. What Song & Ermon 2019 call a step is twice this.
        callback: is called with t at each step.
    Returns:
        x at the same t.
    Raises:
        ValueError: a t with another shape, outside [0, 1] or without noise; steps below 0, step_size not above 0.
    """
    t = torch.as_tensor(t).detach().to("cpu", torch.float64)
    if t.ndim or not 0 <= t <= 1:
        raise ValueError(f"t is {t.tolist()}; expected one time in [0, 1] for all rows")
    sigma = path.sigma(t).item()
    if sigma == 0:
        raise ValueError(f"t = {t:g} has sigma = 0, where there is no score: take a t above it")
    _check_steps(steps, step_size)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for i in range(steps):
        d = denoise(x, t)
        x = _langevin_step(x, -d.eps / sigma, noise_like(x, generator), step_size)
        x = seen(callback, i, t, x, d)
    return x


def annealed_langevin(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    steps: int = 100,
    step_size: float | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1), in y = x / alpha with nu = sigma / alpha the level
    of its noise, which is x and sigma on their own path. At each time of the grid with sigma > 0, ``steps`` times

        y <- y + e_i / 2 score_y + sqrt(e_i) z,   e_i = step_size nu_i^2 / nu_L^2,   L the last such time

    and then y is kept to the next time. If the grid ends where sigma = 0, its last step is the denoiser's answer
    alpha x0 (Jolicoeur-Martineau et al. 2021; Song & Ermon 2020). Where alpha = 0 nothing has to be drawn, as x has
    the law of pure noise: the step is DDIM's alpha_s x0 + sigma_s eps.

    Args:
        steps: at each time, a call of the network each.
        step_size: theirs is 2e-5 with nu_L = 0.01. If not given 0.2 nu_L^2, which is that, for any nu_L.
        callback: is called once for each time with sigma > 0, with x at the next one, if there is one.
    Raises:
        ValueError: a grid that is none (``check_times``); steps below 1, step_size not above 0.
    """
    x, times, alpha, sigma = start(path, x, times)
    levels = [i for i in range(len(times)) if sigma[i] > 0]
    lowest = levels[-1]
    _check_steps(steps, 1.0 if step_size is None else step_size, least=1)
    relative = 0.2 if step_size is None else step_size * (alpha[lowest] / sigma[lowest]) ** 2  # e_i / nu_i^2
    for i in levels:
        d = denoise(x, times[i])
        if alpha[i] == 0:
            x = alpha[i + 1] * d.x0 + sigma[i + 1] * d.eps
        else:
            step = relative * sigma[i] ** 2 / 2  # in x: alpha^2 of y's step, since score_y = alpha score
            for k in range(steps):
                d = denoise(x, times[i]) if k > 0 else d
                x = _langevin_step(x, -d.eps / sigma[i], noise_like(x, generator), step)
            if i < lowest:
                x = alpha[i + 1] / alpha[i] * x
            elif i + 1 < len(times):
                d = denoise(x, times[i])
                x = alpha[i + 1] * d.x0
        x = seen(callback, i, times[i], x, d)
    return x


def _rates(path: Path, t: Tensor, ndim: int, g: Callable[[float], float] | float | None) -> tuple[Coeffs, float]:
    """The coefficients and g^2 at the time where a step starts."""
    c = path.coeffs(t, ndim)
    name = type(path).__name__
    if g is None:
        g2 = diffusion(c).item() if c.alpha > 0 else math.inf
        if not math.isfinite(g2):
            raise ValueError(
                f"the forward SDE's own g has no bound at t = {t:g}, where {name} has alpha = {c.alpha:g}: start the "
                "grid below, or give g"
            )
    else:
        value = g(t.item()) if callable(g) else g
        if not 0 <= value < math.inf:
            raise ValueError(f"g is {value} at t = {t:g}; expected a number of at least 0")
        g2 = float(value) ** 2
    if not all(rate.isfinite() for rate in (c.dalpha, c.dsigma)):
        raise ValueError(f"{name} has a rate without bound at t = {t:g}: start the grid below")
    return c, g2


def _langevin_step(x: Tensor, score: Tensor, z: Tensor, step: Tensor | float) -> Tensor:
    return x + step * score + (2 * step) ** 0.5 * z


def _norm(x: Tensor) -> Tensor:
    """Of each row, (B, 1, …, 1)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *[1] * (x.ndim - 1))


def _check_steps(steps: int, step_size: float, least: int = 0) -> None:
    if steps < least:
        raise ValueError(f"steps is {steps}; expected a whole number of at least {least}")
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size is {step_size}; expected a number above 0")
