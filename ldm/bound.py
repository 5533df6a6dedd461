"""The terms of the variational bound on -log p(x0), in bits per dimension (Ho et al. 2020, eq. 5; Nichol & Dhariwal
2021): L_T at the noise, L_{t-1} for each step back, L_0 for the last one. ``likelihood`` adds them up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .process import Path, check_shapes, posterior, transition

if TYPE_CHECKING:
    from .denoiser import Denoised

VARIANCES = ("fixed_small", "fixed_large", "learned")  # diffusers' names


def step_bound(
    path: Path,
    x0: Tensor,
    x_t: Tensor,
    denoised: Denoised,
    s: Tensor,
    t: Tensor,
    *,
    variance: str = "fixed_large",
    bins: int | None = None,
) -> Tensor:
    """L_{t-1} = KL(q(x_s | x_t, x0) || p(x_s | x_t)), (B,), for one step back from t to s < t. p has the posterior's
    mean with the predicted x0 put in, and log Sigma = f log beta + (1 - f) log beta tilde.

    Where s = 0, beta tilde is 0 and the term is L_0 = -log p(x0 | x_t). Its log beta tilde is the one of the step of
    equal width before (Nichol & Dhariwal 2021, section 3.1, clip it so); beta if t = 1 leaves no such step.

    Args:
        x0, x_t: (B, …). denoised: of x_t. s, t: () or (B,), rows with s = 0 and with s > 0 mixed at will.
        variance: f: ``fixed_small`` 0, ``fixed_large`` 1, ``learned`` ``denoised.var_frac``.
        bins: of x0 in L_0: None for continuous data and a Gaussian density, 256 for pixels in [-1, 1] on so many
            levels and the discretized Gaussian of Ho et al. 2020, eq. 13.
    Raises:
        ValueError: shapes do not fit; an unknown variance, or ``learned`` without ``var_frac``; fewer than 2 bins;
            times on the CPU that are not 0 <= s < t <= 1.
    """
    check_shapes(x0, t, x_t=x_t, denoised=denoised.x0)
    check_shapes(x0, s)
    _check_step(s, t)
    fraction = _fraction(denoised, variance)
    log_small, log_ratio = (_like(v, x0) for v in variance_range(path, s, t))
    first = _like((s == 0).double(), x0)  # 1 or 0: a mask to multiply with, as scalars on the CPU are for any device
    excess = fraction * log_ratio  # log Sigma - log beta tilde
    log_var = log_small + excess
    error = _like(posterior(path, s.double(), t.double()).of_x0, x0) * (x0 - denoised.x0)  # of the mean
    square = error**2 * torch.exp(-log_var)
    kl = (excess + torch.expm1(-excess) + square) / 2
    if bins is None:
        decoder = (math.log(2 * math.pi) + log_var + square) / 2
    else:
        decoder = -discretized_log_prob(x0, x0 - first * error, log_var, bins)
    return _bits(first * decoder + (1 - first) * kl)


def prior_bound(path: Path, x0: Tensor, t: float = 1.0) -> Tensor:
    """L_T = KL(q(x_t | x0) || N(0, alpha_t^2 + sigma_t^2)), (B,) for x0 (B, …): sampling starts with as much variance
    as data of unit variance has at t, which is 1 where variance is preserved. 0 where alpha_t = 0."""
    at = torch.tensor(t, dtype=torch.float64)
    alpha2, sigma2 = path.alpha(at).item() ** 2, path.sigma(at).item() ** 2
    share = alpha2 / (alpha2 + sigma2)  # the KL's ratio of variances is 1 - share
    return _bits((share * (x0**2 - 1) - math.log1p(-share)) / 2)


def variance_range(path: Path, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """log beta tilde and log beta - log beta tilde of the step from t back to s, float64, in the shape of the times:
    the range in which a learned log-variance lies. Where s = 0, ``step_bound`` says what beta tilde is."""
    s, t = s.double(), t.double()
    large, small = transition(path, s, t).var, posterior(path, s, t).var
    small = torch.where(s > 0, small, posterior(path, t, (2 * t).clamp(max=1)).var)
    small = torch.where(small > 0, small, large)
    return small.log(), (large / small).log()


def discretized_log_prob(x: Tensor, mean: Tensor, log_var: Tensor, bins: int = 256) -> Tensor:
    """log of the mass that N(mean, exp(log_var)) has within half a level of x, in nats; x in [-1, 1] on ``bins``
    equal levels, the two at the ends reach out to infinity (Ho et al. 2020, eq. 13). All tensors broadcast.

    Raises:
        ValueError: fewer than 2 bins.
    """
    if bins < 2:
        raise ValueError(f"bins is {bins}; expected 2 or more levels of x in [-1, 1], or None for continuous data")
    half, scale = 1 / (bins - 1), torch.exp(-log_var / 2)
    low, high = (x - half - mean) * scale, (x + half - mean) * scale
    flip = low + high > 0  # by symmetry: in the lower tail the difference of two log Phi keeps its digits
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    inside = log_high + torch.log(-torch.expm1(log_low - log_high))
    # below the upper border of the lowest level, or above the lower one of the highest
    outside = torch.special.log_ndtr(torch.where(x < 0, x + half - mean, mean - x + half) * scale)
    return torch.where(x.abs() > 1 - half, outside, inside)


def _fraction(denoised: Denoised, variance: str) -> Tensor | float:
    if variance not in VARIANCES:
        raise ValueError(f"variance {variance!r} is not one of {', '.join(VARIANCES)}")
    if variance != "learned":
        return float(variance == "fixed_large")
    if denoised.var_frac is None:
        raise ValueError("variance 'learned': the denoiser tells no var_frac; make it with learned_variance=True")
    return denoised.var_frac


def _check_step(s: Tensor, t: Tensor) -> None:
    if torch.compiler.is_compiling() or {s.device.type, t.device.type} != {"cpu"}:
        return  # to look would make the host wait for the device
    if not ((s >= 0) & (s < t) & (t <= 1)).all():
        raise ValueError(f"a step back from t = {t.tolist()} to s = {s.tolist()}: expected 0 <= s < t <= 1")


def _like(value: Tensor, x: Tensor) -> Tensor:
    """() as it is, for every device; (B,) -> (B, 1, …, 1) where x is."""
    if value.ndim == 0:
        return value.to(x.dtype)
    return value.to(x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def _bits(nats: Tensor) -> Tensor:
    """(B, …) -> (B,): the mean over a row, in bits."""
    return nats.reshape(nats.shape[0], -1).mean(1) / math.log(2)
