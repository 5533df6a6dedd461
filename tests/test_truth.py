"""Every sampler of ``SAMPLERS`` on a law whose best denoiser is known: three Gaussians in the plane (``tests/gmm.py``).

What is compared: the weights, means and covariances of the modes, and the mean and covariance of all. Each is the mean
over the rows of a function whose mean under the law is known exactly (a row belongs to mode k in part, with its
responsibility), so that its standard error comes from the same rows. A sampler may be off by 4.5 standard errors (one
in 10^5 for each of 28 numbers) and by what its step size costs, which the table states. Those without noise are also
compared with the accurate flow, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoised, Denoiser
from ldm.paths import VE, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow
from ldm.prediction import PREDICTIONS
from ldm.process import diffusion, velocity
from ldm.sampling import SAMPLERS, euler_maruyama, langevin
from tests.gmm import Mixture, three_modes

LAW = three_modes()
PATHS: dict[str, Path] = {
    "flow": RectifiedFlow(), "cosine": CosineVP(), "linear": LinearVP(), "ve": VE(20.0), "chain": DiscreteVP()
}  # fmt: skip
BY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
BY_NAME = pytest.mark.parametrize("name", SAMPLERS)


@dataclass(frozen=True)
class Case:
    """How a sampler is run, and what its steps may cost beside the standard errors: 0 where that is hidden under them,
    else about twice what was measured."""

    weights: float  # of the modes, relative
    means: float  # of the modes and of all, in units of their standard deviation
    covs: float  # the same, relative to their variance
    rows: float | None = None  # mean distance from the accurate flow; None: the sampler draws noise
    steps: int = 60
    samples: int = 2000
    grid: Callable[[Path, int], Tensor] = field(default=lambda path, n: graded(path, n))
    paths: tuple[str, ...] = tuple(PATHS)
    options: dict[str, Any] = field(default_factory=dict)


FIRST = Case(0.0, 0.0, 0.0, rows=0.04)  # of order 1 in the step
SECOND = Case(0.0, 0.0, 0.0, rows=0.008)
NOISY = Case(0.0, 0.0, 0.0, steps=80, samples=6000)
DDPM = replace(NOISY, covs=0.04, steps=160)  # of first order: its modes are too narrow
TABLE = {
    "ddim": FIRST, "euler": FIRST, "heun": SECOND, "flow_heun": SECOND, "midpoint": SECOND,
    "dpmpp_2m": SECOND, "dpmpp_2s": SECOND, "dpmpp_3m": SECOND, "unipc": SECOND, "lms": SECOND, "pndm": SECOND,
    "rk45": Case(0.0, 0.0, 0.0, rows=1e-4),
    "ddpm": DDPM, "euler_ancestral": replace(DDPM, paths=("ve",)),  # one function, and the path of its second name
    "dpmpp_2m_sde": NOISY, "dpmpp_2s_sde": NOISY, "dpmpp_3m_sde": NOISY, "predictor_corrector": NOISY,
    # the forward SDE's own g has no bound where alpha = 0: from the exact law one step below
    "euler_maruyama": replace(NOISY, grid=lambda path, n: graded(path, n, skip=True)),
    # a ladder of ten levels and an even chance to settle at each; what it does in x / alpha is the same on every path,
    # so that one with a moving alpha stands for all of them
    "annealed_langevin": Case(
        0.0, 0.0, 0.0, steps=10, samples=5000, grid=lambda path, n: ladder(path, n), paths=("flow", "ve"),
        options={"steps": 40, "step_size": 0.3 * 0.05**2},
    ),
}  # fmt: skip


def ladder(path: Path, n: int) -> Tensor:
    """n levels of sigma / alpha in equal ratios from 5 to 0.05, and then none."""
    nu = torch.linspace(math.log(5), math.log(0.05), n, dtype=torch.float64)
    return torch.cat([path.time_at(-2 * nu), torch.zeros(1, dtype=torch.float64)])


def graded(path: Path, n: int, low: float = 0.0, skip: bool = False) -> Tensor:
    """n equal steps of the angle atan(sigma / alpha) from t = 1 to the angle ``low``, on every path. ``skip``: without
    the first time where alpha is 0 there."""
    one = torch.ones((), dtype=torch.float64)
    angle = torch.linspace(math.atan2(path.sigma(one), path.alpha(one)), low, n + 1, dtype=torch.float64)
    times = path.time_at(2 * (angle.cos().log() - angle.sin().log()))
    times[0] = 1.0
    if low == 0:
        times[-1] = 0.0
    return times[1:] if skip and path.alpha(one) == 0 else times


def flow(path: Path, x: Tensor, t: Tensor, s: Tensor, n: int = 200) -> Tensor:
    """Where the probability-flow ODE takes x from t to s, by n steps of Runge and Kutta. In sigma / alpha all paths
    have one flow, up to the scale of x: it is followed along CosineVP, where nothing has a pole."""
    clock = CosineVP()
    denoise = LAW.denoise(clock)

    def u(x: Tensor, t: Tensor) -> Tensor:
        d = denoise(x, t)
        return velocity(d.x0, d.eps, clock.coeffs(t, x.ndim))

    begin, end = (torch.atan2(path.sigma(v), path.alpha(v)) * 2 / math.pi for v in (t, s))
    x, h = x / torch.hypot(path.alpha(t), path.sigma(t)), (end - begin) / n
    for i in range(n):
        at = begin + i * h
        a = u(x, at)
        b = u(x + h / 2 * a, at + h / 2)
        c = u(x + h / 2 * b, at + h / 2)
        x = x + h / 6 * (a + 2 * b + 2 * c + u(x + h * c, at + h))
    return x * torch.hypot(path.alpha(s), path.sigma(s))


def measured(law: Mixture, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How far the rows are from the law, and the standard errors: both for weights, means and covs."""
    share = law.responsibilities(x) / law.weights  # (B, K), of mean 1
    size = law.covs.diagonal(dim1=1, dim2=2).mean(1)  # (K,) variances of the modes
    off = x[:, None] - law.means
    spread = off[..., :, None] * off[..., None, :] - law.covs
    total, whole = law.cov.diagonal().mean(), x - law.mean
    terms = {
        "weights": share - 1,
        "means": torch.cat([(share / size.sqrt())[..., None] * off, (whole / total.sqrt())[:, None]], 1),
        "covs": torch.cat(
            [
                (share / size)[..., None, None] * spread,
                ((whole[:, :, None] * whole[:, None, :] - law.cov) / total)[:, None],
            ],
            1,
        ),
    }
    rows = math.sqrt(len(x))
    return {k: v.mean(0) for k, v in terms.items()}, {k: v.std(0) / rows for k, v in terms.items()}


def assert_law(law: Mixture, x: Tensor, case: Case) -> None:
    off, error = measured(law, x)
    for name in off:
        beyond = off[name].abs() - 4.5 * error[name] - getattr(case, name)
        assert (beyond <= 0).all(), f"{name}: off by {off[name].tolist()}, standard errors {error[name].tolist()}"


EXACT = Case(0.0, 0.0, 0.0)


@cache
def drawn(path: Path, t: float, rows: int) -> Tensor:
    """From the exact law at t."""
    return LAW.marginal(path, torch.tensor(t, dtype=torch.float64)).sample(rows, torch.Generator().manual_seed(0))


@cache
def flowed(path: Path, t: float, rows: int) -> Tensor:
    """The same rows at t = 0."""
    t_, zero = torch.tensor([t, 0.0], dtype=torch.float64)
    return flow(path, drawn(path, t, rows), t_, zero)


@BY_PATH
def test_the_accurate_flow_and_the_draws_have_the_law(path: Path) -> None:
    assert_law(LAW, flowed(path, 1.0, SECOND.samples), EXACT)
    assert_law(LAW.marginal(path, torch.tensor(0.3, dtype=torch.float64)), drawn(path, 0.3, 8000), EXACT)
    with pytest.raises(AssertionError):  # a difference of 3 % in the spread of all is told by 20 000 rows
        assert_law(LAW, 1.03 * LAW.sample(20_000), EXACT)


@BY_NAME
def test_every_sampler_finds_the_law(name: str) -> None:
    case = TABLE[name]  # a new sampler needs a row in the table
    for key in case.paths:
        path = PATHS[key]
        times = case.grid(path, case.steps)
        x = drawn(path, times[0].item(), case.samples)
        g = torch.Generator().manual_seed(1)
        end = SAMPLERS[name](LAW.denoise(path), path, x, times, generator=g, **case.options)
        assert_law(LAW, end, case)
        if case.rows is not None:
            distance = (end - flowed(path, times[0].item(), case.samples)).norm(dim=1).mean().item()
            assert distance <= case.rows, (key, distance)
            assert torch.equal(g.get_state(), torch.Generator().manual_seed(1).get_state())  # draws nothing


@pytest.mark.parametrize("path", [RectifiedFlow(), LinearVP(), VE(20.0)], ids=repr)
@pytest.mark.parametrize("kind", ["the forward SDE's", "none", "half", "1 + t"])
def test_the_reverse_sde_has_the_marginals_for_every_g(path: Path, kind: str) -> None:
    """On the way down as well as at the end, which is above t = 0."""

    def half(t: float) -> float:
        return math.sqrt(diffusion(path.coeffs(torch.tensor(t, dtype=torch.float64), 0)).item()) / 2

    g = {"the forward SDE's": None, "none": 0.0, "half": half, "1 + t": lambda t: 1 + t}[kind]
    times = graded(path, 120, low=0.2, skip=True)
    stops = {39: 0, 79: 1}
    reached: dict[int, Tensor] = {}

    def watch(i: int, t: Tensor, x: Tensor, d: Denoised) -> None:
        if i in stops:
            reached[i + 1] = x

    x = drawn(path, times[0].item(), 8000)
    generator = torch.Generator().manual_seed(1)
    reached[len(times) - 1] = euler_maruyama(
        LAW.denoise(path), path, x, times, g=g, generator=generator, callback=watch
    )
    assert len(reached) == 3
    for i, x in reached.items():
        assert_law(LAW.marginal(path, times[i]), x, Case(0.0, 0.0, 0.01))


@pytest.mark.parametrize("path", [RectifiedFlow(), VE(20.0)], ids=repr)
def test_langevin_finds_the_law_at_a_frozen_time(path: Path) -> None:
    t = path.time_at(torch.tensor(-2 * math.log(0.8), dtype=torch.float64))  # sigma = 0.8 alpha: the modes touch
    law, variance = LAW.marginal(path, t), path.sigma(t).item() ** 2
    g = torch.Generator().manual_seed(0)
    x = law.mean + torch.randn(8000, 2, generator=g, dtype=torch.float64) * math.sqrt(variance)  # one mode, narrow
    with pytest.raises(AssertionError):
        assert_law(law, x, Case(0.05, 0.05, 0.05))
    x = langevin(LAW.denoise(path), path, x, t, steps=250, step_size=0.08 * variance, generator=g)
    assert_law(law, x, Case(0.02, 0.02, 0.04))  # of order step_size / variance


# --- orders of convergence; those that remember earlier steps are in test_solvers.py ---------------------------------

ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "flow_heun": 2, "midpoint": 2}


@pytest.mark.parametrize("path", [RectifiedFlow(), CosineVP(), LinearVP(), VE(20.0)], ids=repr)
def test_orders_of_convergence(path: Path) -> None:
    """Karras et al. 2022, section 3 (Heun); Song et al. 2021a (DDIM is Euler's). Float64, from t = 0.9 to where sigma =
    alpha / 4, at the height of the modes' spread: each of four halvings of the steps divides the error by 2^order, up
    to 2^0.25."""
    begin, end = torch.tensor(0.9, dtype=torch.float64), path.time_at(torch.tensor(math.log(16.0)).double())
    x = drawn(path, 0.9, 32)
    truth = flow(path, x, begin, end, 600)  # to 1e-9
    for name, order in ORDERS.items():
        errors = []
        for n in (30, 60, 120, 240, 480):
            steps = torch.linspace(0, 1, n + 1, dtype=torch.float64)
            low, high = path.log_snr(torch.stack([begin, end]))
            times = path.time_at(low + (high - low) * steps)
            got = SAMPLERS[name](LAW.denoise(path), path, x, times)
            errors.append((got - truth).norm(dim=1).mean().item())
        found = [math.log2(a / b) for a, b in pairwise(errors)]
        assert all(abs(one - order) < 0.25 for one in found), (name, found)


def test_rk45_keeps_its_tolerance() -> None:
    path = RectifiedFlow()
    times = torch.tensor([1.0, 0.1], dtype=torch.float64)
    x = drawn(path, 1.0, 50)
    truth = flow(path, x, times[0], times[1], 800)
    for tolerance in (1e-3, 1e-5, 1e-7):
        end = SAMPLERS["rk45"](LAW.denoise(path), path, x, times, rtol=tolerance, atol=tolerance)
        # the error of a step is held; the whole is larger by their number and by what the flow stretches
        assert (end - truth).abs().max().item() < 50 * tolerance


# --- what holds for every sampler ------------------------------------------------------------------------------------


def short(name: str, path: Path, x: Tensor, generator: Any) -> Tensor:
    """A few steps of one, from below alpha = 0 and ending above sigma = 0."""
    times = graded(path, 6, low=0.1, skip=True)
    options = {"steps": 3} if name == "annealed_langevin" else {}
    return SAMPLERS[name](LAW.denoise(path), path, x, times, generator=generator, **options)


def seeds(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


@BY_NAME
def test_equal_seeds_give_equal_samples_and_a_row_stands_alone(name: str) -> None:
    for path in (PATHS["linear"], PATHS["chain"]):
        x = drawn(path, 0.9, 5)
        before = x.clone()
        together = short(name, path, x, seeds(5))
        assert together.dtype == torch.float64 and together.isfinite().all()
        assert torch.equal(x, before)
        assert torch.equal(together, short(name, path, x, seeds(5)))
        one = torch.Generator
        assert torch.equal(short(name, path, x, one().manual_seed(7)), short(name, path, x, one().manual_seed(7)))
        # rk45 chooses its steps for the whole batch, and holds 1e-5; for the rest a matrix product of another height
        tolerance = 1e-3 if name == "rk45" else 1e-12
        for i in range(5):
            alone = short(name, path, x[i : i + 1], seeds(5)[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1], rtol=tolerance, atol=tolerance)
        noisy = TABLE[name].rows is None
        other = short(name, path, x, [torch.Generator().manual_seed(i + 50) for i in range(5)])
        assert torch.equal(other, together) != noisy


@BY_NAME
def test_the_grid_is_left_as_it_was(name: str) -> None:
    path = RectifiedFlow()
    times = graded(path, 4, low=0.1, skip=True)
    before = times.clone()
    SAMPLERS[name](LAW.denoise(path), path, drawn(path, 0.9, 3), times)
    assert torch.equal(times, before)


# --- one output of a network, told in another way --------------------------------------------------------------------


def network(x: Tensor, t: Tensor) -> Tensor:
    """Not linear, and not the denoiser of anything."""
    return torch.tanh(x @ x.new_tensor([[0.7, -0.4], [0.3, 0.9]]) + t) - 0.2 * x


def trajectory(name: str, path: Path, means: str, told: str | None = None) -> Tensor:
    """With ``network`` as a prediction of the kind ``means``, whose output is converted to the kind ``told``."""
    kind, other = PREDICTIONS[means](), PREDICTIONS[told or means]()

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        c = path.coeffs(t, x.ndim)

        def plain(seen: Tensor, time: Tensor, cond: Cond) -> Tensor:
            return network(seen, t)

        def converted(seen: Tensor, time: Tensor, cond: Cond) -> Tensor:
            x = seen / other.scale_input(c)
            output = network(kind.scale_input(c) * x, t)
            return other.target(kind.to_x0(x, output, c), kind.to_eps(x, output, c), c)

        return Denoiser(converted if told else plain, path, other)(x, t, Cond(torch.zeros(1, 1, 1)))

    times = graded(path, 8, low=0.05, skip=True)
    x = torch.tensor([[0.3, -1.2], [1.1, 0.4], [-0.6, 2.0]], dtype=torch.float64) * path.sigma(times[0])
    return SAMPLERS[name](denoise, path, x, times, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("path", [RectifiedFlow(), CosineVP(), LinearVP(), VE(20.0)], ids=repr)
@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "dpmpp_2m", "euler_maruyama"])
def test_an_output_may_be_told_as_any_prediction(path: Path, name: str) -> None:
    """Issue 3, point 2, from below alpha = 0 for Eps and Score."""
    ends = {}
    for means in PREDICTIONS:
        ends[means] = trajectory(name, path, means)
        size = max(1.0, ends[means].abs().max().item())
        for told in PREDICTIONS:
            other = trajectory(name, path, means, told)
            assert (other - ends[means]).abs().max().item() < 1e-9 * size, (means, told)
    assert (ends["epsilon"] - ends["sample"]).abs().max() > 0.01  # the kinds differ
