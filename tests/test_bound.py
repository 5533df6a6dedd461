"""The variational bound, term by term, and the hybrid loss that learns variances with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.cond import Cond
from ldm.denoiser import Denoised
from ldm.likelihood import discretized_log_prob, prior_bound, step_bound, variance_range, variational_bound
from ldm.paths import NCSN, VE, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow, SigmoidVP
from ldm.process import posterior, transition

LOG2 = math.log(2)
NONE = Cond(torch.zeros(1, 1, 1))
CHAIN, ZERO = DiscreteVP(), DiscreteVP(zero_terminal_snr=True)
PATHS: list[Path] = [RectifiedFlow(), CosineVP(), LinearVP(), SigmoidVP(), VE(), NCSN(), CHAIN, ZERO]
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def some(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Denoised]:
    """x0 and eps, and what a denoiser might say that is not far off."""
    g = torch.Generator().manual_seed(seed)
    x0, eps, off = torch.randn(3, rows, 2, 3, 3, generator=g, dtype=torch.float64)
    return x0, eps, Denoised(x0 + off / 5, eps, eps, torch.rand(x0.shape, generator=g, dtype=torch.float64))


# --- the terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@every_path
def test_terms_are_the_divergence_of_two_gaussians(path: Path, variance: str) -> None:
    s, t = times(0.001, 0.2, 0.5, 0.9, 0.999), times(0.002, 0.3, 0.9, 1.0, 1.0)
    x0, eps, told = some(5)
    x_t = path.mix(x0, eps, t)
    of_x0, of_xt, small = (v.view(5, 1, 1, 1) for v in posterior(path, s, t))
    large = transition(path, s, t).var.view(5, 1, 1, 1)
    assert told.var_frac is not None
    var = {
        "fixed_small": small,
        "fixed_large": large,
        "learned": torch.exp(told.var_frac * large.log() + (1 - told.var_frac) * small.log()),
    }[variance].expand_as(x0)
    true, guess = of_x0 * x0 + of_xt * x_t, of_x0 * told.x0 + of_xt * x_t
    expected = kl_divergence(Normal(true, small.sqrt()), Normal(guess, var.sqrt())).flatten(1).mean(1) / LOG2
    ours = step_bound(path, x0, x_t, told, s, t, variance=variance)
    # the truth's means are near x_t, and their small difference loses digits that ours keeps
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    for i in range(5):  # a scalar is a row
        row = step_bound(
            path,
            x0[i : i + 1],
            x_t[i : i + 1],
            Denoised(*(v[i : i + 1] for v in told)),
            s[i],
            t[i],
            variance=variance,
        )
        torch.testing.assert_close(row, ours[i : i + 1], rtol=1e-12, atol=0)


@every_path
def test_learned_variance_has_the_fixed_ones_at_its_ends(path: Path) -> None:
    s, t = times(0.0, 0.001, 0.4), times(0.001, 0.1, 1.0)
    x0, eps, told = some(3)
    x_t = path.mix(x0, eps, t)
    for fraction, name in ((0.0, "fixed_small"), (1.0, "fixed_large")):
        learned = told._replace(var_frac=torch.full_like(x0, fraction))
        for bins in (None, 256):
            a = step_bound(path, x0, x_t, learned, s, t, variance="learned", bins=bins)
            b = step_bound(path, x0, x_t, told, s, t, variance=name, bins=bins)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_last_step_is_the_decoder() -> None:
    """Rows with s = 0 among others: a Gaussian density with beta, or with beta tilde of the step before."""
    s, t = times(0.0, 0.001, 0.0), times(0.001, 0.002, 0.4)
    x0, eps, told = some(3)
    for path in PATHS:
        x_t = path.mix(x0, eps, t)
        large = step_bound(path, x0, x_t, told, s, t)
        small = step_bound(path, x0, x_t, told, s, t, variance="fixed_small")
        for i in (0, 2):
            sigma = path.sigma(t[i])
            truth = -Normal(told.x0[i], sigma).log_prob(x0[i]).mean() / LOG2
            torch.testing.assert_close(large[i], truth)
            clipped = posterior(path, t[i], 2 * t[i]).var.sqrt()
            torch.testing.assert_close(small[i], -Normal(told.x0[i], clipped).log_prob(x0[i]).mean() / LOG2)
        torch.testing.assert_close(
            large[1:2], step_bound(path, x0[1:2], x_t[1:2], Denoised(*(v[1:2] for v in told)), s[1], t[1])
        )
    log_small, log_ratio = variance_range(CHAIN, times(0.0, 0.001), times(0.001, 0.002))
    assert log_small[0] == log_small[1] and log_ratio[0] > 0  # Nichol & Dhariwal's clipping
    torch.testing.assert_close(variance_range(VE(), times(0.0), times(1.0))[1], times(0.0))  # no step before: beta


def test_discretized_gaussian_sums_to_one_and_is_the_mass_between_borders() -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    mean = times(-2.0, -1.0, -0.4001, 0.0, 0.77, 1.0, 3.0)
    for log_var in (-12.0, -6.0, 0.0, 4.0):
        log_p = discretized_log_prob(levels, mean, times(log_var))
        torch.testing.assert_close(log_p.exp().sum(0), torch.ones(7).double(), rtol=0, atol=1e-12)
        law = Normal(mean, math.exp(log_var / 2))
        high, low = levels + 1 / 255, levels - 1 / 255
        mass = torch.where(levels == 1, 1.0, law.cdf(high)) - torch.where(levels == -1, 0.0, law.cdf(low))
        torch.testing.assert_close(log_p.exp(), mass, rtol=0, atol=1e-14)
    # far out, where a difference of two cdfs would be 0 - 0: the density's integral by the trapezoidal rule
    fine = levels[100] + torch.linspace(-1, 1, 100_001, dtype=torch.float64) / 255
    truth = Normal(times(0.9), math.exp(-3.5)).log_prob(fine).logsumexp(0) + math.log(2 / 255 / 100_000)
    assert truth < -600
    torch.testing.assert_close(discretized_log_prob(levels[100], times(0.9), times(-7.0))[0], truth, rtol=0, atol=1e-3)


def test_discretized_gaussian_has_finite_gradients() -> None:
    x = torch.linspace(-1, 1, 256)[:, None]
    mean = torch.linspace(-3, 3, 31).requires_grad_()
    log_var = torch.full((31,), -9.0).requires_grad_()
    log_p = discretized_log_prob(x, mean, log_var)
    log_p.sum().backward()
    assert log_p.isfinite().all() and mean.grad.isfinite().all() and log_var.grad.isfinite().all()


@every_path
def test_prior_is_a_divergence_too(path: Path) -> None:
    x0, *_ = some(4)
    for t in (1.0, 0.9):
        a, s = path.alpha(times(t)), path.sigma(times(t))
        truth = kl_divergence(Normal(a * x0, s), Normal(0.0, torch.hypot(a, s))).flatten(1).mean(1) / LOG2
        torch.testing.assert_close(prior_bound(path, x0, t), truth, rtol=1e-7, atol=1e-12)
    if path.alpha(times(1.0)) == 0:
        assert torch.equal(prior_bound(path, x0), torch.zeros(4, dtype=torch.float64))


# --- the whole bound, for Gaussian data ------------------------------------------------------------------------------


def gaussian(path: Path, mean: float, std: float) -> Callable[[Tensor, Tensor], Denoised]:
    def denoise(x: Tensor, t: Tensor) -> Denoised:
        c = path.coeffs(t, x.ndim)
        residual = (x - c.alpha * mean) / (c.alpha**2 * std**2 + c.sigma**2)
        return Denoised(mean + c.alpha * std**2 * residual, c.sigma * residual, x)

    return denoise


def expected_bound(path: Path, grid: Tensor, mean: float, std: float, variance: str = "fixed_large") -> float:
    """In nats, over x0 ~ N(mean, std^2) and eps ~ N(0, 1). Each term is a quadratic form of the two, which
    Gauss-Hermite quadrature at 3 x 3 points integrates exactly."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(3))
    weights = weights / weights.sum()
    z0, z1 = (v.flatten() for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight, n = torch.outer(weights, weights).flatten(), len(grid) - 1
    x0, eps = (mean + std * z0).repeat(n)[:, None], z1.repeat(n)[:, None]
    t, s = grid[:-1].repeat_interleave(9), grid[1:].repeat_interleave(9)
    x_t = path.mix(x0, eps, t)
    terms = step_bound(path, x0, x_t, gaussian(path, mean, std)(x_t, t), s, t, variance=variance)
    prior = prior_bound(path, x0[:9], grid[0].item())
    return LOG2 * (weight @ (terms.view(n, 9).sum(0) + prior)).item()


def entropy(std: float) -> float:
    return math.log(2 * math.pi * math.e * std**2) / 2


@pytest.mark.parametrize("path", [CosineVP(), ZERO], ids=repr)
def test_bound_is_tight_for_unit_variance(path: Path) -> None:
    """For data N(0, 1) beta is the true variance of every step back (Ho et al. 2020, section 3.2), so that no step is
    too long: the bound is the entropy."""
    for grid in (times(1, 0), times(1, 0.9, 0.31, 0), torch.linspace(1, 0, 51, dtype=torch.float64)):
        assert abs(expected_bound(path, grid, 0.0, 1.0) - entropy(1.0)) < 1e-12 * len(grid)


@pytest.mark.parametrize("path", [RectifiedFlow(), CosineVP(), SigmoidVP(), ZERO], ids=repr)
def test_bound_falls_to_the_truth_as_steps_shorten(path: Path) -> None:
    mean, std, gaps = 1.3, 0.5, []
    for n in (50, 100, 200, 400, 800):
        inner = path.time_at(torch.linspace(-18, 18, n - 1, dtype=torch.float64))  # equal steps of log SNR
        gaps.append(expected_bound(path, torch.cat([times(1), inner, times(0)]), mean, std) - entropy(std))
    assert all(gap > 0 for gap in gaps), gaps
    # of first order: each step's gap is h^2, and there are 1 / h
    ratios = [a / b for a, b in pairwise(gaps)]
    assert all(1.8 < ratio < 2.2 for ratio in ratios), ratios
    assert abs(ratios[-1] - 2) < 0.05 and gaps[-1] < 0.01, (ratios, gaps)


def test_variational_bound_adds_up_what_is_expected() -> None:
    path, mean, std, grid = CHAIN, 0.3, 0.5, torch.arange(40, -1, -1, dtype=torch.float64) / 40
    g = torch.Generator().manual_seed(0)
    x0 = mean + std * torch.randn(3000, 1, generator=g, dtype=torch.float64)
    for variance in ("fixed_small", "fixed_large"):
        found = variational_bound(gaussian(path, mean, std), path, x0, grid, variance=variance, generator=g)
        assert found.terms.shape == (3000, 40) and found.total.shape == found.prior.shape == (3000,)
        torch.testing.assert_close(found.total, found.prior + found.terms.sum(1))
        nats = LOG2 * found.total
        error = nats.std().item() / math.sqrt(3000)
        assert abs(nats.mean().item() - expected_bound(path, grid, mean, std, variance)) < 4 * error
        # every row's last term is L_0, which has another scale and may be negative
        x_t = x0 * path.alpha(grid[-2])
        assert (found.terms[:, :-1] >= 0).all() and found.terms[:, -1].min() < 0 < x_t.abs().max()


def test_bound_of_pixels_is_a_code_length() -> None:
    """Uniform pixels and a denoiser that knows nothing but their mean: more than the 8 bits that they have, and less
    than what a Gaussian of unit variance takes; one that knows the picture pays for the last step's width alone."""
    g = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, 256, (4, 3, 8, 8), generator=g).double() / 127.5 - 1
    grid = torch.linspace(1, 0, 101, dtype=torch.float64)
    blind = gaussian(CHAIN, 0.0, math.sqrt(1 / 3))
    total = variational_bound(blind, CHAIN, x0, grid, bins=256, generator=g).total
    assert ((total > 8) & (total < 9)).all(), total
    known = variational_bound(
        lambda x, t: Denoised(x0, x, x), CHAIN, x0, grid, bins=256, variance="fixed_small", generator=g
    )
    assert (known.terms[:, :-1] == 0).all() and (known.total < 5).all()
    whole = variational_bound(blind, CHAIN, x0.float(), grid, bins=256, generator=g).total
    assert whole.dtype == torch.float32


def test_rows_have_their_own_noise() -> None:
    x0, path = some(4)[0], CosineVP()

    def run(rows: slice) -> Tensor:
        g = [torch.Generator().manual_seed(i) for i in range(4)][rows]
        return variational_bound(gaussian(path, 0.0, 0.5), path, x0[rows], times(1, 0.5, 0), generator=g).total

    assert torch.equal(run(slice(0, 4))[1:3], run(slice(1, 3)))


ONE = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda d: variational_bound(d, CHAIN, ONE, times(1, 0.5)), "end at 0.5"),
        (lambda d: variational_bound(d, CHAIN, ONE, times(0.5, 1, 0)), "must fall"),
        (lambda d: variational_bound(d, CHAIN, ONE, times(1, 0), variance="small"), "'small' is not one of"),
        (lambda d: variational_bound(d, CHAIN, ONE, times(1, 0), variance="learned"), "learned_variance=True"),
        (lambda d: variational_bound(d, CHAIN, ONE + 2, times(1, 0), bins=256), r"\[-1, 1\]"),
        (lambda d: variational_bound(d, CHAIN, ONE, times(1, 0), bins=1), "bins is 1"),
        (lambda d: step_bound(CHAIN, ONE, ONE, d(ONE, times(1)), times(0.5), times(0.5)), "0 <= s < t <= 1"),
        (lambda d: step_bound(CHAIN, ONE, ONE, d(ONE, times(1)), times(0, 0), times(1)), "t has shape"),
        (lambda d: step_bound(CHAIN, ONE, ONE[:, :1], d(ONE, times(1)), times(0), times(1)), "x_t has shape"),
    ],
)
def test_bad_input_is_named(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(lambda x, t: Denoised(x, x, x))
