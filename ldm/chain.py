"""DDPM's chain of T steps, as a path in continuous time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .process import Path

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class DiscreteVP(Path):
    """DDPM's chain of T steps as a path: step i = 0 … T-1 lies at t = (i + 1) / T, and t = 0 is clean. Between its
    nodes nu = sigma / alpha runs straight, as diffusers' samplers take it; where the last alpha is 0, 1 / nu does so
    over the last step.

    Args:
        betas: the T variances in (0, 1]; only the last may be 1. Given alone, or else by name:
        schedule: ``scaled_linear`` (Stable Diffusion), ``linear`` (DDPM), ``squaredcos_cap_v2`` (GLIDE) or
            ``sigmoid`` (GeoDiff).
        num_train_timesteps, beta_start, beta_end: T, and the ends of all but the cosine.
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
        self.named = None if betas is not None else (schedule, num_train_timesteps, beta_start, beta_end)
        if betas is None:
            betas = named_betas(schedule, num_train_timesteps, beta_start, beta_end)
        beta = torch.as_tensor(betas, dtype=torch.float64, device="cpu").clone()
        if beta.ndim != 1 or len(beta) < 2 or not ((beta > 0) & (beta <= 1)).all() or (beta[:-1] == 1).any():
            raise ValueError("betas: expected at least two numbers in (0, 1], of which only the last may be 1")
        self.zero_terminal_snr = zero_terminal_snr
        if zero_terminal_snr:
            beta = _zero_terminal_snr(beta)
        self.betas = beta  # (T,) float64
        self.num_train_timesteps = len(beta)
        self.ends_at_zero = bool(beta[-1] == 1)
        log_alpha2 = torch.cat([beta.new_zeros(1), torch.log1p(-beta).cumsum(0)])
        self._table = {beta.device: torch.sqrt(torch.expm1(-log_alpha2))}  # nu, (T + 1,); the last may be inf

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiscreteVP) and torch.equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return hash((self.num_train_timesteps, self.betas[0].item(), self.betas[-1].item()))

    def __repr__(self) -> str:
        return f"DiscreteVP({self.num_train_timesteps} betas, {self.betas[0].item():.3g} … {self.betas[-1].item():.3g})"

    def table(self, like: Tensor) -> Tensor:
        """sigma / alpha at t = 0, 1/T, …, 1, in float64, on the device of ``like``; copied there once."""
        if like.device not in self._table:
            self._table[like.device] = self._table[torch.device("cpu")].to(like.device)
        return self._table[like.device]

    def _ratio(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """nu at t and its rate, float64. In the last step of a chain that ends without signal, nu grows as 1 / (1 - w)
        so that 1 / nu falls straight to 0."""
        table, last = self.table(t), self.num_train_timesteps - 1
        u = t.double() * self.num_train_timesteps
        k = u.floor().clamp(0, last).long()  # the step in which t lies, and how far in it
        w, low, high = u - k, table[k], table[k + 1]
        if not self.ends_at_zero:
            return torch.lerp(low, high, w), (high - low) * self.num_train_timesteps
        ends = k == last
        high = torch.where(ends, low, high)
        nu = torch.where(ends, low / (1 - w), torch.lerp(low, high, w))
        return nu, torch.where(ends, nu / (1 - w), high - low) * self.num_train_timesteps

    def alpha(self, t: Tensor) -> Tensor:
        return (1 / torch.sqrt(1 + self._ratio(t)[0] ** 2)).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 / torch.sqrt(1 + self._ratio(t)[0] ** -2)).to(t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        return (-2 * self._ratio(t)[0].log()).to(t.dtype)

    def time_at(self, log_snr: Tensor) -> Tensor:
        table, last, nu = self.table(log_snr), self.num_train_timesteps - 1, torch.exp(-log_snr.double() / 2)
        k = (torch.searchsorted(table, nu.contiguous(), right=True) - 1).clamp(0, last)
        low, high = table[k], table[k + 1]
        w = torch.where(high.isinf(), 1 - low / nu, (nu - low) / (high - low))
        return ((k + w) / self.num_train_timesteps).to(log_snr.dtype)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        nu, rate = self._ratio(t)
        ends = nu.isinf()  # there 1 / nu =: mu is the finite one, and d alpha = d mu
        cubed = (1 + nu**2) ** -1.5
        table = self.table(t)
        dalpha = torch.where(ends, -self.num_train_timesteps / table[-2], -nu * rate * cubed)
        dsigma = torch.where(ends, torch.zeros_like(nu), rate * cubed)
        return dalpha.to(t.dtype), dsigma.to(t.dtype)


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
    if schedule == "sigmoid":  # GeoDiff, Xu et al. 2022
        return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start
    raise ValueError(f"schedule {schedule!r} is not one of {', '.join(BETA_SCHEDULES)}")


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    alpha = torch.cumprod(1 - betas, 0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])  # the first stays, the last becomes 0
    alpha2 = torch.cat([alpha.new_ones(1), alpha**2])
    return 1 - alpha2[1:] / alpha2[:-1]
