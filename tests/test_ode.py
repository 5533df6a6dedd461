"""The solvers of sampling/ode.py and DDPM's variances, each against its own formula or the exact flow of a Gaussian."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoised, Denoiser, TimeInput
from ldm.paths import NCSN, VE, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow, SigmoidVP
from ldm.prediction import PREDICTIONS, Flow
from ldm.process import posterior, transition
from ldm.sampling import ddim, ddim_inversion, ddpm, euler, flow_heun, heun, midpoint, rk45, time_grid
from tests.gmm import flow_of_gaussian, gaussian

MEAN, STD = 1.5, 0.6  # of the Gaussian
ONE = torch.ones((), dtype=torch.float64)
PATHS = [RectifiedFlow(), CosineVP(), LinearVP(), SigmoidVP(), VE(20.0), NCSN(), DiscreteVP(),
         DiscreteVP(zero_terminal_snr=True)]  # fmt: skip


def starts(path: Path) -> Tensor:
    return torch.linspace(-2.5, 2.5, 11, dtype=torch.float64) * path.sigma(ONE)


# --- two calls a step ---------------------------------------------------------------------------------------------


def test_on_the_straight_path_they_are_the_textbook_methods_in_t() -> None:
    path = RectifiedFlow()
    denoise, times, x = gaussian(path), time_grid(path, 5), starts(path)

    def u(x: Tensor, t: Tensor) -> Tensor:
        d = denoise(x, t)
        return d.eps - d.x0

    a = b = x
    for t, s in pairwise(times):
        h = s - t
        a = a + h / 2 * (u(a, t) + u(a + h * u(a, t), s)) if s > 0 else a + h * u(a, t)
        b = b + h * u(b + h / 2 * u(b, t), (t + s) / 2)
    torch.testing.assert_close(flow_heun(denoise, path, x, times), a)
    torch.testing.assert_close(midpoint(denoise, path, x, times), b)


def test_where_variance_explodes_the_two_kinds_of_heun_are_one() -> None:
    path = VE(20.0)
    times, x = time_grid(path, 12, shift=0.1), starts(path)
    torch.testing.assert_close(heun(gaussian(path), path, x, times), flow_heun(gaussian(path), path, x, times))


@pytest.mark.parametrize(("sampler", "calls"), [(heun, 8), (flow_heun, 9), (midpoint, 10)])
def test_how_often_the_network_is_asked(sampler, calls: int) -> None:
    path, seen = RectifiedFlow(), []
    sampler(gaussian(path, calls=seen), path, starts(path), time_grid(path, 5))
    assert len(seen) == calls  # heun: no second look from alpha = 0, nor at the end


# --- churn ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [euler, heun])
@pytest.mark.parametrize("path", [VE(20.0), LinearVP(), RectifiedFlow()], ids=repr)
def test_churn_keeps_the_law(sampler, path: Path) -> None:
    g, rows, n = torch.Generator().manual_seed(0), 40_000, 60
    t = path.time_at(torch.linspace(math.log(20**-2), math.log(0.05**-2), n, dtype=torch.float64)).clamp(0, 0.999)
    times = torch.cat([t, t.new_zeros(1)])
    a, s = path.alpha(times[0]), path.sigma(times[0])
    z = torch.randn(rows, generator=g, dtype=torch.float64)
    x = a * MEAN + torch.sqrt(a**2 * STD**2 + s**2) * z
    plain = sampler(gaussian(path), path, x, times)
    churned = sampler(gaussian(path), path, x, times, s_churn=20.0, s_tmin=0.1, s_tmax=10.0, generator=g)
    assert torch.corrcoef(torch.stack([plain, churned]))[0, 1] < 0.9  # the noise is fresh
    # 4.5 standard errors; each churned step of Euler's undoes a third of nu at first order, and the spread comes out
    # 0.05 too small (measured); Heun's error is far below the noise
    allowance = 0.07 if sampler is euler else 0.002
    assert abs(churned.mean() - MEAN) < 4.5 * STD / math.sqrt(rows) + allowance
    assert abs(churned.std() - STD) < 4.5 * STD / math.sqrt(2 * rows) + allowance


def test_churned_time_is_where_the_noise_is_and_never_above_the_path() -> None:
    path, seen = VE(20.0), []
    times = torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    euler(gaussian(path, calls=seen), path, starts(path), times, s_churn=math.inf, s_tmin=5.0)
    # the first is at the path's end already, the second grows by sqrt(2), the third (sigma = 4) lies below s_tmin
    assert seen == pytest.approx([1.0, 0.5 * math.sqrt(2), 0.2], abs=1e-12)


def test_without_churn_euler_is_ddim() -> None:
    for path in PATHS:
        times = time_grid(path, 7, spacing="trailing" if isinstance(path, DiscreteVP) else "uniform")
        assert torch.equal(
            euler(gaussian(path), path, starts(path), times), ddim(gaussian(path), path, starts(path), times)
        )


# --- adaptive -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_rk45_keeps_its_tolerance(path: Path, end: float, tolerance: float) -> None:
    x, times, seen = starts(path), torch.tensor([1.0, 0.37, end], dtype=torch.float64), []
    found = rk45(gaussian(path, calls=seen), path, x, times, rtol=tolerance, atol=tolerance)
    exact = flow_of_gaussian(path, x, times[0], times[-1])
    # the tolerance is that of a step; some steps add up, and y = x / hypot(alpha, sigma) is what it is held for
    scale = math.hypot(path.alpha(times[-1]).item(), path.sigma(times[-1]).item())
    assert (found - exact).abs().max() < 30 * tolerance * scale
    assert len(seen) < 120 and min(seen) >= min(end, 1e-7) and max(seen) <= 1
    # between the nodes of a chain the right side has kinks, which cost rejected steps


def test_rk45_reports_its_end_and_keeps_float32() -> None:
    path, events = CosineVP(), []

    def change(i: int, t: Tensor, x: Tensor, d: Denoised) -> Tensor:
        events.append((i, t.item(), d.x0.shape))
        return x + 7

    x = starts(path).float()
    plain = rk45(gaussian(path), path, x, time_grid(path, 4))
    changed = rk45(gaussian(path), path, x, time_grid(path, 4), callback=change)
    assert events == [(0, 1.0, x.shape)] and torch.equal(changed, plain + 7) and plain.dtype == torch.float32


# --- inversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RectifiedFlow(), CosineVP(), LinearVP(), DiscreteVP()], ids=repr)
def test_inversion_is_exact_with_enough_iterations(path: Path) -> None:
    times = time_grid(path, 25, spacing="trailing" if isinstance(path, DiscreteVP) else "uniform")
    x = starts(path)
    down = ddim(gaussian(path), path, x, times)
    once, often = (ddim_inversion(gaussian(path), path, down, times, iterations=k) for k in (1, 60))
    assert (often - x).abs().max() < 1e-12 < 1e-2 < (once - x).abs().max()
    assert (ddim(gaussian(path), path, often, times) - down).abs().max() < 1e-12


def test_inversion_of_a_network_that_is_no_exact_denoiser() -> None:
    weight = 0.4 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def net(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return torch.tanh(torch.einsum("ij,bjhw->bihw", weight, x)) + torch.cos(time / 300).view(-1, 1, 1, 1)

    d = Denoiser(net, RectifiedFlow(), Flow())
    x, none = torch.randn(2, 4, 3, 3, dtype=torch.float64), Cond(torch.zeros(1, 1, 1))
    times = time_grid(RectifiedFlow(), 20)
    down = ddim(lambda x, t: d(x, t, none), RectifiedFlow(), x, times)
    up = ddim_inversion(lambda x, t: d(x, t, none), RectifiedFlow(), down, times, iterations=40)
    assert (up - x).abs().max() < 1e-12 and (down - x).abs().max() > 0.1


@pytest.mark.parametrize("n", [10, 25, 50])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_iteration_is_the_stock_inverse(n: int, kind: str) -> None:
    stock = DDIMInverseScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1,
        clip_sample=False, prediction_type=kind,
    )  # fmt: skip
    stock.set_timesteps(n)
    weight = 0.4 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def net(x: Tensor, time: Tensor, cond: Cond | None = None) -> Tensor:
        return torch.tanh(torch.einsum("ij,bjhw->bihw", weight, x)) + torch.cos(time.view(-1, 1, 1, 1) / 20) * x / 2

    x = expected = torch.randn(2, 4, 3, 3)
    for t in stock.timesteps:
        expected = stock.step(net(expected, t.float().expand(2)), t, expected).prev_sample
    chain, none = DiscreteVP(), Cond(torch.zeros(1, 1, 1))
    d = Denoiser(net, chain, PREDICTIONS[kind](), TimeInput(1000, offset=-1))
    ours = ddim_inversion(lambda x, t: d(x, t, none), chain, x, time_grid(chain, n, spacing="leading", offset=1))
    off = (ours - expected).abs().max() / expected.abs().max()
    if kind == "epsilon":
        assert off < 2e-5
    else:  # stock asks at the upper time, but reads v with the lower one's alpha and sigma; ours is consistent
        assert off > 0.01


# --- DDPM's variances -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_ddpm_draws_from_the_posterior(path: Path) -> None:
    t, s = (torch.tensor(u, dtype=torch.float64) for u in (0.7, 0.4))
    x = starts(path)
    d, post = gaussian(path)(x, t), posterior(path, s, t)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frac = torch.linspace(0, 1, len(x), dtype=torch.float64)
    small, large = post.var, transition(path, s, t).var

    def step(variance: str) -> Tensor:
        told = lambda x, t: gaussian(path)(x, t)._replace(var_frac=frac)  # noqa: E731
        return ddpm(told, path, x, torch.stack([t, s]), variance=variance, generator=torch.Generator().manual_seed(1))

    mean = post.of_x0 * d.x0 + post.of_xt * x
    torch.testing.assert_close(step("fixed_small"), mean + small.sqrt() * z)
    torch.testing.assert_close(step("fixed_large"), mean + large.sqrt() * z)
    torch.testing.assert_close(step("learned"), mean + large ** (frac / 2) * small ** ((1 - frac) / 2) * z)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p, x, t: ddpm(gaussian(p), p, x, t, variance="large"), "'large' is not one of fixed_small"),
        (lambda p, x, t: ddpm(gaussian(p), p, x, t, variance="learned"), "learned_variance=True"),
        (lambda p, x, t: heun(gaussian(p), p, x, t, s_churn=-1.0), "s_churn is -1"),
        (lambda p, x, t: ddim_inversion(gaussian(p), p, x, t, iterations=0), "iterations is 0"),
        (lambda p, x, t: ddim_inversion(gaussian(p), p, x, t.flip(0)), "must fall"),
    ],
)
def test_bad_input_is_named(call, says: str) -> None:
    path = LinearVP()
    with pytest.raises(ValueError, match=says):
        call(path, starts(path), time_grid(path, 4))
