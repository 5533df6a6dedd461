"""The Gaussians of the chain against Bayes and stock DDPM, and the fields of continuous time against the equations
that move mean and variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from scipy.integrate import solve_ivp
from torch import Tensor

from ldm.paths import NCSN, PATHS, VE, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow, SigmoidVP
from ldm.process import (
    Coeffs,
    diffusion,
    posterior,
    posterior_mean_of_eps,
    reverse_drift,
    score,
    score_of_velocity,
    transition,
    velocity,
    velocity_of_score,
)

ALL: dict[str, Path] = {
    "rectified_flow": RectifiedFlow(),
    "cosine": CosineVP(),
    "linear": LinearVP(),
    "sigmoid": SigmoidVP(),
    "tilted_sigmoid": SigmoidVP(start=-2.0, end=4.0, tau=0.7),
    "ve": VE(),
    "ncsn": NCSN(),
    "scaled_linear": DiscreteVP(),
    "ddpm": DiscreteVP(schedule="linear", beta_start=1e-4, beta_end=0.02),
    "squaredcos": DiscreteVP(schedule="squaredcos_cap_v2"),
    "geodiff": DiscreteVP(schedule="sigmoid"),
    "zero_snr": DiscreteVP(zero_terminal_snr=True),
    "short": DiscreteVP([0.1, 0.2, 0.4, 0.9]),
}
CHAINS = {name: path for name, path in ALL.items() if isinstance(path, DiscreteVP)}
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())
every_chain = pytest.mark.parametrize("path", CHAINS.values(), ids=CHAINS.keys())


def close(ours: Tensor, truth: Tensor, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    """float64 by default: a few hundred operations, whose rounding adds up to some 1e-12 at the worst."""
    torch.testing.assert_close(ours, truth, rtol=rtol, atol=atol)


def some_times(n: int = 50) -> tuple[Tensor, Tensor]:
    """s < t, away from the ends."""
    both = torch.rand(2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.94 + 0.03
    return both.amin(0), both.amax(0)


def grid(path: Path) -> Tensor:
    steps = path.num_train_timesteps if isinstance(path, DiscreteVP) else 1000
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def test_every_kind_of_path_is_here() -> None:
    assert {type(path) for path in ALL.values()} == set(PATHS.values())


# --- the chain -------------------------------------------------------------------------------------------------------


@every_path
def test_single_steps_compose_to_the_closed_form(path: Path) -> None:
    """q(x_1/T | x_0), q(x_2/T | x_1/T), … give alpha and sigma at every node."""
    nodes = grid(path)
    scales, fresh = transition(path, nodes[:-1], nodes[1:])
    mean, var, alpha, sigma2 = 1.0, 0.0, [], []
    for scale, noise in zip(scales.tolist(), fresh.tolist(), strict=True):
        mean, var = scale * mean, scale**2 * var + noise
        alpha.append(mean)
        sigma2.append(var)
    # rounding of up to 1000 steps adds up
    close(torch.tensor(alpha, dtype=torch.float64), path.alpha(nodes[1:]), rtol=1e-11, atol=1e-14)
    close(torch.tensor(sigma2, dtype=torch.float64), path.sigma(nodes[1:]) ** 2, rtol=1e-11)


@every_path
def test_two_steps_are_one(path: Path) -> None:
    s, t = some_times()
    r = (s + t) / 2
    first, second, both = transition(path, s, r), transition(path, r, t), transition(path, s, t)
    close(both.scale, second.scale * first.scale)
    close(both.var, second.scale**2 * first.var + second.var)


@every_path
def test_posterior_is_bayes(path: Path) -> None:
    """(x_s, x_t) given x0 is one Gaussian, with mean (alpha_s, alpha_t) x0 and covariance [[a, b], [b, c]]: condition
    it on x_t."""
    s, t = some_times()
    scale, _ = transition(path, s, t)
    a, c = path.sigma(s) ** 2, path.sigma(t) ** 2
    b = scale * a
    of_x0, of_xt, var = posterior(path, s, t)
    close(of_xt, b / c)
    close(of_x0, path.alpha(s) - b / c * path.alpha(t), rtol=1e-9)  # truth cancels; ours does not
    close(var, a - b**2 / c, rtol=1e-8)
    # Tower property: averaged over x_t | x0, the posterior is q(x_s | x0) again.
    close(of_x0 + of_xt * path.alpha(t), path.alpha(s))
    close(var + of_xt**2 * c, a)


@every_path
def test_mean_of_eps_is_the_mean_of_x0(path: Path) -> None:
    s, t = some_times(6)
    x0, eps = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_t = path.mix(x0, eps, t)
    of_x0, of_xt, _ = (v.view(6, 1, 1) for v in posterior(path, s, t))
    close(posterior_mean_of_eps(x_t, eps, path, s, t), of_x0 * x0 + of_xt * x_t)
    one = posterior_mean_of_eps(x_t[:1], eps[:1], path, s[0], t[0])
    assert torch.equal(one, posterior_mean_of_eps(x_t, eps, path, s, t)[:1])
    with pytest.raises(ValueError, match="eps has shape"):
        posterior_mean_of_eps(x_t, eps[:3], path, s, t)


@every_chain
def test_variance_of_a_step_is_its_beta(path: DiscreteVP) -> None:
    nodes = grid(path)
    s, t, beta = nodes[:-1], nodes[1:], path.betas
    abar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    scale, var = transition(path, s, t)
    # sigma^2 is the sum of betas: each is the difference of two large numbers in the truth, not in ours
    close(var, beta, rtol=1e-9)
    close(scale, torch.sqrt(1 - beta), rtol=1e-9, atol=1e-12)
    # Ho et al. 2020, eq. 7, and eq. 11 in their letters
    of_x0, of_xt, small = posterior(path, s, t)
    close(of_x0, before.sqrt() * beta / (1 - abar), rtol=1e-8)
    close(of_xt, torch.sqrt(1 - beta) * (1 - before) / (1 - abar), rtol=1e-8, atol=1e-12)
    close(small, (1 - before) / (1 - abar) * beta, rtol=1e-8)
    assert of_xt[0] == small[0] == 0 and of_x0[0] == 1


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_variance_and_mean_are_those_of_stock_ddpm(schedule: str) -> None:
    path = DiscreteVP(schedule=schedule)
    kinds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fixed_small": lambda s, t: posterior(path, s, t).var.clamp(min=1e-20),
        "fixed_large": lambda s, t: transition(path, s, t).var,
    }
    config = dict(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012, clip_sample=False)
    nodes = [0, 1, 2, 250, 500, 998, 999]
    t = (torch.tensor(nodes, dtype=torch.float64) + 1) / 1000
    for kind, ours in kinds.items():
        stock = DDPMScheduler(**config, variance_type=kind)
        theirs = torch.stack([stock._get_variance(i) for i in nodes]).double()
        # theirs is 1 - abar_t / abar_{t-1} in float32: beta = 1e-4 … 1e-2 to within some 1e-7
        close(ours(t - 0.001, t), theirs, rtol=1e-4, atol=3e-7)
    x, eps = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    stock = DDPMScheduler(**config)
    for i in nodes[1:]:
        now = torch.tensor((i + 1) / 1000, dtype=torch.float64)
        noise = torch.Generator().manual_seed(i)
        theirs = stock.step(eps, i, x, generator=noise).prev_sample
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        ours = posterior_mean_of_eps(x, eps, path, now - 0.001, now) + posterior(path, now - 0.001, now).var.sqrt() * z
        # x0 = (x - sigma eps) / alpha there, so that the rounding of abar in float32 is blown up by 1 / alpha
        close(ours, theirs, rtol=2e-5, atol=2e-5)


# --- continuous time -------------------------------------------------------------------------------------------------


@every_path
def test_score_and_velocity_are_one_knowledge(path: Path) -> None:
    t = torch.linspace(0.03, 0.97, 40, dtype=torch.float64)
    x0, eps = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    c, x = path.coeffs(t, 2), path.mix(x0, eps, t)
    u, grad = velocity(x0, eps, c), score(eps, c)
    close(velocity_of_score(x, grad, c), u, rtol=1e-8, atol=1e-9)
    close(score_of_velocity(x, u, c), grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["rectified_flow", "cosine", "zero_snr"])
def test_score_of_velocity_without_signal(name: str) -> None:
    path, end = ALL[name], torch.ones((), dtype=torch.float64)
    x0, eps = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    c = path.coeffs(end, 2)
    assert c.alpha == 0
    close(score_of_velocity(path.mix(x0, eps, end), velocity(x0, eps, c), c), -eps)


def test_natural_diffusion_is_the_one_of_the_papers() -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    g2 = {name: diffusion(path.coeffs(t, 1)) for name, path in ALL.items()}
    close(g2["linear"], 0.1 + t * 19.9)  # Song et al. 2021, eq. 32 and 33
    close(g2["ve"], 2 * 80**2 * t)  # d sigma^2 / dt
    close(g2["ncsn"], 0.01**2 * 2 * math.log(5000) * 5000 ** (2 * t))  # Song et al. 2021, eq. 30
    close(g2["rectified_flow"], 2 * t / (1 - t))
    close(g2["cosine"], math.pi * torch.tan(math.pi / 2 * t))
    assert all((value > 0).all() for value in g2.values())


@every_path
def test_diffusion_is_the_noise_of_a_short_step(path: Path) -> None:
    """The new noise between t - h / 2 and t + h / 2, brought to its middle, over h. In the middle of the steps of a
    chain, which has corners at its nodes."""
    h, steps = 1e-6, path.num_train_timesteps if isinstance(path, DiscreteVP) else 20
    t = (torch.arange(1, steps - 1, dtype=torch.float64) + 0.5) / steps
    scale, var = transition(path, t - h / 2, t + h / 2)
    # (h g^2)^2 with g^2 up to 1e3, and 1e-16 / h of rounding
    close(var / scale / h, diffusion(path.coeffs(t, 1)), rtol=2e-6)


MEAN, STD = 1.3, 0.5


def field_of_gaussian(c: Coeffs, g2: Tensor | float) -> Callable[[Tensor], Tensor]:
    """x -> reverse_drift, for data N(MEAN, STD^2), whose x_t is N(alpha MEAN, alpha^2 STD^2 + sigma^2)."""

    def drift(x: Tensor) -> Tensor:
        residual = (x - c.alpha * MEAN) / (c.alpha**2 * STD**2 + c.sigma**2)
        x0, eps = MEAN + c.alpha * STD**2 * residual, c.sigma * residual
        return reverse_drift(velocity(x0, eps, c), score(eps, c), g2)

    return drift


NOISES: dict[str, Callable] = {
    "ode": lambda c: torch.zeros(()),
    "natural": diffusion,
    "twice_sigma": lambda c: 2 * c.sigma,
}


# Chains of few steps: the formulas are those of 1000, whose corners would take the solver minutes.
SMOOTH = {name: path for name, path in ALL.items() if name not in CHAINS}
FEW = {
    "short": ALL["short"],
    "short_squaredcos": DiscreteVP(schedule="squaredcos_cap_v2", num_train_timesteps=10),
    "short_zero_snr": DiscreteVP(
        schedule="linear", num_train_timesteps=10, beta_start=0.05, beta_end=0.6, zero_terminal_snr=True
    ),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("path", (SMOOTH | FEW).values(), ids=(SMOOTH | FEW).keys())
def test_any_noise_has_the_marginals_of_the_path(path: Path, noise: str) -> None:
    """The drift of dx = (a x + b) dt + g dW, run from t = 0.999 to 0.05, is linear for a Gaussian, so that

        d mean / dt = a mean + b,    d var / dt = 2 a var - g^2

    (Fokker-Planck; - g^2 as time runs back). Solved, they give mean and variance of the path."""

    def rates(t: float, state: np.ndarray) -> list[float]:
        at = torch.tensor(t, dtype=torch.float64)
        c = path.coeffs(at, 1)
        g2 = NOISES[noise](c)
        drift = field_of_gaussian(c, g2)
        b = drift(torch.zeros((), dtype=torch.float64))
        a = drift(torch.ones((), dtype=torch.float64)) - b
        return [float(a * state[0] + b), float(2 * a * state[1] - g2)]

    def law(t: float) -> list[float]:
        at = torch.tensor(t, dtype=torch.float64)
        return [float(path.alpha(at) * MEAN), float((path.alpha(at) * STD) ** 2 + path.sigma(at) ** 2)]

    steps = path.num_train_timesteps if isinstance(path, DiscreteVP) else 1
    corners = [0.999, *(i / steps for i in reversed(range(1, steps)) if i / steps > 0.05), 0.05]
    state = np.array(law(0.999))
    for t, s in pairwise(corners):
        # a hair inside the step of a chain: its rate at a node is the one of the step above
        done = solve_ivp(rates, (t - 1e-12, s), state, method="LSODA", rtol=1e-9, atol=1e-11)
        assert done.success, done.message
        state = done.y[:, -1]
    np.testing.assert_allclose(state, law(0.05), rtol=1e-6)  # 1e-9 a step, some hundred steps


# --- standards -------------------------------------------------------------------------------------------------------


@every_path
def test_vmap_over_times(path: Path) -> None:
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    functions: list[Callable] = [
        path.alpha,
        path.sigma,
        path.log_snr,
        lambda u: path.time_at(path.log_snr(u)),
        lambda u: torch.stack(path.rates(u)),
        lambda u: diffusion(path.coeffs(u, 1)),
        lambda u: torch.stack(transition(path, u / 2, u)),
        lambda u: torch.stack(posterior(path, u / 2, u)),
    ]
    for f in functions:
        close(torch.func.vmap(f, out_dims=-1)(t), f(t))
    x0, eps = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    close(torch.func.vmap(path.mix)(x0, eps, t), path.mix(x0, eps, t))


@every_path
def test_dtype_and_inputs_are_kept(path: Path) -> None:
    for dtype in (torch.float32, torch.float64):
        s, t = (v.to(dtype) for v in some_times(4))
        before = s.clone(), t.clone()
        made = [*transition(path, s, t), *posterior(path, s, t), diffusion(path.coeffs(t, 1))]
        assert all(v.dtype == dtype and v.shape == (4,) for v in made)
        assert torch.equal(s, before[0]) and torch.equal(t, before[1])
