"""The schedules that the field knows, all with t = 0 at the data and t = 1 at the noise.

The flow-matching papers (Lipman et al. 2023) run time the other way; here their t is 1 - t.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .chain import DiscreteVP
from .process import Coeffs, Path, check_shapes


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


@dataclass(frozen=True)
class SigmoidVP(Path):
    """alpha^2 falls from 1 to 0 along a sigmoid (Jabri et al. 2022; Chen 2023, algorithm 1): with z from start / tau
    to end / tau, alpha^2 = (sigmoid(z_1) - sigmoid(z)) / (sigmoid(z_1) - sigmoid(z_0)).

    Written with sigmoid(a) - sigmoid(b) = sinh((a - b) / 2) / (2 cosh(a / 2) cosh(b / 2)), which does not cancel.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def __post_init__(self) -> None:
        if not (self.start < self.end and self.tau > 0 and self.width <= 600):
            raise ValueError(
                f"SigmoidVP: expected start < end, tau > 0 and (end - start) / tau of at most 600, got start "
                f"{self.start}, end {self.end}, tau {self.tau}"
            )

    @property
    def width(self) -> float:
        """z_1 - z_0."""
        return (self.end - self.start) / self.tau

    @property
    def tilt(self) -> float:
        """log(cosh(z_1 / 2) / cosh(z_0 / 2)): 0 where start = -end."""
        return _log_cosh(self.end / self.tau / 2) - _log_cosh(self.start / self.tau / 2)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        half = self.width / 2
        return _log_sinh(half * (1 - t)) - _log_sinh(half * t) - self.tilt

    def time_at(self, log_snr: Tensor) -> Tensor:
        rho, half = (log_snr + self.tilt).clamp(min=-1000.0), self.width / 2  # sinh(half (1 - t)) = e^rho sinh(half t)
        return (_softplus(half - rho) - _softplus(-half - rho)) / self.width

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # d alpha^2 / dt = -C / cosh(z / 2)^2; d alpha has no bound where alpha = 0, nor d sigma where sigma = 0
        z = (self.start + t * (self.end - self.start)) / self.tau
        scale = self.width / 4 / (_sigmoid(self.end / self.tau) - _sigmoid(self.start / self.tau))
        rate = scale / torch.cosh(z / 2) ** 2
        return -rate / (2 * self.alpha(t)), rate / (2 * self.sigma(t))


@dataclass(frozen=True)
class VE(Path):
    """Noise is added and the data is left as it is: alpha = 1, sigma = sigma_max t (EDM, Karras et al. 2022, table 1,
    whose own time is sigma). Which sigmas are visited is the business of the grid and of the time sampler."""

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_max < math.inf:
            raise ValueError(f"VE: sigma_max is {self.sigma_max}; expected a number above 0")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2) / self.sigma_max

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.full_like(t, self.sigma_max)


@dataclass(frozen=True)
class NCSN(Path):
    """The geometric ladder of NCSN as an SDE (Song et al. 2021, eq. 30): alpha = 1 and, started from clean data,
    sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^(2t) - 1). Equal steps of t are equal ratios of sigma above
    sigma_min."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"NCSN: expected 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @property
    def growth(self) -> float:
        return 2 * math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.expm1(self.growth * t).sqrt()

    def time_at(self, log_snr: Tensor) -> Tensor:
        # log(1 + (sigma / sigma_min)^2), without the overflow of a large sigma
        return _softplus(-log_snr - 2 * math.log(self.sigma_min)) / self.growth

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.growth * self.sigma_min**2 * torch.exp(self.growth * t) / 2
        return torch.zeros_like(t), rate / self.sigma(t)


def _sigmoid(x: float) -> float:
    return (1 + math.tanh(x / 2)) / 2


def _log_cosh(x: float) -> float:
    return abs(x) + math.log1p(math.exp(-2 * abs(x))) - math.log(2)


def _log_sinh(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-2 * x)) - math.log(2)  # of x >= 0; -inf at 0


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # exact in every dtype; torch's own switches to x above a threshold


PATHS: dict[str, type[Path]] = {
    "rectified_flow": RectifiedFlow,
    "cosine": CosineVP,
    "linear": LinearVP,
    "sigmoid": SigmoidVP,
    "ve": VE,
    "ncsn": NCSN,
    "discrete": DiscreteVP,
}

__all__ = [
    "NCSN", "PATHS", "VE", "Coeffs", "CosineVP", "DiscreteVP", "LinearVP", "Path", "RectifiedFlow", "SigmoidVP",
    "VariancePreserving", "check_shapes",
]  # fmt: skip
