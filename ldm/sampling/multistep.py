"""Linear multistep solvers of the probability-flow ODE dy / dnu = eps, with y = x / alpha and nu = sigma / alpha.

Where alpha(t) = 0, nu has no bound: that step is DDIM's, x_s = alpha_s x0 + sigma_s eps, and nothing of it is
remembered. The data, nu = 0, is no special place.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..paths import Path
from .common import Callback, Denoise, Generators, seen, start
from .exponential import quadrature

# Adams-Bashforth on equal steps: what the newest slopes count, the last one first
ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def lms(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 4,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """k-diffusion's linear multistep: the polynomial in nu through eps here and at the ``order - 1`` steps before is
    integrated over the step. Adams-Bashforth on unequal steps; order 1 is DDIM, and the first steps have a lower one.

    Args:
        order: 1 to 4.
    Raises:
        ValueError: a grid that is none (``check_times``), or an order that is not there.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order is {order}; expected 1, 2, 3 or 4")
    x, times, alpha, sigma = start(path, x, times)
    past: list[tuple[float, Tensor]] = []  # (nu, eps) of the steps before, the last one first
    for i in range(len(times) - 1):
        d = denoise(x, times[i])
        mean = d.eps
        if alpha[i] > 0:
            nu = sigma[i] / alpha[i]
            step = sigma[i + 1] / alpha[i + 1] - nu
            nodes = [(then - nu) / step for then, _ in past]
            weights = quadrature(nodes, [1 / (j + 1) for j in range(1, len(nodes) + 1)])
            for weight, (_, eps) in zip(weights, past, strict=True):
                mean = mean + weight * (eps - d.eps)
            past = [(nu, d.eps), *past][: order - 1]
        x = _step(x, d.x0, mean, alpha[i : i + 2], sigma[i : i + 2])
        x = seen(callback, i, times[i], x, d)
    return x


def pndm(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    prk: bool = False,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """PNDM (Liu et al. 2022, arXiv 2202.09778): DDIM's step (their eq. 9) with the eps of a multistep rule on
    *equal steps of t* (eq. 12), whatever the grid is. Of second order, and of the rule's only on steps equal in nu.

    It starts with one pseudo improved Euler step, as Stable Diffusion does ("PLMS"; n + 1 calls of the network):

        e = (eps(x_t, t) + eps(x_s', s)) / 2,    x_s' = DDIM's step with eps(x_t, t)

    or, with ``prk``, with three pseudo Runge-Kutta steps through (t + s) / 2 (eq. 13; n + 9 calls). A starting step
    that would ask the network where sigma(s) = 0 is DDIM's.

    Raises:
        ValueError: a grid that is none (``check_times``).
    """
    x, times, alpha, sigma = start(path, x, times)
    past: list[Tensor] = []  # eps of the steps before, the last one first
    for i in range(len(times) - 1):
        d, t, s = denoise(x, times[i]), times[i], times[i + 1]
        mean, ends = d.eps, (alpha[i : i + 2], sigma[i : i + 2])
        if alpha[i] > 0:
            slopes = [d.eps, *past]
            if prk and len(past) < 3 and sigma[i + 1] > 0:
                mean = _runge_kutta(denoise, path, x, t, s, d.eps)
            elif not prk and not past and sigma[i + 1] > 0:
                mean = (d.eps + denoise(_step(x, d.x0, d.eps, *ends), s).eps) / 2
            else:
                mean = sum((w * e for w, e in zip(ADAMS[len(slopes) - 1], slopes, strict=True)), 0 * d.eps)
            past = slopes[:3]
        x = seen(callback, i, t, _step(x, d.x0, mean, *ends), d)
    return x


def _runge_kutta(denoise: Denoise, path: Path, x: Tensor, t: Tensor, s: Tensor, first: Tensor) -> Tensor:
    """The mean eps of Runge and Kutta's classical rule, each of its four legs being DDIM's step from x (eq. 13)."""
    middle = (t + s) / 2

    def ask(eps: Tensor, at: Tensor) -> Tensor:
        alpha, sigma = ([f(t).item(), f(at).item()] for f in (path.alpha, path.sigma))
        return denoise(_step(x, x, eps, alpha, sigma), at).eps

    second = ask(first, middle)
    third = ask(second, middle)
    return (first + 2 * second + 2 * third + ask(third, s)) / 6


def _step(x: Tensor, x0: Tensor, eps: Tensor, alpha: Sequence[float], sigma: Sequence[float]) -> Tensor:
    """y_s = y_t + (nu_s - nu_t) eps, in x; from no signal, alpha_s x0 + sigma_s eps."""
    (alpha_t, alpha_s), (sigma_t, sigma_s) = alpha, sigma
    if alpha_t == 0:
        return alpha_s * x0 + sigma_s * eps
    return alpha_s / alpha_t * x + (sigma_s - alpha_s * sigma_t / alpha_t) * eps
