"""Mixtures of Gaussians: laws for which everything about the noisy x_t is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.denoiser import Denoised
from ldm.process import Path


class Mixture:
    """sum_k w_k N(m_k, C_k), float64.

    With x_t = alpha x0 + sigma eps and S_k = alpha^2 C_k + sigma^2 I, component k of x_t is N(alpha m_k, S_k), and
    given it both x0 and eps are Gaussian:

        E[x0 | x_t, k]  = m_k + alpha C_k S_k^-1 (x_t - alpha m_k)
        E[eps | x_t, k] = sigma S_k^-1 (x_t - alpha m_k)

    so that neither needs a division by sigma or alpha. Each C_k = Q diag(l) Q^T is taken apart once, and then
    S_k^-1 = Q diag(1 / (alpha^2 l + sigma^2)) Q^T at any time.

    Args:
        weights: (K,), positive; scaled to sum to 1. means: (K, d). covs: (K, d, d), positive definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor):
        weights, means, covs = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covs))
        modes, d = means.shape
        if weights.shape != (modes,) or covs.shape != (modes, d, d) or not (weights > 0).all():
            raise ValueError("expected weights (K,) above 0, means (K, d) and covs (K, d, d)")
        self.weights, self.means, self.covs = weights / weights.sum(), means, covs
        self.values, self.axes = torch.linalg.eigh(covs)  # (K, d), (K, d, d)
        if not (self.values > 0).all():
            raise ValueError("covs: expected positive definite matrices")
        self._turn = self.axes.transpose(0, 1).reshape(d, modes * d)  # x @ this: x along the axes of each C_k
        self._centres = torch.einsum("kj,kji->ki", means, self.axes)  # the means, each along its own axes

    @property
    def mean(self) -> Tensor:
        """(d,) of the whole law."""
        return self.weights @ self.means

    @property
    def cov(self) -> Tensor:
        """(d, d) of the whole law."""
        off = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covs + off[:, :, None] * off[:, None, :])

    def denoise(self, path: Path) -> Callable[[Tensor, Tensor], Denoised]:
        """The best denoiser: (x_t (…, d), t) -> E[x0 | x_t] and E[eps | x_t], and the first once more as its output.
        t is () or has the leading shape of x_t."""

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            alpha, sigma = (v.reshape(*v.shape, 1, 1) for v in (path.alpha(t), path.sigma(t)))  # (…, 1, 1)
            z, values, share = self._look(x, alpha, sigma)
            z = share[..., None] * z / values
            x0 = share @ self.means + alpha[..., 0] * self._back(self.values * z)
            eps = sigma[..., 0] * self._back(z)
            return Denoised(x0, eps, x0)

        return denoise

    def log_prob(self, x: Tensor) -> Tensor:
        """(…) nats, for x (…, d)."""
        return self._log_joint(*self._whiten(x, 1.0, 0.0)).logsumexp(-1)

    def score(self, x: Tensor) -> Tensor:
        """The gradient of ``log_prob``, (…, d)."""
        z, values, share = self._look(x, 1.0, 0.0)
        return -self._back(share[..., None] * z / values)

    def responsibilities(self, x: Tensor) -> Tensor:
        """p(k | x), (…, K)."""
        return self._look(x, 1.0, 0.0)[2]

    def posterior_mode(self, x: Tensor) -> Tensor:
        """The component that x most likely came from, (…) int64."""
        return self.responsibilities(x).argmax(-1)

    def marginal(self, path: Path, t: Tensor) -> Mixture:
        """The law of x_t, t of shape () and with sigma(t) > 0 or alpha(t) > 0."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        return Mixture(self.weights, alpha * self.means, alpha**2 * self.covs + sigma**2 * eye)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + torch.einsum("nij,nj->ni", self.axes[k], self.values[k].sqrt() * z)

    def _whiten(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """x_t - alpha m_k along the axes of each C_k, (…, K, d), and the variances there."""
        along = (x @ self._turn).reshape(*x.shape[:-1], *self.values.shape)
        return along - alpha * self._centres, alpha**2 * self.values + sigma**2

    def _log_joint(self, z: Tensor, values: Tensor) -> Tensor:
        """log w_k + log N(x_t; alpha m_k, S_k), (…, K)."""
        return self.weights.log() - 0.5 * ((z**2 / values).sum(-1) + (2 * math.pi * values).log().sum(-1))

    def _look(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        z, values = self._whiten(x, alpha, sigma)
        return z, values, self._log_joint(z, values).softmax(-1)

    def _back(self, z: Tensor) -> Tensor:
        """The sum over k, from the axes of each C_k to x's own: (…, K, d) -> (…, d)."""
        return z.flatten(-2) @ self._turn.T


def three_modes() -> Mixture:
    """In the plane: three modes of different weight, shape and tilt, far enough apart to tell them."""
    return Mixture(
        torch.tensor([0.5, 0.3, 0.2]),
        torch.tensor([[-1.5, 0.0], [1.2, 1.2], [0.9, -1.5]]),
        torch.tensor([[[0.10, 0.04], [0.04, 0.06]], [[0.05, -0.03], [-0.03, 0.09]], [[0.04, 0.01], [0.01, 0.12]]]),
    )


def gaussian(
    path: Path, mean: float = 1.5, std: float = 0.6, calls: list[float] | None = None
) -> Callable[[Tensor, Tensor], Denoised]:
    """The exact denoiser of data N(mean, std^2), each coordinate by itself; notes the times that it is asked for."""

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        if calls is not None:
            calls.append(t.item())
        alpha, sigma = path.alpha(t), path.sigma(t)
        residual = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return Denoised(mean + alpha * std**2 * residual, sigma * residual, x)

    return denoise


def flow_of_gaussian(path: Path, x: Tensor, t: Tensor, s: Tensor, mean: float = 1.5, std: float = 0.6) -> Tensor:
    """Where the probability-flow ODE takes x from t to s: it keeps the quantile."""
    spread = [torch.sqrt((path.alpha(u) * std) ** 2 + path.sigma(u) ** 2) for u in (t, s)]
    return path.alpha(s) * mean + spread[1] / spread[0] * (x - path.alpha(t) * mean)
