"""Paths against the algebra of x_t, their own inverse, finite differences and stock diffusers' chains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ldm.paths import PATHS, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow

ALL = {
    "rectified_flow": RectifiedFlow(),
    "cosine": CosineVP(),
    "linear": LinearVP(),
    "scaled_linear": DiscreteVP(),
    "ddpm": DiscreteVP(schedule="linear", beta_start=1e-4, beta_end=0.02),
    "squaredcos": DiscreteVP(schedule="squaredcos_cap_v2"),
    "zero_snr": DiscreteVP(zero_terminal_snr=True),
    "short": DiscreteVP([0.1, 0.2, 0.4, 0.9]),
}
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())


def times(n: int = 2001) -> Tensor:
    return torch.linspace(1e-4, 1 - 1e-4, n, dtype=torch.float64)


@every_path
def test_time_at_is_the_inverse_of_log_snr(path: Path) -> None:
    t = times()
    snr = path.alpha(t) ** 2 / path.sigma(t) ** 2
    torch.testing.assert_close(path.log_snr(t), snr.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.time_at(path.log_snr(t)), t, rtol=0, atol=1e-6)
    assert (path.log_snr(t).diff() < 0).all()


@every_path
def test_time_at_is_exact_in_float32_to_its_digits(path: Path) -> None:
    t = times(301).float()
    # near the ends log_snr changes by more than one digit per 1e-5 of t on every path here
    torch.testing.assert_close(path.time_at(path.log_snr(t)), t, rtol=0, atol=2e-5)


@every_path
def test_ends(path: Path) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = path.alpha(ends), path.sigma(ends)
    assert alpha[0] == 1 and sigma[0] == 0
    assert 0 <= alpha[1] < 0.3 and 0.95 < sigma[1] <= 1
    if isinstance(path, RectifiedFlow | CosineVP) or path is ALL["zero_snr"]:
        for exact in (ends, ends.float()):  # cos(pi / 2) in float32 is not 0
            assert path.alpha(exact)[1] == 0 and path.sigma(exact)[1] == 1


@every_path
def test_rates_are_finite_differences(path: Path) -> None:
    t, h = times(500), 1e-7
    if isinstance(path, DiscreteVP):  # it has corners at its nodes
        t = (torch.arange(path.num_train_timesteps, dtype=torch.float64) + 0.5) / path.num_train_timesteps
    dalpha, dsigma = path.rates(t)
    # central differences: h^2 of curvature, which sigma = sqrt(t) has near 0, and 1e-16 / h of rounding
    torch.testing.assert_close(dalpha, (path.alpha(t + h) - path.alpha(t - h)) / (2 * h), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dsigma, (path.sigma(t + h) - path.sigma(t - h)) / (2 * h), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in ALL if n != "rectified_flow"])
def test_variance_is_preserved(name: str) -> None:
    t = times()
    total = ALL[name].alpha(t) ** 2 + ALL[name].sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), rtol=0, atol=1e-12)


def test_rates_of_a_path_that_gives_none_come_from_differentiation() -> None:
    class Parabola(Path):
        def alpha(self, t: Tensor) -> Tensor:
            return 1 - t**2

        def sigma(self, t: Tensor) -> Tensor:
            return t**3

        def time_at(self, log_snr: Tensor) -> Tensor:
            raise AssertionError("not asked for")

    t = times(7)
    c = Parabola().coeffs(t, 3)
    torch.testing.assert_close(c.dalpha.flatten(), -2 * t)
    torch.testing.assert_close(c.dsigma.flatten(), 3 * t**2)
    assert c.dsigma.shape == (7, 1, 1)


@every_path
def test_mix_is_alpha_x0_plus_sigma_eps_by_row(path: Path) -> None:
    x0, eps = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).unbind()
    t = torch.tensor([0.1, 0.5, 0.93], dtype=torch.float64)
    x = path.mix(x0, eps, t)
    for i in range(3):
        torch.testing.assert_close(x[i], path.alpha(t[i]) * x0[i] + path.sigma(t[i]) * eps[i])
        torch.testing.assert_close(x[i : i + 1], path.mix(x0[i : i + 1], eps[i : i + 1], t[i]))


CHAINS = [
    dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=200),
    dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True),
]


@pytest.mark.parametrize("config", CHAINS)
def test_nodes_are_the_stock_chain(config: dict) -> None:
    stock = DDIMScheduler(**config)
    ours = dict(config, schedule=config["beta_schedule"], zero_terminal_snr=config.get("rescale_betas_zero_snr", False))
    path = DiscreteVP(**{k: v for k, v in ours.items() if k not in ("beta_schedule", "rescale_betas_zero_snr")})
    steps = len(stock.alphas_cumprod)
    nodes = (torch.arange(steps, dtype=torch.float64) + 1) / steps
    # stock multiplies up to 1000 factors in float32
    torch.testing.assert_close(path.alpha(nodes) ** 2, stock.alphas_cumprod.double(), rtol=2e-5, atol=1e-9)
    x0, eps, i = torch.randn(8, 4, 4), torch.randn(8, 4, 4), torch.linspace(0, steps - 1, 8).int()
    noisy: Any = stock.add_noise(x0, eps, i)  # type: ignore[arg-type]
    torch.testing.assert_close(path.mix(x0, eps, nodes[i].float()), noisy, rtol=0, atol=2e-5)
    again = DiscreteVP(path.betas.tolist())
    assert again == path and hash(again) == hash(path) and path != DiscreteVP([0.1, 0.2])


def test_long_chain_tends_to_the_continuous_path() -> None:
    steps = 20_000
    chain = DiscreteVP(schedule="linear", num_train_timesteps=steps, beta_start=0.1 / steps, beta_end=20 / steps)
    t = times()
    # log(1 - b) = -b - b^2/2, and b <= 20/T: the sum of b^2/2 is at most 200/T, weighted by alpha about 1e-3
    torch.testing.assert_close(chain.alpha(t), LinearVP().alpha(t), rtol=0, atol=1e-3)


def test_zero_terminal_snr_keeps_the_first_step() -> None:
    plain, zero = DiscreteVP(), DiscreteVP(zero_terminal_snr=True)
    assert zero.ends_at_zero and not plain.ends_at_zero
    torch.testing.assert_close(zero.betas[0], plain.betas[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(DiscreteVP(plain.betas, zero_terminal_snr=True).betas, zero.betas)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DiscreteVP(schedule="scaled"), "scaled_linear"),
        (lambda: DiscreteVP([0.1]), "at least two"),
        (lambda: DiscreteVP([0.1, 0.0]), r"\(0, 1\]"),
        (lambda: DiscreteVP([1.0, 0.5]), "only the last"),
        (lambda: LinearVP(0.0, 1.0), "beta_min"),
        (lambda: RectifiedFlow().coeffs(torch.zeros(2, 1), 4), r"\(2, 1\)"),
        (lambda: RectifiedFlow().mix(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)), "eps has shape"),
        (lambda: RectifiedFlow().mix(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), "t has shape"),
    ],
)
def test_bad_input_is_named(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_every_name_makes_a_path() -> None:
    assert {name: type(make()) for name, make in PATHS.items()} == {
        "rectified_flow": RectifiedFlow, "cosine": CosineVP, "linear": LinearVP, "discrete": DiscreteVP,
    }  # fmt: skip
