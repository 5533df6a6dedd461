"""Exponential integrators: solvers in lambda = log(alpha / sigma), in which the part that is linear in x is exact.

With h = lambda_s - lambda_t, the step of the reverse SDE whose g^2 is eta times Anderson's is, without error where x0
does not change (Lu et al. 2022b, proposition 4.1, and for eta = 1 their SDE-DPM-Solver++),

    x_s = sigma_s / sigma_t exp(-eta h) x + alpha_s (1 - exp(-H)) D + sigma_s sqrt(1 - exp(-2 eta h)) z
    H   = (1 + eta) h,    D = the mean of x0 over the step, weighted by exp((1 + eta) lambda)

for every eta: 0 is the probability-flow ODE. The methods differ in how they come to D.

Ends of the path: where alpha(t) = 0, lambda_t has no bound. That step is DDIM's (with noise it is alpha_s x0 +
sigma_s z), and nothing of it is remembered. Where sigma(s) = 0 the last step is DDIM's too, which is x0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..paths import Path
from .common import Callback, Denoise, Generators, noise_like, seen, start

Past = list[tuple[float, Tensor]]  # (lambda, x0) of the steps before, the last one first


def dpmpp(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 2,
    eta: float = 0.0,
    midpoint: bool = True,
    curvature: float = 1.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++, multistep (Lu et al. 2022b, arXiv 2211.01095, algorithm 2): D from the polynomial in lambda
    through x0 here and at the ``order - 1`` steps before. Order 1 is DDIM, and with eta = 1 DDPM.

    The first steps have a lower order, as have the last two of fewer than 15, and the one that ends without noise.

    Args:
        order: 1, 2 or 3.
        eta: in [0, 1]: 0 follows the probability-flow ODE, 1 the reverse SDE (the paper's SDE-DPM-Solver++).
        midpoint: of order 2: take the straight line through the two x0 at the middle of the step, as the paper does;
            False integrates it exactly (diffusers' solver_type="heun").
        curvature: weight of the second difference of order 3. The authors' code, k-diffusion and diffusers leave out
            its factor 2: 0.5 repeats them, and is of second order only.
        generator: of the noise: one for all, or one for each row, so that a row does not depend on its batch.
    Raises:
        ValueError: a grid that is none (``check_times``), or an order or eta that is not there.
    """
    _check_order(order)
    _check_eta(eta)
    x, times, alpha, sigma = start(path, x, times)
    lam, n = _lambdas(path, times), len(times) - 1
    past: Past = []
    for i in range(n):
        d = denoise(x, times[i])
        h = lam[i + 1] - lam[i]
        now = min(order, len(past) + 1)
        if i == n - 1 and (sigma[-1] == 0 or n < 15):
            now = 1
        elif i == n - 2 and n < 15:
            now = min(now, 2)
        gaps = [then - lam[i] for then, _ in past[: now - 1]]
        mean = _mean(d.x0, [x0 for _, x0 in past], _weights(gaps, h, 1 + eta, midpoint, curvature))
        past = _remember(past, lam[i], d.x0, order - 1)
        x = _decay(sigma[i], sigma[i + 1], h, eta) * x + alpha[i + 1] * _share(h, eta) * mean
        if (spread := sigma[i + 1] * _noise(h, eta)) > 0:
            x = x + spread * noise_like(x, generator)
        x = seen(callback, i, times[i], x, d)
    return x


dpmpp_2m = partial(dpmpp, order=2)
dpmpp_2m_sde = partial(dpmpp, order=2, eta=1.0)
dpmpp_3m = partial(dpmpp, order=3)
dpmpp_3m_sde = partial(dpmpp, order=3, eta=1.0)


def dpmpp_2s(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 0.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1 with r = 1/2): D = x0 at the middle of the step in lambda, where
    a first half step of first order leads. Two calls of the network a step, one at the ends of the path.

    Args:
        eta: as in ``dpmpp``; with noise this is k-diffusion's ``dpmpp_sde``. Both half steps are of one Brownian
            path: the noise of the first is part of the step's.
    Raises:
        ValueError: a grid that is none (``check_times``), or eta outside [0, 1].
    """
    _check_eta(eta)
    x, times, alpha, sigma = start(path, x, times)
    lam = _lambdas(path, times)
    for i in range(len(times) - 1):
        d = denoise(x, times[i])
        h, mean, noise = lam[i + 1] - lam[i], d.x0, None
        spread = sigma[i + 1] * _noise(h, eta)
        if alpha[i] > 0 and sigma[i + 1] > 0:
            t = path.time_at(times.new_tensor(lam[i] + lam[i + 1]))  # of twice the lambda in the middle
            alpha_m, sigma_m, half = path.alpha(t).item(), path.sigma(t).item(), h / 2
            u = _decay(sigma[i], sigma_m, half, eta) * x + alpha_m * _share(half, eta) * d.x0
            if spread > 0:
                noise = noise_like(x, generator)
                u = u + sigma_m * _noise(half, eta) * noise
                kept = math.exp(-eta * h)  # of the first half's variance
                noise = (math.sqrt(kept) * noise + noise_like(x, generator)) / math.sqrt(1 + kept)
            mean = denoise(u, t).x0
        elif spread > 0:
            noise = noise_like(x, generator)
        x = _decay(sigma[i], sigma[i + 1], h, eta) * x + alpha[i + 1] * _share(h, eta) * mean
        if noise is not None:
            x = x + spread * noise
        x = seen(callback, i, times[i], x, d)
    return x


dpmpp_2s_sde = partial(dpmpp_2s, eta=1.0)


def unipc(
    denoise: Denoise,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 2,
    corrector: bool = True,
    lower_order_final: bool = True,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2; x0 prediction, B(h) = e^h - 1). The predictor's D
    comes from the polynomial in lambda through the last ``order`` x0. Once x0 at the new x is known, the corrector
    makes the same step again with it as one point more, which raises the order by one and costs no call:

        x <- x + alpha_s (1 - exp(-h)) (D corrected - D predicted)

    Written as a difference, so that what a callback did to x stays. The two polynomials that are straight lines are
    taken at the middle of the step, as in the paper; all others are integrated exactly, and B(h) drops out of them.

    Args:
        order: of the predictor, 1, 2 or 3. The first steps have a lower one.
        corrector: False is UniP, the predictor alone.
        lower_order_final: the last step is of order 1, the one before of order 2 at most.
    Raises:
        ValueError: a grid that is none (``check_times``), or an order that is not there.
    """
    _check_order(order)
    x, times, alpha, sigma = start(path, x, times)
    lam, n = _lambdas(path, times), len(times) - 1
    past: Past = []
    now, predicted = 1, x
    for i in range(n):
        d = denoise(x, times[i])
        if corrector and past:
            (then, x0), before = past[0], past[1:now]
            h = lam[i] - then
            weights = _weights([*(at - then for at, _ in before), h], h)
            corrected = _mean(x0, [*(value for _, value in before), d.x0], weights)
            x = x + alpha[i] * _share(h) * (corrected - predicted)
        h = lam[i + 1] - lam[i]
        now = min(order, len(past) + 1, n - i if lower_order_final else n)
        if sigma[i + 1] == 0:
            now = 1
        gaps = [then - lam[i] for then, _ in past[: now - 1]]
        predicted = _mean(d.x0, [x0 for _, x0 in past], _weights(gaps, h))
        past = _remember(past, lam[i], d.x0, order)
        x = _decay(sigma[i], sigma[i + 1], h) * x + alpha[i + 1] * _share(h) * predicted
        x = seen(callback, i, times[i], x, d)
    return x


# --- the coefficients: float64 on the host, in forms that do not cancel where h is small ------------------------------


def _decay(sigma_t: float, sigma_s: float, h: float, eta: float = 0.0) -> float:
    """What is left of x: sigma_s / sigma_t exp(-eta h)."""
    return sigma_s / sigma_t * (math.exp(-eta * h) if eta else 1.0)  # h may be infinite


def _share(h: float, eta: float = 0.0) -> float:
    """What D counts, in units of alpha_s: 1 - exp(-(1 + eta) h)."""
    return -math.expm1(-(1 + eta) * h)


def _noise(h: float, eta: float) -> float:
    """Standard deviation of the fresh noise in units of sigma_s: sqrt(1 - exp(-2 eta h))."""
    return math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0


def moment(j: int, rate: float) -> float:
    """W_j = ∫_0^1 rate exp(-rate (1 - u)) u^j du, what x0 = u^j over a step counts. By parts W_j = 1 - j W_{j-1} /
    rate from W_0 = 1 - exp(-rate); below rate = 1, where that cancels, its series j! sum_k (-1)^k rate^(k+1) /
    (j + k + 1)!."""
    if j == 0:
        return -math.expm1(-rate)
    if rate >= 1:
        return 1 - j / rate * moment(j - 1, rate)
    total, term = 0.0, rate / (j + 1)
    for k in range(j + 2, j + 22):
        total, term = total + term, -term * rate / k
    return total


def quadrature(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weights w with sum_k w_k nodes_k^j = moments_j, j = 1, 2, …: of the polynomial through 0 and these nodes."""
    if not nodes:
        return []
    at = torch.tensor(nodes, dtype=torch.float64)
    powers = torch.stack([at**j for j in range(1, len(nodes) + 1)])
    return torch.linalg.solve(powers, at.new_tensor(moments)).tolist()


def _weights(
    gaps: Sequence[float], h: float, rate: float = 1.0, midpoint: bool = True, curvature: float = 1.0
) -> list[float]:
    """What each x0 at lambda_t + gap counts in D, against x0 at lambda_t: the mean over the step of the polynomial
    through them, weighted by exp(rate lambda)."""
    if len(gaps) == 1 and midpoint:
        return [h / (2 * gaps[0])]
    moments = [moment(j, rate * h) / moment(0, rate * h) for j in range(1, len(gaps) + 1)]
    if len(gaps) == 2:
        moments[1] *= curvature
    return quadrature([gap / h for gap in gaps], moments)


def _mean(x0: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    mean = x0
    for weight, other in zip(weights, others, strict=False):
        mean = mean + weight * (other - x0)
    return mean


def _remember(past: Past, lam: float, x0: Tensor, most: int) -> Past:
    """The newest first, ``most`` at most; nothing where lambda has no bound."""
    return [(lam, x0), *past][:most] if math.isfinite(lam) else []


def _lambdas(path: Path, times: Tensor) -> list[float]:
    return (path.log_snr(times) / 2).tolist()


def _check_order(order: int) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}; expected 1, 2 or 3")


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; expected a number in [0, 1]")
