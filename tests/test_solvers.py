"""The solvers of ``sampling.exponential`` and ``sampling.multistep``: what they reduce to, what they integrate without
error, and how fast they converge."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from ldm.denoiser import Denoised
from ldm.paths import VE, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow
from ldm.sampling import SAMPLERS, time_grid
from ldm.sampling.exponential import (
    dpmpp,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    dpmpp_2s_sde,
    dpmpp_3m,
    dpmpp_3m_sde,
    moment,
    quadrature,
    unipc,
)
from ldm.sampling.multistep import lms, pndm
from tests import gmm

MEAN, STD = 1.5, 0.3
X = torch.linspace(-3, 3, 13, dtype=torch.float64)
ODE: dict[str, Callable[..., Tensor]] = {
    **{f"dpmpp {k}": partial(dpmpp, order=k) for k in (1, 2, 3)},
    "dpmpp 2 exact": partial(dpmpp, order=2, midpoint=False),
    "dpmpp_2s": dpmpp_2s,
    **{f"unipc {k}": partial(unipc, order=k) for k in (1, 2, 3)},
    **{f"lms {k}": partial(lms, order=k) for k in (1, 2, 3, 4)},
    "pndm": pndm,
    "pndm prk": partial(pndm, prk=True),
}
SDE: dict[str, Callable[..., Tensor]] = {
    "2m_sde": dpmpp_2m_sde, "3m_sde": dpmpp_3m_sde, "2s_sde": dpmpp_2s_sde,
    "2m_sde half": partial(dpmpp_2m_sde, eta=0.5), "2s_sde half": partial(dpmpp_2s_sde, eta=0.5),
}  # fmt: skip
ALL = {**ODE, **SDE}
BY_NAME = pytest.mark.parametrize("name", ALL)
gaussian = partial(gmm.gaussian, mean=MEAN, std=STD)
flow_of_gaussian = partial(gmm.flow_of_gaussian, mean=MEAN, std=STD)


def graded(path: Path, n: int) -> Tensor:
    """n steps from t = 0.8 to 0.3 whose lambda grows with the square of their number: the first, which every
    method makes at first order, is of length 1 / n^2, so that its error is of order 4."""
    first, last = path.log_snr(torch.tensor([0.8, 0.3], dtype=torch.float64)).tolist()
    return path.time_at(first + (last - first) * torch.linspace(0, 1, n + 1, dtype=torch.float64) ** 2)


def even(path: Path, n: int) -> Tensor:
    return torch.linspace(0.9, 0.2, n + 1, dtype=torch.float64)


# --- orders of convergence -------------------------------------------------------------------------------------------

ORDERS: dict[str, tuple[Callable[..., Tensor], float]] = {
    # Lu et al. 2022b: order k
    "dpmpp 1": (partial(dpmpp, order=1), 1),
    "2m": (dpmpp_2m, 2),
    "2m exact": (partial(dpmpp_2m, midpoint=False), 2),
    "3m": (dpmpp_3m, 3),
    "2s": (dpmpp_2s, 2),
    # with half of the second difference, as in the authors' code, k-diffusion and diffusers
    "3m halved": (partial(dpmpp_3m, curvature=0.5), 2),
    # Zhao et al. 2023, theorem 3.1 and corollary 3.2: p + 1. (UniP-p, of order p, is dpmpp: test_reductions)
    **{f"unipc {p}": (partial(unipc, order=p, lower_order_final=False), p + 1) for p in (1, 2, 3)},
    **{f"lms {k}": (partial(lms, order=k), k) for k in (2, 3, 4)},
}


def orders(sampler: Callable[..., Tensor], path: Path, grid: Callable[[Path, int], Tensor]) -> list[float]:
    """log2 of what each of four halvings of the steps divides the error by."""
    errors = []
    for n in (100, 200, 400, 800, 1600):
        times = grid(path, n)
        end = sampler(gaussian(path), path, X, times)
        errors.append((end - flow_of_gaussian(path, X, times[0], times[-1])).abs().max().item())
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize("path", [RectifiedFlow(), LinearVP(), CosineVP()], ids=repr)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str, path: Path) -> None:
    sampler, order = ORDERS[name]
    found = orders(sampler, path, graded)
    assert all(abs(x - order) < 0.25 for x in found), found


@pytest.mark.parametrize("path", [RectifiedFlow(), LinearVP(), CosineVP()], ids=repr)
@pytest.mark.parametrize("prk", [False, True])
def test_pndm_is_of_second_order(path: Path, prk: bool) -> None:
    """As Liu et al. 2022 prove of it, on steps equal in t."""
    found = orders(partial(pndm, prk=prk), path, even)
    assert all(abs(x - 2) < 0.25 for x in found), found


def test_pndm_has_the_order_of_its_rule_where_equal_times_are_equal_noise() -> None:
    """sigma / alpha = 2 t: after Runge-Kutta steps it is Adams-Bashforth of order 4."""
    found = orders(partial(pndm, prk=True), VE(2.0), even)
    assert all(abs(x - 4) < 0.25 for x in found), found


# --- what is exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e-9, 1e-3, 0.3, 0.999, 1.0, 1.001, 5.0, 40.0])
def test_moments(rate: float) -> None:
    nodes, weights = numpy.polynomial.legendre.leggauss(60)
    u, w = (nodes + 1) / 2, weights / 2
    for j in range(5):
        assert math.isclose(moment(j, rate), (w * rate * numpy.exp(-rate * (1 - u)) * u**j).sum(), rel_tol=1e-12)
    assert moment(0, math.inf) == moment(2, math.inf) == 1


def test_quadrature() -> None:
    assert quadrature([], []) == []
    adams = quadrature([-1.0, -2.0, -3.0], [1 / 2, 1 / 3, 1 / 4])  # of Adams and Bashforth, order 4
    torch.testing.assert_close(torch.tensor(adams), torch.tensor([-59 / 24, 37 / 24, -9 / 24]))


def polynomial(path: Path, times: Tensor, degree: int) -> tuple[Any, Tensor]:
    """A denoiser whose x0 is 1 + lambda + … + lambda^degree, whatever x is, and the exact x at the times: x / sigma
    grows from t to s by the integral of x0 exp(lambda), and that of lambda^j exp(lambda) is exp(lambda) sum_k (-1)^k
    j! / (j - k)! lambda^(j - k)."""
    lam = path.log_snr(times) / 2
    integral = torch.zeros_like(lam)
    for j in range(degree + 1):
        terms = [(-1) ** k * math.factorial(j) / math.factorial(j - k) * lam ** (j - k) for k in range(j + 1)]
        integral += lam.exp() * torch.stack(terms).sum(0)

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        x0 = torch.stack([(path.log_snr(t) / 2) ** j for j in range(degree + 1)]).sum().expand(x.shape)
        return Denoised(x0, (x - path.alpha(t) * x0) / path.sigma(t), x)

    return denoise, path.sigma(times) * (0.7 + integral - integral[0])


def error(sampler: Callable[..., Tensor], path: Path, times: Tensor, denoise: Any, truth: Tensor, skip: int) -> float:
    """The largest error of a state, those after the first ``skip`` steps, of lower order, being put right."""
    off: list[float] = []

    def watch(i: int, t: Tensor, x: Tensor, denoised: Denoised) -> Tensor:
        x = truth[i + 1].expand(x.shape) if i < skip else x
        off.append((x - truth[i + 1]).abs().max().item())
        return x

    sampler(denoise, path, truth[0].expand(2), times, callback=watch)
    return max(off)


@pytest.mark.parametrize("path", [RectifiedFlow(), CosineVP()], ids=repr)
@pytest.mark.parametrize(
    ("sampler", "degree"),
    [
        (partial(dpmpp, order=1), 0),
        (partial(dpmpp, order=2, midpoint=False), 1),
        (partial(dpmpp, order=3), 2),
        (partial(unipc, order=3, corrector=False, lower_order_final=False), 2),
    ],
)
def test_x0_that_is_a_polynomial_in_lambda(sampler: Callable[..., Tensor], degree: int, path: Path) -> None:
    times = even(path, 20) ** 1.3
    assert error(sampler, path, times, *polynomial(path, times, degree), skip=degree) < 1e-12
    assert error(sampler, path, times, *polynomial(path, times, degree + 1), skip=degree) > 1e-3  # one more is too much


@pytest.mark.parametrize("order", [2, 3])
def test_corrector_is_exact_for_one_degree_more(order: int) -> None:
    """What is off at a corrected x, from the start of lower order, only decays from there: as sigma does. A corrected x
    is seen after one more step, of no length to speak of."""
    path = CosineVP()
    times = even(path, 20) ** 1.3

    def off(degree: int, k: int, **options: Any) -> float:
        denoise, truth = polynomial(path, times, degree)
        walk = torch.cat([times[: k + 1], times[k : k + 1] - 1e-9])
        end = unipc(denoise, path, truth[:1], walk, order=order, lower_order_final=False, **options)
        return ((end - truth[k]) / path.sigma(times[k])).item()

    assert abs(off(order, 20) - off(order, 8)) < 1e-6 < abs(off(order, 8)) / 100
    assert abs(off(order + 1, 20) - off(order + 1, 8)) > 1e-5
    assert abs(off(order, 20, corrector=False) - off(order, 8, corrector=False)) > 1e-5


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_noise_that_is_a_polynomial_in_nu(order: int) -> None:
    """eps = 1 + nu + … + nu^(order - 1): x / alpha grows by its integral."""
    path = RectifiedFlow()
    times = even(path, 20) ** 1.3

    def run(degree: int) -> float:
        nu = path.sigma(times) / path.alpha(times)
        integral = torch.stack([nu ** (j + 1) / (j + 1) for j in range(degree + 1)]).sum(0)

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            nu = path.sigma(t) / path.alpha(t)
            eps = torch.stack([nu**j for j in range(degree + 1)]).sum().expand(x.shape)
            return Denoised((x - path.sigma(t) * eps) / path.alpha(t), eps, x)

        truth = path.alpha(times) * (0.7 + integral - integral[0])
        return error(partial(lms, order=order), path, times, denoise, truth, skip=order - 1)

    assert run(order - 1) < 1e-11 and run(order) > 1e-4


@BY_NAME
def test_a_network_that_knows_the_answer(name: str) -> None:
    point = torch.randn(2, 3, dtype=torch.float64)
    for path in (RectifiedFlow(), LinearVP(), DiscreteVP(zero_terminal_snr=True)):
        for n in (1, 2, 3, 5, 20):

            def denoise(x: Tensor, t: Tensor) -> Denoised:
                return Denoised(point, (x - path.alpha(t) * point) / path.sigma(t), x)  # noqa: B023

            times = time_grid(path, n, spacing="trailing" if isinstance(path, DiscreteVP) else "uniform")
            end = ALL[name](denoise, path, torch.randn(2, 3, dtype=torch.float64), times)
            torch.testing.assert_close(end, point, rtol=0, atol=1e-10)


# --- what they reduce to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RectifiedFlow(), LinearVP(), DiscreteVP(zero_terminal_snr=True)], ids=repr)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ODE["dpmpp 1"], SAMPLERS["ddim"]),
        (partial(dpmpp, order=1, eta=1.0), SAMPLERS["ddpm"]),
        (ODE["lms 1"], SAMPLERS["ddim"]),
        (partial(unipc, order=1, corrector=False), SAMPLERS["ddim"]),
        (dpmpp_2m, ODE["dpmpp 2"]),
        (dpmpp_3m, ODE["dpmpp 3"]),
        (partial(dpmpp_2m_sde, eta=0.0), dpmpp_2m),
        (partial(dpmpp_3m_sde, eta=0.0), dpmpp_3m),
        (partial(dpmpp_2s_sde, eta=0.0), dpmpp_2s),
        (partial(unipc, order=2, corrector=False, lower_order_final=False), dpmpp_2m),
        (partial(unipc, order=3, corrector=False, lower_order_final=False), dpmpp_3m),
    ],
)
def test_reductions(one: Callable[..., Tensor], other: Callable[..., Tensor], path: Path) -> None:
    for end in (0.0, 0.1):
        times = torch.linspace(1, end, 21, dtype=torch.float64)
        ends = [f(gaussian(path), path, X, times, generator=torch.Generator().manual_seed(0)) for f in (one, other)]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize("path", [RectifiedFlow(), CosineVP(), DiscreteVP(zero_terminal_snr=True)], ids=repr)
def test_from_no_signal_the_first_step_is_ddims_and_is_forgotten(name: str, path: Path) -> None:
    """So a run from alpha = 0 is DDIM's step, and then a run of its own, but for the rule of fewer than 15 steps."""
    times = torch.linspace(1, 0.1, 31, dtype=torch.float64)
    whole = ODE[name](gaussian(path), path, X, times)
    first = SAMPLERS["ddim"](gaussian(path), path, X, times[:2])
    assert torch.equal(whole, ODE[name](gaussian(path), path, first, times[1:])) and whole.isfinite().all()


def test_number_of_calls() -> None:
    path, counted = LinearVP(), {"dpmpp 3": 20, "unipc 3": 20, "lms 4": 20, "pndm": 21, "pndm prk": 29, "dpmpp_2s": 39}
    for name, calls in counted.items():
        asked: list[float] = []

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            asked.append(t.item())  # noqa: B023
            return gaussian(path)(x, t)

        ODE[name](denoise, path, X, time_grid(path, 20))
        assert len(asked) == calls and min(asked) > 0, name


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RectifiedFlow(), LinearVP()], ids=repr)
@pytest.mark.parametrize("name", SDE)
def test_mean_and_variance(name: str, path: Path) -> None:
    g, rows = torch.Generator().manual_seed(0), 20_000
    times = time_grid(path, 100)
    alpha, sigma = path.alpha(times[0]), path.sigma(times[0])
    x = alpha * MEAN + torch.sqrt((alpha * STD) ** 2 + sigma**2) * torch.randn(rows, generator=g, dtype=torch.float64)
    end = SDE[name](gaussian(path), path, x, times, generator=g)
    # 4 standard errors: STD / sqrt(rows) of the mean, STD / sqrt(2 rows) of the spread; and 0.002 for 100 steps
    assert abs(end.mean().item() - MEAN) < 4 * STD / math.sqrt(rows) + 0.002
    assert abs(end.std().item() - STD) < 4 * STD / math.sqrt(2 * rows) + 0.002


@pytest.mark.parametrize("name", SDE)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    path, x = RectifiedFlow(), torch.randn(2, 3, dtype=torch.float64)
    seeds = [torch.Generator().manual_seed(s) for s in (5, 6)]
    together = SDE[name](gaussian(path), path, x, time_grid(path, 6), generator=seeds)
    alone = SDE[name](gaussian(path), path, x[1:], time_grid(path, 6), generator=torch.Generator().manual_seed(6))
    assert torch.equal(alone, together[1:]) and not torch.equal(together[:1], together[1:])


# --- the common form -------------------------------------------------------------------------------------------------


@BY_NAME
def test_dtype_input_and_device(name: str) -> None:
    path, times = RectifiedFlow(), time_grid(RectifiedFlow(), 6)
    for dtype, out in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        x, before = X.to(dtype), X.to(dtype).clone()
        end = ALL[name](gaussian(path), path, x, times)
        assert end.dtype == out and torch.equal(x, before) and end.shape == x.shape
    assert ALL[name](gaussian(path), path, X.to("meta"), times).is_meta  # nothing is read back from the device


@pytest.mark.parametrize(
    ("sampler", "options", "says"),
    [
        (dpmpp, {"order": 4}, "order is 4; expected 1, 2 or 3"),
        (dpmpp, {"eta": 1.5}, r"eta is 1\.5; expected a number in \[0, 1\]"),
        (dpmpp_2m_sde, {"eta": float("nan")}, "eta is nan"),
        (dpmpp_2s, {"eta": -0.1}, r"eta is -0\.1"),
        (unipc, {"order": 0}, "order is 0; expected 1, 2 or 3"),
        (lms, {"order": 5}, "order is 5; expected 1, 2, 3 or 4"),
        (pndm, {"times": torch.tensor([0.0, 1.0])}, "must fall"),
    ],
)
def test_bad_input_is_named(sampler: Callable[..., Tensor], options: dict[str, Any], says: str) -> None:
    options = {"times": torch.linspace(1, 0, 5), **options}
    with pytest.raises(ValueError, match=says):
        sampler(gaussian(RectifiedFlow()), RectifiedFlow(), X, **options)
