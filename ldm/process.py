"""What holds for every path: how data turns into noise, x_t = alpha(t) x0 + sigma(t) eps with t = 0 at the data and
t = 1 at the noise, and the Gaussians and fields that follow from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class Coeffs(NamedTuple):
    """alpha, sigma and their rates d/dt, shaped to broadcast over x: () or (B, 1, …, 1)."""

    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    dsigma: Tensor


class Path(ABC):
    """A schedule. Every method takes times in [0, 1] of any shape and keeps their shape, dtype and device."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """The t at which log(alpha^2 / sigma^2) is ``log_snr``: the exact inverse of :meth:`log_snr`."""

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2): falls with t; +inf where there is no noise, -inf where there is no signal."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha / dt and d sigma / dt, by forward-mode differentiation unless a path knows better."""
        return torch.func.jvp(lambda u: (self.alpha(u), self.sigma(u)), (t,), (torch.ones_like(t),))[1]

    def coeffs(self, t: Tensor, ndim: int) -> Coeffs:
        """Coefficients at ``t``, () or (B,), for an x of ``ndim`` dimensions.

        Raises:
            ValueError: t has another shape.
        """
        if t.ndim > 1:
            raise ValueError(f"t has shape {tuple(t.shape)}; expected one time for all, (), or one a row, (B,)")
        shape = t.shape + (1,) * (ndim - 1 if t.ndim else 0)
        values = (self.alpha(t), self.sigma(t), *self.rates(t))
        return Coeffs(*(v.reshape(shape) for v in values))

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t from data and noise of one shape (B, …) and t of shape () or (B,).

        Raises:
            ValueError: the shapes do not fit.
        """
        check_shapes(x0, t, eps=eps)
        c = self.coeffs(t, x0.ndim)
        return c.alpha * x0 + c.sigma * eps


def check_shapes(x: Tensor, t: Tensor, **same: Tensor) -> None:
    """ValueError unless ``t`` is () or (B,) for x (B, …), and each tensor of ``same`` has x's shape."""
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] != x.shape[0]):
        raise ValueError(f"t has shape {tuple(t.shape)}; for x {tuple(x.shape)} expected () or ({x.shape[0]},)")
    for name, other in same.items():
        if other.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}, x has {tuple(x.shape)}; they must be equal")


# --- the chain: Gaussians between two times s < t (Ho et al. 2020, section 2; Kingma et al. 2021, appendix A) ---------


class Transition(NamedTuple):
    """q(x_t | x_s) = N(scale x_s, var); scale and var have the shape of the times."""

    scale: Tensor
    var: Tensor


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) = N(of_x0 x0 + of_xt x_t, var); all have the shape of the times."""

    of_x0: Tensor
    of_xt: Tensor
    var: Tensor


def transition(path: Path, s: Tensor, t: Tensor) -> Transition:
    """q(x_t | x_s) for s < t: scale = alpha_t / alpha_s, var = sigma_t^2 - scale^2 sigma_s^2. On DDPM's chain, with s
    one step before t, var is its beta."""
    fresh = -torch.expm1(path.log_snr(t) - path.log_snr(s))  # 1 - SNR_t / SNR_s: the share of new noise in sigma_t^2
    return Transition(path.alpha(t) / path.alpha(s), path.sigma(t) ** 2 * fresh)


def posterior(path: Path, s: Tensor, t: Tensor) -> Posterior:
    """q(x_s | x_t, x0) for s < t, by Bayes (Ho et al. 2020, eq. 6 and 7; var is their beta tilde)."""
    scale, var = transition(path, s, t)
    s2, t2 = path.sigma(s) ** 2, path.sigma(t) ** 2
    return Posterior(path.alpha(s) * var / t2, scale * s2 / t2, var * s2 / t2)


def posterior_mean_of_eps(x_t: Tensor, eps: Tensor, path: Path, s: Tensor, t: Tensor) -> Tensor:
    """The posterior's mean with x0 = (x_t - sigma_t eps) / alpha_t put in: (x_t - var / sigma_t eps) / scale (Ho et
    al. 2020, eq. 11). x_t and eps: (B, …); s, t: () or (B,)."""
    check_shapes(x_t, t, eps=eps)
    scale, var = transition(path, s, t)
    return (x_t - _like(var / path.sigma(t), x_t) * eps) / _like(scale, x_t)


# --- continuous time: velocity, score, and the noise that may be added without changing any marginal ------------------


def velocity(x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
    """u = dx/dt of the probability-flow ODE, from E[x0 | x_t] and E[eps | x_t] (Lipman et al. 2023, eq. 8, time
    turned round)."""
    return c.dalpha * x0 + c.dsigma * eps


def score(eps: Tensor, c: Coeffs) -> Tensor:
    """The gradient of log p_t(x_t), from E[eps | x_t] (Tweedie; Song et al. 2021)."""
    return -eps / c.sigma


def velocity_of_score(x_t: Tensor, score: Tensor, c: Coeffs) -> Tensor:
    """u = (dalpha / alpha) x - g^2 / 2 score, with g of ``diffusion``. Not defined where alpha = 0."""
    return c.dalpha / c.alpha * x_t - diffusion(c) / 2 * score


def score_of_velocity(x_t: Tensor, velocity: Tensor, c: Coeffs) -> Tensor:
    """Inverse of ``velocity_of_score``, in a form that is also right where alpha = 0. Not defined where sigma = 0."""
    return (c.alpha * velocity - c.dalpha * x_t) / (c.sigma * (c.dalpha * c.sigma - c.dsigma * c.alpha))


def diffusion(c: Coeffs) -> Tensor:
    """g^2 of the forward SDE dx = (dalpha / alpha) x dt + g dW whose marginals are the path's (Kingma et al. 2021,
    eq. 53): beta(t) where variance is preserved, d sigma^2 / dt where it explodes. No bound where alpha = 0."""
    return 2 * c.sigma * (c.dsigma - c.sigma * c.dalpha / c.alpha)


def reverse_drift(velocity: Tensor, score: Tensor, g2: Tensor | float) -> Tensor:
    """u - g^2 / 2 score: the drift of dx = [u - g^2 / 2 score] dt + g dW, run from t = 1 to 0, that has the marginals
    of the path for every g(t)^2 >= 0: 0 is the probability-flow ODE, ``diffusion`` the reverse SDE of Anderson 1982
    (Song et al. 2021, eq. 6 and 13). Sources that run from noise to data write + g^2 / 2."""
    return velocity - g2 / 2 * score


def _like(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(value.shape + (1,) * (x.ndim - 1 if value.ndim else 0))
