"""How likely the model finds its data: the variational bound of a chain of steps, and the exact density of the
probability-flow ODE. Both are read off the same ``denoise(x_t, t) -> Denoised`` that samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from .bound import discretized_log_prob, prior_bound, step_bound, variance_range
from .process import Path
from .sampling.common import Denoise, Generators, noise_like
from .sampling.grids import check_times


class Bound(NamedTuple):
    """Bits per dimension: total (B,) = prior (B,) + the sum of terms (B, n), the noisiest step first and L_0 last."""

    total: Tensor
    prior: Tensor
    terms: Tensor


@torch.no_grad()
def variational_bound(
    denoise: Denoise,
    path: Path,
    x0: Tensor,
    times: Tensor,
    *,
    variance: str = "fixed_large",
    bins: int | None = None,
    generator: Generators = None,
) -> Bound:
    """L_T + sum of L_{t-1} + L_0 >= -log p(x0) of the chain that steps down ``times`` (Ho et al. 2020, eq. 5), with
    one draw of x_t for each term. DDPM's own bound takes all its T nodes: ``torch.arange(T, -1, -1) / T``.

    Args:
        x0: (B, …); with ``bins``, in [-1, 1].
        times: falling, n + 1 of them, the last 0.
        variance, bins: of ``step_bound``.
        generator: of the noise: one for all, or one for each row.
    Raises:
        ValueError: a grid that is none or does not end at 0, data outside [-1, 1] with ``bins``; see ``step_bound``.
    """
    x0, times = x0.to(torch.promote_types(x0.dtype, torch.float32)), check_times(times)
    if times[-1] != 0:
        raise ValueError(f"times end at {times[-1]:g}; a bound on the data itself has to end at 0")
    if bins is not None and not (x0.abs() <= 1).all():
        raise ValueError(f"x0 reaches {x0.abs().max():g}; with bins={bins} its levels lie in [-1, 1]")
    terms = []
    for t, s in pairwise(times):
        x_t = path.mix(x0, noise_like(x0, generator), t)
        terms.append(step_bound(path, x0, x_t, denoise(x_t, t), s, t, variance=variance, bins=bins))
    prior, steps = prior_bound(path, x0, times[0].item()), torch.stack(terms, 1)
    return Bound(prior + steps.sum(1), prior, steps)


class Likelihood(NamedTuple):
    """Of x0 (B, …), float64 but for the latent.

    log_prob: (B,) nats. bits_per_dim: (B,). stderr: (B,) of log_prob in nats, by the probes: 0 with the exact trace,
    NaN with one probe. latent: (B, …), where the ODE takes x0 at t_max.
    """

    log_prob: Tensor
    bits_per_dim: Tensor
    stderr: Tensor
    latent: Tensor


@torch.no_grad()
def log_likelihood(
    denoise: Denoise,
    path: Path,
    x0: Tensor,
    *,
    probes: int | None = None,
    atol: float = 1e-6,
    rtol: float = 1e-6,
    generator: Generators = None,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    t_min: float = 0.0,
    t_max: float = 1.0,
    bins: int | None = None,
) -> Likelihood:
    """log p(x0) by the instantaneous change of variables along the probability-flow ODE (Chen et al. 2018, eq. 8; Song
    et al. 2021, section 4.3), integrated by torchdiffeq's dopri5.

    It runs in the angle phi = atan2(sigma, alpha) and y = x / r, r = hypot(alpha, sigma), which is bounded at both
    ends of every path (Salimans & Ho 2022, appendix D):

        dy / dphi = cos(phi) eps - sin(phi) x0 =: f
        log p(x0) = log p(x_1) + d log(r_1 / r_0) + ∫ div f dphi

    State and integral are in float64, the denoiser sees the dtype of x0. Each row keeps the tolerances by itself (the
    integral as nats per dimension), though the steps are common to the batch.

    Args:
        denoise: differentiable in x_t, each row by itself; its parameters get no gradient.
        x0: (B, …), d values a row.
        probes: None for the exact trace by d backward passes a call (d up to a few hundred); n for Hutchinson's and
            Skilling's estimate by n Rademacher probes a row, drawn once (Grathwohl et al. 2019).
        generator: of the probes: one for all, or one for each row.
        log_prior: (B, …) -> (B,) nats, the density at t_max; N(0, r_1^2), from which samplers start, if not given. A
            path that keeps some signal is right with the true one only.
        t_min: x0 is taken as data at this time. 0 asks for eps and x0 at sigma = 0, which a prediction of x0 or of
            the score does not tell, nor a flow where d sigma / dt has no bound (LinearVP, SigmoidVP, NCSN): give 1e-5
            or so for these. A DDPM chain has seen nothing below 1 / T.
        t_max: below 1 for a network that says nothing of x0 where alpha = 0 (Eps, Score).
        bins: the data were so many integer levels, scaled to [-1, 1] with noise between: adds log2(bins / 2) to
            bits_per_dim, 7 for 256, which is then of the levels themselves.
    Raises:
        ValueError: fewer than 1 probe or 2 bins, times that are not 0 <= t_min < t_max <= 1, a denoiser without
            gradient, a prior of another shape, an integral that does not converge.
    """
    _check(probes, t_min, t_max, bins)
    dtype, rows = torch.promote_types(x0.dtype, torch.float32), x0.shape[0]
    dims = x0.numel() // rows
    ends = torch.tensor([t_min, t_max], dtype=torch.float64)
    alpha, sigma = path.alpha(ends), path.sigma(ends)
    (r0, r1), span = torch.hypot(alpha, sigma).tolist(), torch.atan2(sigma, alpha)
    probe = None
    if probes is not None:
        like = x0.new_zeros(rows, probes, *x0.shape[1:], dtype=torch.float64)
        probe = torch.where(noise_like(like, generator) < 0, -1.0, 1.0).to(torch.float64)

    def field(phi: Tensor, y: Tensor) -> Tensor:
        phi = phi.to("cpu", torch.float64).clamp(span[0], span[1])  # rounding must not lead past the ends
        t = path.time_at(2 * (phi.cos().log() - phi.sin().log())).clamp(t_min, t_max)
        t = torch.where(phi >= span[1], ends[1], torch.where(phi <= span[0], ends[0], t))
        answer = denoise((torch.hypot(path.alpha(t), path.sigma(t)) * y).to(dtype), t)
        return phi.cos() * answer.eps.double() - phi.sin() * answer.x0.double()

    def slope(phi: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            f = field(phi, y)
            if not f.requires_grad:
                raise ValueError("denoise gave an answer without gradient; it must not run under no_grad or inference")
            trace = divergence(f, y, probe)
        return f.detach(), trace / dims

    y0 = x0.double() / r0
    for phi, cure in zip(span, (f"t_min above {t_min:g}", f"t_max below {t_max:g}"), strict=True):
        if not field(phi, y0).isfinite().all():  # the solver would find out late, and say it with a NaN
            raise ValueError(f"the denoiser's answer is not finite at an end of the path; give a {cure}")
    start = (y0, y0.new_zeros(rows, 1 if probes is None else probes))
    over = span.to(y0.device)
    options = {"norm": _worst_row, "step_t": over[1:]}  # the last step ends at the end, and does not look beyond
    try:
        y, integral = odeint(slope, start, over, atol=atol, rtol=rtol, method="dopri5", options=options)
    except AssertionError as error:
        raise ValueError(f"the probability-flow ODE cannot be followed from t = {t_min:g} ({error})") from error
    y = y[-1]
    latent = (r1 * y).to(dtype)
    if log_prior is None:
        prior = -(y.reshape(rows, -1).square().sum(1) + dims * math.log(2 * math.pi)) / 2 - dims * math.log(r1)
    else:
        prior = log_prior(latent)
        if prior.shape != (rows,):
            raise ValueError(f"log_prior gave {tuple(prior.shape)} for x {tuple(x0.shape)}; expected ({rows},)")
    each = prior.double().unsqueeze(1) + dims * (math.log(r1 / r0) + integral[-1])  # (B, probes)
    log_prob = each.mean(1)
    if probes == 1:
        error = torch.full_like(log_prob, math.nan)
    else:
        error = torch.zeros_like(log_prob) if probes is None else each.std(1) / math.sqrt(probes)
    offset = 0.0 if bins is None else math.log2(bins / 2)
    return Likelihood(log_prob, offset - log_prob / (dims * math.log(2)), error, latent)


def divergence(f: Tensor, x: Tensor, probes: Tensor | None = None) -> Tensor:
    """Of f(x), both (B, …), row by row: the exact trace of df / dx, (B, 1), by one backward pass for each value of a
    row; or v^T (df / dx) v, (B, n), for each of the ``probes`` v (B, n, …)."""
    flat, given = f.reshape(len(f), -1), []
    if probes is None:
        for i in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True, materialize_grads=True)
            given.append(row.reshape(flat.shape)[:, i])
        return torch.stack(given).sum(0).unsqueeze(1)
    for v in probes.unbind(1):
        (pulled,) = torch.autograd.grad(f, x, v, retain_graph=True, materialize_grads=True)
        given.append((pulled * v).reshape(flat.shape).sum(1))
    return torch.stack(given, 1)


def _worst_row(state: tuple[Tensor, ...]) -> Tensor:
    """The largest root mean square of a row: no row hides behind its batch."""
    return torch.stack([x.reshape(len(x), -1).square().mean(1).max().sqrt() for x in state]).max()


def _check(probes: int | None, t_min: float, t_max: float, bins: int | None) -> None:
    if probes is not None and probes < 1:
        raise ValueError(f"probes is {probes}; expected 1 or more, or None for the exact trace")
    if not 0 <= t_min < t_max <= 1:
        raise ValueError(f"t_min is {t_min} and t_max {t_max}; expected 0 <= t_min < t_max <= 1")
    if bins is not None and bins < 2:
        raise ValueError(f"bins is {bins}; expected 2 or more levels, or None for continuous data")


__all__ = [
    "Bound", "Likelihood", "discretized_log_prob", "divergence", "log_likelihood", "prior_bound", "step_bound",
    "variance_range", "variational_bound",
]  # fmt: skip
