"""Paths against the algebra of x_t, their own inverse, finite differences and stock diffusers' chains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from ldm.chain import BETA_SCHEDULES
from ldm.paths import NCSN, PATHS, VE, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow, SigmoidVP

ALL = {
    "rectified_flow": RectifiedFlow(),
    "cosine": CosineVP(),
    "linear": LinearVP(),
    "sigmoid": SigmoidVP(),
    "sigmoid_steep": SigmoidVP(0.0, 3.0, 0.1),  # z to 30: its ends are 1e-13 in alpha^2
    "ve": VE(),
    "ncsn": NCSN(),
    "scaled_linear": DiscreteVP(),
    "ddpm": DiscreteVP(schedule="linear", beta_start=1e-4, beta_end=0.02),
    "sigmoid_betas": DiscreteVP(schedule="sigmoid", beta_start=1e-4, beta_end=0.02),
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
    whole = torch.linspace(0, 1, 3001, dtype=torch.float64)
    torch.testing.assert_close(path.time_at(path.log_snr(whole)), whole, rtol=0, atol=1e-6)
    assert (path.log_snr(whole).diff() < 0).all() and path.log_snr(whole)[0] == torch.inf


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
    if isinstance(path, VE | NCSN):
        assert alpha[1] == 1 and sigma[1] == pytest.approx(path.sigma_max, rel=1e-7)
        return
    assert 0 <= alpha[1] < 0.3 and 0.95 < sigma[1] <= 1
    if isinstance(path, RectifiedFlow | CosineVP | SigmoidVP) or path is ALL["zero_snr"]:
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
    differences = (path.sigma(t + h) - path.sigma(t - h)) / (2 * h)
    # where sigma is 80, its rounding weighs as much more
    torch.testing.assert_close(dsigma, differences, rtol=1e-5, atol=1e-7 * max(1.0, path.sigma(t).max().item()))


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("rectified_flow", "ve", "ncsn")])
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
    dict(beta_schedule="sigmoid", beta_start=1e-4, beta_end=0.02),
    dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True),
]


@pytest.mark.parametrize("config", CHAINS)
def test_nodes_are_the_stock_chain(config: dict) -> None:
    stock = (DDPMScheduler if config["beta_schedule"] == "sigmoid" else DDIMScheduler)(**config)
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
    assert path.named is not None and again.named is None
    assert again == path and hash(again) == hash(path) and path != DiscreteVP([0.1, 0.2])


def test_between_its_nodes_the_ratio_of_noise_to_signal_runs_straight() -> None:
    """As diffusers' Euler family takes it (``interpolation_type="linear"``)."""
    for path in (DiscreteVP(), DiscreteVP(zero_terminal_snr=True)):
        node, u = torch.tensor([0.0, 3, 500, 998]), torch.tensor([0.25, 0.5, 0.3, 0.8], dtype=torch.float64)
        nu = lambda k, path=path: torch.exp(-path.log_snr(k / 1000) / 2)  # noqa: E731
        below, above = nu(node.double()), nu(node.double() + 1)
        torch.testing.assert_close(nu(node + u), torch.lerp(below, above, u), rtol=1e-12, atol=0)
    last = torch.tensor([999.0, 999.5, 1000.0], dtype=torch.float64) / 1000
    signal = torch.exp(path.log_snr(last) / 2)  # falls straight to nothing
    torch.testing.assert_close(signal, signal[0] * torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))


def test_sigmoid_is_chens() -> None:
    """Chen 2023, algorithm 1, written as it stands there."""
    t = times()
    for start, end, tau in ((-3.0, 3.0, 1.0), (0.0, 3.0, 0.5), (-3.0, 3.0, 0.3)):
        v0, v1, v = (torch.sigmoid((start + u * (end - start)) / tau) for u in (t * 0, t * 0 + 1, t))
        torch.testing.assert_close(SigmoidVP(start, end, tau).alpha(t) ** 2, (v1 - v) / (v1 - v0), rtol=0, atol=1e-12)


def test_ncsn_is_songs_ladder_above_its_least_noise() -> None:
    path, t = NCSN(0.01, 50.0), torch.linspace(0.4, 1, 20, dtype=torch.float64)
    torch.testing.assert_close(path.sigma(t), 0.01 * 5000**t, rtol=1e-3, atol=0)


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
        (lambda: SigmoidVP(3.0, -3.0), "start < end"),
        (lambda: SigmoidVP(tau=0.001), "at most 600"),
        (lambda: VE(0.0), "sigma_max is 0"),
        (lambda: NCSN(1.0, 0.5), "sigma_min < sigma_max"),
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
        "rectified_flow": RectifiedFlow, "cosine": CosineVP, "linear": LinearVP, "sigmoid": SigmoidVP, "ve": VE,
        "ncsn": NCSN, "discrete": DiscreteVP,
    }  # fmt: skip
    assert set(BETA_SCHEDULES) == {"linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"}
