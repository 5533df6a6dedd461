"""Time samplers against their distributions, weightings against the loss that each paper writes down."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling as stock_times
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoiser, TimeInput
from ldm.paths import NCSN, VE, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow, SigmoidVP
from ldm.prediction import PREDICTIONS, X0, Eps, Flow, Karras, Prediction, Score, V
from ldm.process import score, velocity
from ldm.timesteps import TIMESTEPS, WEIGHTINGS, gain, log_normal, logit_normal, mode, shift, stratified, uniform

NONE = Cond(torch.zeros(1, 1, 1))
FLOW, CHAIN, ZERO = RectifiedFlow(), DiscreteVP(), DiscreteVP(zero_terminal_snr=True)
PATHS = [FLOW, CosineVP(), LinearVP(), SigmoidVP(), VE(), NCSN(), CHAIN, ZERO]
KINDS: list[Prediction] = [*(kind() for kind in PREDICTIONS.values()), Karras(1.3)]
PAIRS = pytest.mark.parametrize(("path", "kind"), list(product(PATHS, KINDS)), ids=repr)

MOST = 2 / (math.pi - 2)  # of mode's scale
SAMPLERS = {
    "uniform": uniform,
    "logit_normal": partial(logit_normal, mean=0.7, std=1.3),
    "mode": mode,
    "mode, ends": partial(mode, scale=-1.0),
    "mode, middle": partial(mode, scale=MOST),
    "log_normal": log_normal,
}


def midpoints(n: int = 2000) -> Tensor:
    """The uniform distribution, without chance: sampler and distribution are then compared exactly."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def normal_cdf(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.special.ndtr((x - mean) / std)


# --- time samplers -----------------------------------------------------------------------------------------------


def test_the_list_is_what_is_tested() -> None:
    assert {name.split(",")[0] for name in SAMPLERS} == set(TIMESTEPS)
    assert set(WEIGHTINGS) == {"unit", *PAPERS}


def test_uniform_is_u() -> None:
    assert torch.equal(uniform(midpoints(), FLOW), midpoints())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 1.3), (-0.5, 0.6)])
def test_the_logit_is_normal(mean: float, std: float) -> None:
    t = logit_normal(midpoints(), FLOW, mean=mean, std=std)
    # CDF(t(u)) = u; the logit near t = 1 costs 1 / (1 - t) of a rounding, some 1e3 here
    torch.testing.assert_close(normal_cdf(torch.logit(t), mean, std), midpoints(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_log_of_sigma_is_normal(path: Path) -> None:
    u = midpoints()
    for mean, std in ((-1.2, 1.2), (0.3, 0.8)):
        t = log_normal(u, path, mean=mean, std=std)
        most = normal_cdf(-path.log_snr(torch.ones((), dtype=torch.float64)) / 2, mean, std)
        cdf = normal_cdf(-path.log_snr(t) / 2, mean, std)
        torch.testing.assert_close(cdf, u.clamp(max=most.item()), rtol=0, atol=1e-12)  # roundings
        assert ((t == 1) == (u >= most)).all()
    if path == VE(80.0):
        torch.testing.assert_close(t * 80, torch.exp(mean + std * torch.special.ndtri(u)).clamp(max=80.0))
    if path == CHAIN:
        assert log_normal(u, path, mean=2.0).eq(1).any()  # more noise than SD's chain has


def test_mode_has_its_closed_forms() -> None:
    u = midpoints()
    torch.testing.assert_close(mode(u, FLOW, scale=0.0), 1 - u)
    arcsine = 2 / math.pi * torch.asin(mode(u, FLOW, scale=-1.0).sqrt())  # t = cos^2(pi u / 2): the arcsine law
    torch.testing.assert_close(arcsine, 1 - u, rtol=0, atol=1e-12)
    for s in (-0.5, 0.8, 1.29, MOST):
        t = mode(u, FLOW, scale=s)
        variance = (1 + s) ** 2 / 12 - 2 * s * (1 + s) / math.pi**2 + s**2 / 8
        torch.testing.assert_close(t + t.flip(0), torch.ones_like(t))
        # the midpoint rule errs by h^2 / 24 times what the slope of (t - 1/2)^2 gains from end to end, 2 (1 + s)
        assert abs((t - 0.5).square().mean().item() - variance) < 1.01 * (1 + s) / 12 / len(u) ** 2


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_times_are_monotone_and_inside(name: str, path: Path) -> None:
    u = midpoints()
    step = SAMPLERS[name](u, path).diff() * (-1 if name.startswith("mode") else 1)
    inside = SAMPLERS[name](u, path)[1:] < 1
    assert (step[inside] > 0).all() and (step >= 0).all()
    odd = torch.tensor([2.0**-24, 2.0**-23, 0.5, 1 - 2.0**-23, 1 - 2.0**-24])  # what ldm.rng can draw
    for low in (odd, torch.rand(10_000)):
        t = SAMPLERS[name](low, path)
        assert t.dtype == torch.float32 and t.shape == low.shape and ((t >= 0) & (t <= 1)).all()


def test_mode_would_turn_back_outside_its_range() -> None:
    u = midpoints()

    def paper(s: float) -> Tensor:
        return 1 - u - s * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)

    for scale in (-1.01, MOST + 0.01):
        assert (paper(scale).diff() > 0).any()
        with pytest.raises(ValueError, match=r"mode: scale is .* from -1 to .*1\.75"):
            mode(u, FLOW, scale=scale)
    for scale in (-1.0, 1.29, MOST):
        assert (paper(scale).diff() < 0).all()
        torch.testing.assert_close(mode(u, FLOW, scale=scale), paper(scale))


def test_sd3s_samplers_are_those_of_diffusers() -> None:
    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    u = torch.rand(5000, generator=seeded())
    for scale in (1.29, -0.7):
        stock = stock_times("mode", 5000, mode_scale=scale, generator=seeded())
        torch.testing.assert_close(mode(u, FLOW, scale=scale), stock, rtol=0, atol=1e-6)
    assert torch.equal(mode(u, FLOW), mode(u, FLOW, scale=1.29))  # the default of diffusers' scripts
    z = torch.normal(0.0, 1.0, (5000,), generator=seeded())
    stock = stock_times("logit_normal", 5000, logit_mean=0.4, logit_std=1.2, generator=seeded())
    ours = logit_normal(torch.special.ndtr(z.double()), FLOW, mean=0.4, std=1.2)
    torch.testing.assert_close(ours, stock.double(), rtol=0, atol=1e-6)


def test_shift_changes_the_odds_of_noise() -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    moved = shift(t, 3.0)
    torch.testing.assert_close(moved / (1 - moved), 3 * t / (1 - t))  # SD3, eq. 23: sigma / alpha times s
    torch.testing.assert_close(shift(moved, 1 / 3), t)
    assert torch.equal(shift(t, 1.0), t) and shift(torch.tensor([0.0, 1.0]), 5.0).tolist() == [0, 1]
    u = midpoints()  # so that log(sigma / alpha) on the straight path moves by log s, and a normal law stays one
    for sampler in (logit_normal, log_normal):
        torch.testing.assert_close(
            shift(sampler(u, FLOW, mean=0.2), 3.0), sampler(u, FLOW, mean=0.2 + math.log(3)), rtol=1e-12, atol=0
        )
    with pytest.raises(ValueError, match="shift"):
        shift(t, 0.0)


def test_stratified_has_one_in_each_part() -> None:
    u = torch.rand(64, generator=torch.Generator().manual_seed(0))
    s = stratified(u)
    assert torch.equal((s * 64).floor(), torch.arange(64.0)) and ((s > 0) & (s < 1)).all()
    edge = stratified(torch.full((64,), 1 - 2.0**-24))  # 63 + u is 64 in float32
    assert (edge < 1).all() and edge.dtype == torch.float32
    index = torch.arange(100, 164)  # an image's own part, whatever batch it is in
    by_index = stratified(u, index, 16)
    assert torch.equal((by_index * 16).floor(), (index % 16).float())
    assert torch.equal(stratified(u[5:9], index[5:9], 16), by_index[5:9])
    t = shift(log_normal(s.double(), FLOW), 3.0)  # and so one in each part of equal probability, in order
    share = normal_cdf(torch.logit(t), -1.2 + math.log(3), 1.2)
    assert torch.equal((share * 64).floor(), torch.arange(64, dtype=torch.float64))


# --- weightings --------------------------------------------------------------------------------------------------

TIMES = torch.tensor([0.0305, 0.2004, 0.5003, 0.7706, 0.9805], dtype=torch.float64)  # between the nodes of a chain,
# where its rates jump and float32 may lie on the other side


def slope_of(f: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """f and df/dt at each t."""
    value, slope, *_ = torch.func.jvp(f, (t,), (torch.ones_like(t),))
    return value, slope


class Seen:
    """What a network that is wrong says of x0 and eps (rows of mean squares), and the path's numbers."""

    def __init__(self, path: Path, kind: Prediction, t: Tensor = TIMES):
        g = torch.Generator().manual_seed(1)
        x0, eps, wrong = (torch.randn(len(t), 6, generator=g, dtype=torch.float64) for _ in range(3))
        c, self.t = path.coeffs(t, 2), t
        x_t, output = path.mix(x0, eps, t), kind.target(x0, eps, c) + wrong
        self.loss = Denoiser(lambda x, time, cond: output, path, kind).loss(x0, t, NONE, eps=eps)
        x0_hat, eps_hat = kind.to_x0(x_t, output, c), kind.to_eps(x_t, output, c)
        self.x0 = (x0_hat - x0).square().mean(1)
        self.eps = (eps_hat - eps).square().mean(1)
        self.straight = ((eps_hat - x0_hat) - (eps - x0)).square().mean(1)
        self.alpha, self.sigma = path.alpha(t), path.sigma(t)
        self.nu, self.snr = self.sigma / self.alpha, (self.alpha / self.sigma) ** 2
        self.s = self.nu / (1 + self.nu)  # the straight path's time of this SNR
        self.log_snr, self.dlog_snr = slope_of(path.log_snr, t)


# name: options, and the loss as the paper has it
PAPERS: dict[str, tuple[dict[str, float], Callable[[Seen], Tensor]]] = {
    "min_snr": ({"gamma": 3.0}, lambda e: e.snr.clamp(max=3.0) * e.x0),
    "p2": ({"gamma": 0.5, "k": 2.0}, lambda e: e.eps / (2.0 + e.snr) ** 0.5),
    "debiased": ({}, lambda e: e.eps / e.snr.sqrt()),
    "sigmoid": ({"bias": -2.0}, lambda e: -e.dlog_snr / 2 * torch.sigmoid(-2.0 - e.log_snr) * e.eps),
    "edm": ({"sigma_data": 0.7}, lambda e: (e.nu**2 + 0.49) / (e.nu * 0.7) ** 2 * e.x0),
    "cosmap": ({}, lambda e: 2 / (math.pi * (1 - 2 * e.s + 2 * e.s**2)) * e.straight),
}


@PAIRS
def test_weighted_loss_is_the_papers(path: Path, kind: Prediction) -> None:
    e = Seen(path, kind)
    torch.testing.assert_close(e.loss, gain(kind, path.coeffs(TIMES, 1)) * e.x0, rtol=1e-11, atol=0)
    for name, (options, paper) in PAPERS.items():
        weight = WEIGHTINGS[name](path, kind, TIMES, **options)
        # x0 and eps of an output far from them lose three digits to cancellation
        torch.testing.assert_close(weight * e.loss, paper(e), rtol=1e-11, atol=0)
        one = torch.stack([WEIGHTINGS[name](path, kind, t, **options) for t in TIMES])
        assert torch.equal(one, weight)
        low = WEIGHTINGS[name](path, kind, TIMES.float(), **options)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), weight, rtol=3e-5, atol=0)  # some 100 roundings of float32


@PAIRS
def test_two_losses_that_hold_for_every_prediction(path: Path, kind: Prediction) -> None:
    e = Seen(path, kind)
    # L_simple (Ho et al. 2020, eq. 14), whatever the network says
    torch.testing.assert_close(WEIGHTINGS["p2"](path, kind, TIMES, gamma=0.0) * e.loss, e.eps, rtol=1e-11, atol=0)
    # the bound in continuous time, -1/2 SNR'(t) |x0 - x0^|^2 (Kingma et al. 2021, section 5)
    dsnr = e.dlog_snr * e.snr
    bound = WEIGHTINGS["sigmoid"](path, kind, TIMES, bias=math.inf) * e.loss
    torch.testing.assert_close(bound, -dsnr / 2 * e.x0, rtol=1e-11, atol=0)
    assert torch.equal(WEIGHTINGS["unit"](path, kind, TIMES), torch.ones_like(TIMES))


def test_closed_forms_on_the_straight_path_and_on_vp() -> None:
    t, one = TIMES, torch.ones_like(TIMES)
    for name, kind, expected in (
        ("debiased", Flow(), t * (1 - t)),
        ("p2", Flow(), (t * (1 - t)) ** 2 / (t**2 + (1 - t) ** 2)),
        ("sigmoid", Eps(), t / (1 - t) / (t**2 + (1 - t) ** 2)),
        ("sigmoid", Flow(), t * (1 - t) / (t**2 + (1 - t) ** 2)),
        ("cosmap", Flow(), 2 / math.pi / (t**2 + (1 - t) ** 2)),
        ("min_snr", Flow(), torch.minimum((1 - t) ** 2, 5 * t**2)),
    ):
        torch.testing.assert_close(WEIGHTINGS[name](FLOW, kind, t), expected, rtol=1e-12, atol=0)
    for path in PATHS:
        sigma = path.sigma(t)
        torch.testing.assert_close(WEIGHTINGS["edm"](path, Karras(0.5), t), one, rtol=1e-12, atol=0)
        torch.testing.assert_close(WEIGHTINGS["p2"](path, Score(), t, gamma=0.0), sigma**2, rtol=1e-12, atol=0)
    # cosmap makes a uniform t count as the cosine path's own times do: ds/dt there, at the same SNR (SD3, section 3.1)
    s, ds = slope_of(lambda t: FLOW.time_at(CosineVP().log_snr(t)), t)
    torch.testing.assert_close(WEIGHTINGS["cosmap"](FLOW, Flow(), s), 1 / ds, rtol=1e-10, atol=0)


@pytest.mark.parametrize("path", [CHAIN, DiscreteVP(schedule="linear", beta_start=1e-4, beta_end=0.02)], ids=repr)
def test_min_snr_is_that_of_diffusers_training_scripts(path: DiscreteVP) -> None:
    steps = torch.arange(0, 1000, 37)
    snr = compute_snr(DDPMScheduler(trained_betas=path.betas.tolist()), steps).double()
    t, capped = (steps.double() + 1) / 1000, snr.clamp(max=5.0)
    # diffusers takes 1 - alpha^2, 1e-4 at the first step, in float32: 6e-8 / 1e-4 is 6e-4
    torch.testing.assert_close(WEIGHTINGS["min_snr"](path, Eps(), t), capped / snr, rtol=6e-4, atol=0)
    torch.testing.assert_close(WEIGHTINGS["min_snr"](path, V(), t), capped / (snr + 1), rtol=6e-4, atol=0)
    torch.testing.assert_close(WEIGHTINGS["min_snr"](path, X0(), t), capped, rtol=6e-4, atol=0)


def test_cosmap_is_that_of_diffusers() -> None:
    sigmas = midpoints(501)
    stock = compute_loss_weighting_for_sd3("cosmap", sigmas)
    torch.testing.assert_close(WEIGHTINGS["cosmap"](FLOW, Flow(), sigmas), stock, rtol=1e-12, atol=0)
    assert torch.equal(WEIGHTINGS["unit"](FLOW, Flow(), sigmas), compute_loss_weighting_for_sd3("none", sigmas))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@PAIRS
def test_ends_are_numbers(path: Path, kind: Prediction, dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    for weighting in WEIGHTINGS.values():
        weight = weighting(path, kind, ends)
        assert weight.isfinite().all() and (weight >= 0).all() and weight.dtype == dtype
    if path.alpha(ends)[1] == 0:
        min_snr = WEIGHTINGS["min_snr"](path, kind, ends)[1].item()
        # (alpha / o)^2: its limit is 1 where the network tells eps, and 0 otherwise; alpha^2 = 1e-7 in float32
        assert abs(min_snr - isinstance(kind, Eps | Score)) < 1e-6
        edm = WEIGHTINGS["edm"](path, Karras(0.5), ends)
        torch.testing.assert_close(edm, torch.ones_like(edm))
        velocity_like = WEIGHTINGS["edm"](path, V(), ends)  # sigma^2 / d^2 where alpha = 0, alpha^2 where sigma = 0
        torch.testing.assert_close(velocity_like, velocity_like.new_tensor([1.0, 4.0]), rtol=1e-5, atol=0)


def test_nothing_is_read_back_from_the_device() -> None:
    """A meta tensor has no values: whatever looks at one raises."""
    t = torch.empty(3, device="meta")
    for path in (FLOW, CHAIN, ZERO, LinearVP(), NCSN()):
        assert all(f(stratified(t), path).shape == (3,) for f in TIMESTEPS.values())
        assert all(f(path, kind, t).shape == (3,) for f in WEIGHTINGS.values() for kind in KINDS)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda u: logit_normal(u, FLOW, std=0.0), "logit_normal: std is 0.0"),
        (lambda u: log_normal(u, FLOW, std=-1.0), "log_normal: std is -1.0"),
        (lambda u: mode(u, FLOW, scale=math.nan), "mode: scale is nan"),
        (lambda u: WEIGHTINGS["min_snr"](FLOW, V(), u, gamma=0.0), "min_snr: gamma is 0.0"),
        (lambda u: WEIGHTINGS["p2"](FLOW, V(), u, gamma=-1.0), "p2: gamma is -1.0"),
        (lambda u: WEIGHTINGS["p2"](FLOW, V(), u, k=-1.0), "k is -1.0"),
        (lambda u: WEIGHTINGS["edm"](FLOW, V(), u, sigma_data=0.0), "edm: sigma_data is 0.0"),
        (lambda u: WEIGHTINGS["edm"](FLOW, V(), u[:, None]), "t has shape"),
    ],
)
def test_bad_options_are_named(call: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(midpoints(10))


# --- the losses that papers train with ---------------------------------------------------------------------------


def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return torch.tanh(x) * torch.cos(time.to(x.dtype))[:, None] + 0.1 * x


def data(rows: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    x0, eps = (torch.randn(rows, 6, generator=g, dtype=torch.float64) for _ in range(2))
    return x0, eps


def test_edm_trains_as_its_paper_says() -> None:
    """lambda(sigma) |D(y + n; sigma) - y|^2 with D = c_skip x + c_out F(c_in x; c_noise) (Karras et al. 2022, eq. 2, 7
    and 8, table 1): our own unit weight."""
    path, d, (x0, eps) = VE(80.0), 0.5, data()
    sigma = path.sigma(TIMES)[:, None]
    total = sigma**2 + d**2
    c_skip, c_out, c_in, c_noise = d**2 / total, sigma * d / total.sqrt(), 1 / total.sqrt(), sigma.log()[:, 0] / 4
    x = x0 + sigma * eps
    denoised = c_skip * x + c_out * network(c_in * x, c_noise.float(), NONE)
    paper = (total / (sigma * d) ** 2 * (denoised - x0) ** 2).mean(1)
    ours = Denoiser(network, path, Karras(d), TimeInput(0.25, log_sigma=True)).loss(x0, TIMES, NONE, eps=eps)
    # the time is told in float32 to both, and rounded on the way by different formulas
    torch.testing.assert_close(WEIGHTINGS["edm"](path, Karras(d), TIMES, sigma_data=d) * ours, paper, rtol=1e-6, atol=0)


def test_flow_matching_and_score_matching_are_what_they_are_called() -> None:
    x0, eps = data()
    t = TIMES[:, None]
    time = 1000 * TIMES
    out = network((1 - t) * x0 + t * eps, time, NONE)
    flow = Denoiser(network, FLOW, Flow()).loss(x0, TIMES, NONE, eps=eps)
    torch.testing.assert_close(flow, (out - (eps - x0)).square().mean(1), rtol=1e-12, atol=0)
    for path in PATHS:
        alpha, sigma = path.alpha(t), path.sigma(t)
        x = alpha * x0 + sigma * eps
        out = network(x, time, NONE)
        kernel = -(x - alpha * x0) / sigma**2  # gradient of log q(x_t | x0): Vincent 2011
        dsm = Denoiser(network, path, Score()).loss(x0, TIMES, NONE, eps=eps)
        torch.testing.assert_close(dsm, (out - kernel).square().mean(1), rtol=1e-9, atol=0)
        # times lambda = sigma^2 it is the loss of the noise eps^ = -sigma s that this score stands for
        as_eps = Denoiser(lambda x, time, cond, s=sigma: -s * network(x, time, cond), path, Eps())
        expected = as_eps.loss(x0, TIMES, NONE, eps=eps)
        torch.testing.assert_close(sigma[:, 0] ** 2 * dsm, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", [FLOW, CosineVP(), VE(2.0), CHAIN], ids=repr)
@pytest.mark.parametrize("kind", [Flow(), Score()], ids=repr)
def test_the_loss_is_least_at_the_exact_field(path: Path, kind: Prediction) -> None:
    """Gaussian data, an affine network: the loss is a parabola, whose foot one Newton step finds. It is the marginal
    velocity (Lipman et al. 2023, theorem 2) or score (Vincent 2011), though only conditional ones were shown."""
    mean, std, rows = 1.5, 0.6, 40_000
    g, t = torch.Generator().manual_seed(4), torch.tensor(0.4, dtype=torch.float64)
    x0 = mean + std * torch.randn(rows, 1, generator=g, dtype=torch.float64)
    eps = torch.randn(rows, 1, generator=g, dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        return Denoiser(lambda x, time, cond: theta[0] + theta[1] * x, path, kind).loss(x0, t, NONE, eps=eps)

    zero = torch.zeros(2, dtype=torch.float64)
    slope = torch.func.grad(lambda p: loss(p).mean())(zero)
    curvature: Any = torch.func.hessian(lambda p: loss(p).mean())(zero)
    found = -torch.linalg.solve(curvature, slope)

    c = path.coeffs(t, 2)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    residual = (x - c.alpha * mean) / (c.alpha**2 * std**2 + c.sigma**2)
    exact_x0, exact_eps = mean + c.alpha * std**2 * residual, c.sigma * residual
    field = velocity(exact_x0, exact_eps, c) if isinstance(kind, Flow) else score(exact_eps, c)
    exact = torch.stack([field[0, 0], field[1, 0] - field[0, 0]])
    # least squares: covariance 2 var H^-1 / rows, var the mean square that is left
    deviation = (2 * loss(exact).mean() * torch.linalg.inv(curvature) / rows).diagonal().sqrt()
    assert ((found - exact).abs() < 4 * deviation).all() and (deviation < 0.03).all()
    assert loss(found).mean() <= loss(exact).mean() < loss(found + 0.1).mean()
