"""What the network's output means. Every kind is a way to and from the pair (x0, eps); nothing else is converted.

In the formulas x = alpha x0 + sigma eps, o is the network's output, and a dot is d/dt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from .paths import Coeffs


@runtime_checkable
class Prediction(Protocol):
    needs_signal: ClassVar[bool]  # x0 is not to be had where alpha = 0

    def target(self, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
        """What the network should have said."""
        ...

    def to_x0(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor: ...

    def to_eps(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor: ...

    def scale_input(self, c: Coeffs) -> Tensor | float:
        """What x_t is multiplied with before the network sees it."""
        ...


class _PlainInput:
    needs_signal: ClassVar[bool] = False

    def scale_input(self, c: Coeffs) -> Tensor | float:
        return 1.0


@dataclass(frozen=True)
class Eps(_PlainInput):
    """The noise (DDPM, Ho et al. 2020)."""

    needs_signal: ClassVar[bool] = True

    def target(self, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
        return eps

    def to_x0(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        return (x_t - c.sigma * output) / c.alpha

    def to_eps(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        return output


@dataclass(frozen=True)
class X0(_PlainInput):
    """The data. Where sigma = 0 there is no noise to tell, and eps is given as 0."""

    def target(self, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
        return x0

    def to_x0(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        return output

    def to_eps(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        inverse = torch.where(c.sigma > 0, 1 / c.sigma, torch.zeros_like(c.sigma))
        return (x_t - c.alpha * output) * inverse


@dataclass(frozen=True)
class V(_PlainInput):
    """v = alpha eps - sigma x0 (Salimans & Ho 2022, there with alpha^2 + sigma^2 = 1)."""

    def target(self, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
        return c.alpha * eps - c.sigma * x0

    def to_x0(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        return (c.alpha * x_t - c.sigma * output) / (c.alpha**2 + c.sigma**2)

    def to_eps(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        return (c.sigma * x_t + c.alpha * output) / (c.alpha**2 + c.sigma**2)


@dataclass(frozen=True)
class Flow(_PlainInput):
    """The velocity dx/dt at fixed (x0, eps): eps - x0 on the straight path (Lipman et al. 2023 have its negative).
    Not defined where a rate has no bound: the variance-preserving chains at t = 0."""

    def target(self, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
        return c.dalpha * x0 + c.dsigma * eps

    def to_x0(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        return (c.sigma * output - c.dsigma * x_t) / (c.dalpha * c.sigma - c.dsigma * c.alpha)

    def to_eps(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        return (c.dalpha * x_t - c.alpha * output) / (c.dalpha * c.sigma - c.dsigma * c.alpha)


@dataclass(frozen=True)
class Score(_PlainInput):
    """The gradient of log p(x_t | x0), -eps / sigma (Song et al. 2021). Not defined where sigma = 0."""

    needs_signal: ClassVar[bool] = True

    def target(self, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
        return -eps / c.sigma

    def to_x0(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        return (x_t + c.sigma**2 * output) / c.alpha

    def to_eps(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        return -c.sigma * output


@dataclass(frozen=True)
class Karras(_PlainInput):
    """EDM's preconditioning (Karras et al. 2022, table 1), on any path: input and target have unit variance for
    data of standard deviation ``sigma_data``."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"karras: sigma_data is {self.sigma_data}; expected a number above 0")

    def variance(self, c: Coeffs) -> Tensor:
        """Of x_t: alpha^2 d^2 + sigma^2."""
        return (c.alpha * self.sigma_data) ** 2 + c.sigma**2

    def target(self, x0: Tensor, eps: Tensor, c: Coeffs) -> Tensor:
        d = self.sigma_data
        return (c.sigma * x0 - c.alpha * d**2 * eps) / (d * self.variance(c).sqrt())

    def to_x0(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        d, var = self.sigma_data, self.variance(c)
        return c.alpha * d**2 / var * x_t + c.sigma * d / var.sqrt() * output

    def to_eps(self, x_t: Tensor, output: Tensor, c: Coeffs) -> Tensor:
        d, var = self.sigma_data, self.variance(c)
        return c.sigma / var * x_t - c.alpha * d / var.sqrt() * output

    def scale_input(self, c: Coeffs) -> Tensor | float:
        return self.variance(c).rsqrt()


PREDICTIONS: dict[str, type[Prediction]] = {
    "epsilon": Eps,
    "sample": X0,
    "v_prediction": V,
    "flow_prediction": Flow,
    "score": Score,
    "karras": Karras,
}
