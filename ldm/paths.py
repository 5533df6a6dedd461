"""How data turns into noise: x_t = alpha(t) x0 + sigma(t) eps, with t = 0 at the data and t = 1 at the noise.

The flow-matching papers (Lipman et al. 2023) run time the other way; here their t is 1 - t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RectifiedFlow(Path):
    """The straight path (Liu et al. 2023; SD3, Esser et al. 2024): alpha = 1 - t, sigma = t. The shift is no part
    of it: see ``timesteps.shift``."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class CosineVP(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol & Dhariwal 2021 without offset; Salimans & Ho 2022)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # this form is exactly 0 at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-log_snr / 2))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * self.sigma(t), math.pi / 2 * self.alpha(t)


class VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1, given by log alpha. d sigma / dt has no bound at t = 0."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def time_of(self, log_alpha: Tensor) -> Tensor:
        """Inverse of :meth:`log_alpha`."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor: ...

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))  # sqrt(1 - alpha^2) without its cancellation near 0

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self.log_alpha(t) - self.sigma(t).log())

    def time_at(self, log_snr: Tensor) -> Tensor:
        return self.time_of(torch.nn.functional.logsigmoid(log_snr) / 2)  # alpha^2 = sigmoid(log_snr)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        dalpha = self.dalpha(t)
        return dalpha, -self.alpha(t) * dalpha / self.sigma(t)


@dataclass(frozen=True)
class LinearVP(VariancePreserving):
    """beta(t) = beta_min + t (beta_max - beta_min), log alpha = -1/2 ∫ beta (Song et al. 2021, eq. 33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"LinearVP: expected 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}")

    def log_alpha(self, t: Tensor) -> Tensor:
        return -t * (self.beta_min / 2 + t * (self.beta_max - self.beta_min) / 4)

    def time_of(self, log_alpha: Tensor) -> Tensor:
        total = -2 * log_alpha  # ∫ beta = b0 t + (b1 - b0) t^2 / 2, solved in the form that does not cancel
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * total)
        return 2 * total / (self.beta_min + root)

    def dalpha(self, t: Tensor) -> Tensor:
        return -(self.beta_min + t * (self.beta_max - self.beta_min)) / 2 * self.alpha(t)


class DiscreteVP(VariancePreserving):
    """DDPM's chain of T steps as a path: step i = 0 … T-1 lies at t = (i + 1) / T, t = 0 is clean, and
    log alpha^2 runs straight between. Where the last alpha is 0, alpha itself does so over the last step.

    Args:
        betas: the T variances in (0, 1]; only the last may be 1. Given alone, or else by name:
        schedule: ``scaled_linear`` (Stable Diffusion), ``linear`` (DDPM) or ``squaredcos_cap_v2`` (GLIDE).
        num_train_timesteps, beta_start, beta_end: T and the ends of the two linear ones.
        zero_terminal_snr: move the chain so that alpha(1) = 0 (Lin et al. 2024, algorithm 1).
    Raises:
        ValueError: an unknown name, or betas that are no such chain.
    """

    def __init__(
        self,
        betas: Sequence[float] | Tensor | None = None,
        *,
        schedule: str = "scaled_linear",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
    ):
        if betas is None:
            betas = named_betas(schedule, num_train_timesteps, beta_start, beta_end)
        beta = torch.as_tensor(betas, dtype=torch.float64, device="cpu").clone()
        if beta.ndim != 1 or len(beta) < 2 or not ((beta > 0) & (beta <= 1)).all() or (beta[:-1] == 1).any():
            raise ValueError("betas: expected at least two numbers in (0, 1], of which only the last may be 1")
        if zero_terminal_snr:
            beta = _zero_terminal_snr(beta)
        self.betas = beta  # (T,) float64
        self.num_train_timesteps = len(beta)
        self.ends_at_zero = bool(beta[-1] == 1)
        steps = torch.log1p(-beta)
        if self.ends_at_zero:
            steps[-1] = 0.0  # the last step is not straight in the logarithm: see log_alpha
        self._table = {torch.device("cpu"): torch.cat([steps.new_zeros(1), steps.cumsum(0) / 2])}  # log alpha, (T + 1,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiscreteVP) and torch.equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return hash((self.num_train_timesteps, self.betas[0].item(), self.betas[-1].item()))

    def __repr__(self) -> str:
        return f"DiscreteVP({self.num_train_timesteps} betas, {self.betas[0].item():.3g} … {self.betas[-1].item():.3g})"

    def table(self, like: Tensor) -> Tensor:
        """log alpha at t = 0, 1/T, …, 1, in float64, on the device of ``like``; copied there once."""
        if like.device not in self._table:
            self._table[like.device] = self._table[torch.device("cpu")].to(like.device)
        return self._table[like.device]

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The step in which t lies, 0 … T-1, and how far in it, in [0, 1]."""
        u = t.double() * self.num_train_timesteps
        k = u.floor().clamp(0, self.num_train_timesteps - 1)
        return k.long(), u - k

    def log_alpha(self, t: Tensor) -> Tensor:
        table, (k, w) = self.table(t), self._place(t)
        value = torch.lerp(table[k], table[k + 1], w)
        if self.ends_at_zero:
            value = torch.where(k == self.num_train_timesteps - 1, value + torch.log1p(-w), value)
        return value.to(t.dtype)

    def time_of(self, log_alpha: Tensor) -> Tensor:
        last, table, y = self.num_train_timesteps - 1, self.table(log_alpha), log_alpha.double()
        k = (torch.searchsorted(-table, -y.contiguous(), right=True) - 1).clamp(0, last)
        w = (y - table[k]) / (table[k + 1] - table[k])
        if self.ends_at_zero:
            w = torch.where(y <= table[last], -torch.expm1(y - table[last]), w)
            k = torch.where(y <= table[last], last, k)
        return ((k + w) / self.num_train_timesteps).to(log_alpha.dtype)

    def dalpha(self, t: Tensor) -> Tensor:
        table, (k, w) = self.table(t), self._place(t)
        rate = (table[k + 1] - table[k]) * torch.lerp(table[k], table[k + 1], w).exp()
        if self.ends_at_zero:
            rate = torch.where(k == self.num_train_timesteps - 1, -table[k].exp(), rate)
        return (rate * self.num_train_timesteps).to(t.dtype)


def named_betas(schedule: str, steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """The variances (T,), float64, that diffusers knows by this name.

    Raises:
        ValueError: an unknown name.
    """
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17, with their cap
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        alpha2 = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha2[1:] / alpha2[:-1]).clamp(max=0.999)
    raise ValueError(f"schedule {schedule!r} is not one of linear, scaled_linear, squaredcos_cap_v2")


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    alpha = torch.cumprod(1 - betas, 0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])  # the first stays, the last becomes 0
    alpha2 = torch.cat([alpha.new_ones(1), alpha**2])
    return 1 - alpha2[1:] / alpha2[:-1]


PATHS: dict[str, type[Path]] = {
    "rectified_flow": RectifiedFlow,
    "cosine": CosineVP,
    "linear": LinearVP,
    "discrete": DiscreteVP,
}
