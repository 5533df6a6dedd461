"""How likely a model finds pictures, in bits per dimension: fewer are likelier.

    z = encode(pipe, pictures, torch.Generator().manual_seed(0))       # normalized latents (``inversion``)
    ode_bits(pipe, z, "a red apple").bits_per_dim                      # (B,): of their density, by the ODE
    bound_bits(pipe, z, "a red apple").total                           # (B,): an upper bound of it, by a chain
    picture_bits(pipe, pictures, "a red apple", decoder_std=0.1).total # (B,): a bound for the 8-bit pictures

The first two measure latents: minus the log of a density, so they may be below 0, and they compare models that share
an autoencoder. The last compares any models.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.bound import discretized_log_prob
from ldm.likelihood import Bound, Likelihood, log_likelihood, variational_bound
from ldm.models.vae import Moments
from ldm.paths import DiscreteVP
from ldm.prediction import X0, Score
from ldm.reuse import reuse
from ldm.sampling import noise_like

from . import core
from .core import Generators, Parts, awake
from .inversion import Prompts, conds_of, parts_of
from .pictures import Pictures, to_pictures
from .schedulers import Schedule

LEVELS = 256


def ode_bits(
    pipe: Any,
    latents: Tensor,
    prompt: Prompts = None,
    *,
    probes: int | None = 1,
    atol: float = 1e-3,
    rtol: float = 1e-3,
    t_min: float | None = None,
    t_max: float | None = None,
    generator: Generators | None = None,
) -> Likelihood:
    """log p(z | prompt) of what the probability-flow ODE draws from N(0, 1): no bound, but only as good as probes and
    tolerances (``ldm.likelihood.log_likelihood``, Song et al. 2021).

    Args:
        pipe: any of our pipelines, or ``Parts``. latents: (B, C, h, w), normalized.
        prompt: one for all or one for each; None is the model without a prompt.
        probes: None for the exact trace: a backward pass for each of the C h w values, at each call.
        t_min, t_max: where the model can be asked, by default: from 1 / T on a chain of T steps, from the lowest sigma
            that EDM was taught, 1e-5 where x0 or the score is told; up to 0.999 where x0 is not to be had at alpha = 0.
            Above 0 it is the density of latents with the noise of t_min.
    Returns:
        ``log_prob`` and ``stderr`` (B,) in nats, ``bits_per_dim`` (B,) of C h w dimensions, ``latent`` (B, C, h, w):
        the noise at t_max.
    Raises:
        ValueError: see ``log_likelihood``.
    """
    parts = parts_of(pipe)
    s, z = parts.schedule, latents.to(awake(parts.net).device)
    low, high = _ends(s)
    with torch.no_grad():
        (cond,) = conds_of(parts, z, prompt)
    return log_likelihood(
        partial(parts.denoiser(), cond=cond), s.path, z, probes=probes, atol=atol, rtol=rtol, generator=generator,
        t_min=low if t_min is None else t_min, t_max=high if t_max is None else t_max,
    )  # fmt: skip


@torch.no_grad()
def bound_bits(
    pipe: Any,
    latents: Tensor,
    prompt: Prompts = None,
    *,
    steps: int | None = None,
    variance: str | None = None,
    generator: Generators | None = None,
) -> Bound:
    """L_T + sum of L_{t-1} + L_0 >= -log p(z | prompt) of what ``ddpm`` draws in so many steps (Ho et al. 2020, eq. 5),
    in bits per latent value; one draw of z_t for each term. ``terms`` (B, steps) say where the bits are spent.

    Args:
        pipe, latents, prompt: as in ``ode_bits``.
        steps: of the chain, a call of the network each: all of a trained chain's, or 250 of another path's, if None.
            Fewer make another, worse chain.
        variance: of a step: ``fixed_small``, ``fixed_large``, or ``learned``, which is the default where it is.
    Raises:
        ValueError: see ``ldm.likelihood.variational_bound``.
    """
    parts = parts_of(pipe)
    path, z, denoiser = parts.schedule.path, latents.to(awake(parts.net).device), parts.denoiser()
    if isinstance(path, DiscreteVP):
        chain = path.num_train_timesteps
        times = torch.linspace(chain, 0, (steps or chain) + 1, dtype=torch.float64).round() / chain
    else:
        times = parts.schedule.times(steps or 250)
    variance = variance or ("learned" if denoiser.learned_variance else "fixed_large")
    (cond,) = conds_of(parts, z, prompt)
    with reuse(cond):
        denoise = partial(denoiser, cond=cond)
        return variational_bound(denoise, path, z, times, variance=variance, generator=generator)


class PictureBits(NamedTuple):
    """Bits per dimension of pictures (B, 3, H, W), each (B,): total = decoder + latents - posterior."""

    total: Tensor
    decoder: Tensor  # -log p(x | z)
    latents: Tensor  # -log p(z), or its bound
    posterior: Tensor  # -log q(z | x)


@torch.no_grad()
def picture_bits(
    pipe: Any,
    pictures: Pictures,
    prompt: Prompts = None,
    *,
    decoder_std: float,
    method: str = "bound",
    generator: Generators | None = None,
    **options: Any,
) -> PictureBits:
    """An upper bound of -log p(x | prompt) of 8-bit pictures, with one draw of z (Kingma & Welling 2014, eq. 3):

        -log p(x) <= E_q [-log p(x | z) - log p(z) + log q(z | x)]

    The autoencoder was not trained as a likelihood. Here p(x | z) is the decoder's picture with Gaussian noise of
    ``decoder_std``, on 256 levels (Ho et al. 2020, eq. 13), q the encoder's Gaussian: with that a model of pictures is
    complete, and these are its bits. The std is a part of the model: measure it on training pictures
    (``decoder_std``), not on those to be judged.

    Args:
        pictures: as in ``inversion.invert``, on 256 levels.
        method: ``bound`` or ``ode``: how -log p(z) is found. ``options``: of ``bound_bits`` or ``ode_bits``.
    Raises:
        ValueError: another method, pictures that are not on 256 levels, a decoder_std not above 0.
    """
    if method not in ("bound", "ode"):
        raise ValueError(f"method {method!r} is not one of bound, ode")
    if not decoder_std > 0:
        raise ValueError(
            f"decoder_std is {decoder_std}; expected a number above 0: decoder_std(pipe, training_pictures)"
        )
    parts = parts_of(pipe)
    x, mean, z, log_q = _drawn(parts, pictures, generator)
    log_var = torch.tensor(2 * math.log(decoder_std), dtype=x.dtype, device=x.device)
    decoder = -discretized_log_prob(x, mean, log_var, LEVELS).flatten(1).sum(1)
    if method == "bound":
        bits = bound_bits(parts, z, prompt, generator=generator, **options).total
    else:
        bits = ode_bits(parts, z, prompt, generator=generator, **options).bits_per_dim
    nats = math.log(2) * x[0].numel()  # a bit per dimension of the picture
    decoder, latents, posterior = decoder / nats, bits * z[0].numel() / x[0].numel(), -log_q / nats
    return PictureBits(decoder + latents - posterior, decoder, latents, posterior)


@torch.no_grad()
def decoder_std(pipe: Any, pictures: Pictures, generator: Generators | None = None) -> float:
    """How far pictures in [-1, 1] lie from what the decoder draws of them, root mean square: the likeliest std of
    Gaussian noise about it (Rybkin et al. 2021, section 3.2)."""
    x, mean, _, _ = _drawn(parts_of(pipe), pictures, generator)
    return (x - mean).square().mean().sqrt().item()


def _drawn(parts: Parts, pictures: Pictures, generator: Generators | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures in [-1, 1], the decoder's, normalized latents z drawn from q, and log q(z | x) (B,) in nats."""
    x, scale = to_pictures(pictures), parts.vae.latent_scale
    level = (x + 1) / 2 * (LEVELS - 1)
    if (level - level.round()).abs().max() > 1e-3:
        raise ValueError(f"pictures: expected {LEVELS} levels, whole numbers / {LEVELS - 1}; round them")
    moments = core.encode(parts.vae, x, parts.text.family)
    mean, log_var = (m.to(torch.promote_types(m.dtype, torch.float32)) for m in moments)
    eps = noise_like(mean, generator)
    z = scale.normalize(Moments(mean, log_var).sample(eps))
    log_q = -(eps.square() + log_var + math.log(2 * math.pi) + 2 * math.log(scale.scale)).flatten(1).sum(1) / 2
    drawn = 2 * core.decode(parts.vae, z, parts.text.family) - 1
    return x.to(z.device, z.dtype), drawn.to(z.dtype), z, log_q


def _ends(s: Schedule) -> tuple[float, float]:
    """The times between which the model can be asked."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    high = 0.999 if s.prediction.needs_signal and s.path.alpha(one) == 0 else 1.0
    if isinstance(s.path, DiscreteVP):
        return 1 / s.path.num_train_timesteps, high
    if s.time_input.log_sigma:
        return s.times(2)[-2].item(), high
    unbounded = not all(rate.isfinite() for rate in s.path.rates(zero))
    return (1e-5 if unbounded or isinstance(s.prediction, X0 | Score) else 0.0), high
