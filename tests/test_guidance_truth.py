"""What guided samplers sample, where it is known: Gaussians, whose denoisers are exact and affine.

Two laws, N(m_c, s_c^2) given the condition and N(m_u, s_u^2) without, mixed with weights w and 1 - w. In y = x / alpha
over nu = sigma / alpha, E[eps | x_t] of N(m, s^2) is nu (y - m) / (s^2 + nu^2), so the guided flow and the guided
reverse SDE (at its natural g^2 = d nu^2 / d nu) are linear:

    ODE:  dy = A (y - M) dnu               A = sum w_i nu / (s_i^2 + nu^2),  A M = sum w_i nu m_i / (s_i^2 + nu^2)
    SDE:  dy = 2 A (y - M) dnu + sqrt(2 nu) dW

With H(nu) = prod (s_i^2 + nu^2)^(w_i / 2), which solves H' = A H and goes as nu where nu has no bound, the start there
is forgotten but for the ODE's unit of noise, and variation of constants gives

    ODE:  mean = H(0) ∫ A M / H dnu,             variance = H(0)^2 = prod s_i^(2 w_i)
    SDE:  mean = H(0)^2 ∫ 2 A M / H^2 dnu,       variance = H(0)^4 ∫ 2 nu / H^4 dnu

All samplers below start at nu = inf (alpha = 0), as the formulas do, and runs of n, 2 n and 4 n steps are extrapolated
to steps of no length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoiser, TimeInput
from ldm.guidance import Denoise, autoguidance, classifier, classifier_free, interval
from ldm.paths import VE, CosineVP, LinearVP, Path, RectifiedFlow
from ldm.prediction import X0, Eps, Prediction, V
from ldm.sampling import ddpm, euler, heun, noise_like

PATH = RectifiedFlow()
C, U = (1.5, 0.5), (-0.5, 1.2)  # mean and spread
EQUAL = (1.5, 0.8), (-0.5, 0.8)
NARROWER, WIDER = (C, U), (U, C)
CASES = pytest.mark.parametrize(
    ("c", "u", "w"),
    [*((*NARROWER, w) for w in (0.0, 0.5, 1.0, 2.0, 4.0)), (*WIDER, 2.0), *((*EQUAL, w) for w in (2.0, 4.0))],
)


def exact(path: Path, prediction: Prediction) -> Denoiser:
    """The denoiser of N(m, s^2), which it reads in the Cond. The network is told t in float32: the grids below lie on
    numbers that float32 has."""

    def net(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        c = path.coeffs(time.double(), x.ndim)
        m, s = (cond.tokens[:, 0, i].reshape(-1, *(1,) * (x.ndim - 1)) for i in (0, 1))
        residual = (x - c.alpha * m) / ((c.alpha * s) ** 2 + c.sigma**2)
        return prediction.target(m + c.alpha * s**2 * residual, c.sigma * residual, c)

    return Denoiser(net, path, prediction, TimeInput(1))


def law(gaussian: tuple[float, float]) -> Cond:
    return Cond(torch.tensor([[gaussian]], dtype=torch.float64))


def guided(c: tuple[float, float], u: tuple[float, float], w: float, prediction: Prediction | None = None) -> Denoise:
    d = exact(PATH, prediction or X0())
    if w > 1:
        return classifier_free(d, law(c), law(u), w)
    return autoguidance(partial(d, cond=law(c)), partial(d, cond=law(u)), w)


def grid(n: int) -> Tensor:
    return torch.linspace(1, 0, n + 1, dtype=torch.float64)  # n a power of 2


# --- the formulas ----------------------------------------------------------------------------------------------------


def closed_form(c: tuple[float, float], u: tuple[float, float], w: float, stochastic: bool) -> tuple[float, float]:
    """Mean and variance, by the integrals above."""
    parts = [(w, *c), (1 - w, *u)]

    def h(nu: float) -> float:
        return math.prod((s * s + nu * nu) ** (weight / 2) for weight, _, s in parts)

    def drift(nu: float) -> float:
        return sum(weight * nu * m / (s * s + nu * nu) for weight, m, s in parts)

    def integral(f: Callable[[float], float]) -> float:
        return quad(f, 0, 1, epsabs=1e-12)[0] + quad(f, 1, math.inf, epsabs=1e-12)[0]

    if not stochastic:
        return h(0) * integral(lambda nu: drift(nu) / h(nu)), h(0) ** 2
    mean = h(0) ** 2 * integral(lambda nu: 2 * drift(nu) / h(nu) ** 2)
    return mean, h(0) ** 4 * integral(lambda nu: 2 * nu / h(nu) ** 4)


def tilted(c: tuple[float, float], u: tuple[float, float], w: float) -> tuple[float, float]:
    """Mean and variance of p_c^w p_u^(1 - w), which guidance is often said to sample."""
    precision = w / c[1] ** 2 + (1 - w) / u[1] ** 2
    return (w * c[0] / c[1] ** 2 + (1 - w) * u[0] / u[1] ** 2) / precision, 1 / precision


# --- what the samplers do: their maps are affine, so the law at the end is known without drawing from it -------------


def law_of_flow(denoise: Denoise, n: int, sampler: Callable[..., Tensor] = heun) -> Tensor:
    """Mean and variance at t = 0, from N(0, 1) at t = 1."""
    low, high = sampler(denoise, PATH, torch.tensor([0.0, 1.0], dtype=torch.float64), grid(n))
    return torch.stack([low, (high - low) ** 2])


def law_of_ddpm(denoise: Denoise, n: int) -> Tensor:
    """The same; a step is a x + b + c z, and three rows with known z tell a, b and c."""
    mean, var = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    z = noise_like(x, draws())
    for t, s in pairwise(grid(n)):
        y = ddpm(denoise, PATH, x, torch.stack([t, s]), generator=draws())
        a, c = y[1] - y[0], (y[2] - y[0]) / (z[2] - z[0])
        mean, var = a * mean + y[0] - c * z[0], a**2 * var + c**2
    return torch.stack([mean, var])


def draws() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]


def extrapolated(law_of: Callable[[Denoise, int], Tensor], denoise: Denoise, n: int, order: int) -> tuple[float, float]:
    """From n, 2 n and 4 n steps, with the error's first two powers taken out."""
    a, b, c = (law_of(denoise, k * n) for k in (1, 2, 4))
    p, q = 2**order, 2 ** (order + 1)
    ab, bc = (p * b - a) / (p - 1), (p * c - b) / (p - 1)
    mean, var = ((q * bc - ab) / (q - 1)).tolist()
    return mean, var


@CASES
def test_the_guided_flow(c: tuple[float, float], u: tuple[float, float], w: float) -> None:
    mean, var = extrapolated(law_of_flow, guided(c, u, w), 64, 2)
    expected = closed_form(c, u, w, stochastic=False)
    # Heun ends with a step of Euler's: an n^-3 log n is left in the variance, 3e-6 to 2e-5 of it
    assert (mean, var) == pytest.approx(expected, rel=1e-4)
    assert var == pytest.approx(c[1] ** (2 * w) * u[1] ** (2 - 2 * w), rel=1e-4)


@CASES
def test_the_guided_sde(c: tuple[float, float], u: tuple[float, float], w: float) -> None:
    mean, var = extrapolated(law_of_ddpm, guided(c, u, w), 64, 1)
    # an n^-2 log n is left in the variance: 1.5e-4, or 3e-4 of a large one
    assert (mean, var) == pytest.approx(closed_form(c, u, w, stochastic=True), rel=1e-3, abs=3e-4)


@pytest.mark.parametrize("prediction", [X0(), V()], ids=repr)
def test_weight_one_is_the_conditional_model(prediction: Prediction) -> None:
    d = exact(PATH, prediction)
    for denoise in (classifier_free(d, law(C), law(U), 1.0), guided(C, U, 1.0, prediction)):
        assert extrapolated(law_of_flow, denoise, 64, 2) == pytest.approx((C[0], C[1] ** 2), rel=1e-4)
        assert extrapolated(law_of_ddpm, denoise, 64, 1) == pytest.approx((C[0], C[1] ** 2), rel=1e-3)


def test_neither_samples_the_tilted_law() -> None:
    ode, sde, said = closed_form(C, U, 2.0, False), closed_form(C, U, 2.0, True), tilted(C, U, 2.0)
    assert ode == pytest.approx((2.081370, 0.25**2 / 1.44), abs=1e-6)
    assert sde == pytest.approx((1.847222, 0.100313), abs=1e-6)
    assert said == pytest.approx((1.690114, 0.136882), abs=1e-6)
    assert tilted(U, C, 2.0)[1] < 0  # where it is no law at all, the samplers still give one
    # with equal spreads all three are one Gaussian, moved: that is all that such a test would see
    for law_ in (closed_form(*EQUAL, 2.0, False), closed_form(*EQUAL, 2.0, True), tilted(*EQUAL, 2.0)):
        assert law_ == pytest.approx((2 * 1.5 + 0.5, 0.64), abs=1e-9)


def test_guidance_in_an_interval() -> None:
    """The flow's variance is the product of what each stretch of nu makes of it. Euler's steps, whose kinks are on
    the grid: guided from high (in) down to low (out)."""
    low, high, w = 0.25, 0.5, 3.0
    plain = partial(exact(PATH, X0()), cond=law(C))
    got = extrapolated(partial(law_of_flow, sampler=euler), interval(guided(C, U, w), plain, low, high), 64, 1)

    def growth(s: float) -> float:  # of H of one law, over the interval
        return (s**2 + (low / (1 - low)) ** 2) / (s**2 + (high / (1 - high)) ** 2)

    assert got[1] == pytest.approx(C[1] ** 2 * (growth(C[1]) / growth(U[1])) ** (w - 1), rel=1e-3)


# --- classifier guidance ---------------------------------------------------------------------------------------------

Y, NOISE = torch.tensor([0.7, -1.0, 2.0], dtype=torch.float64), 0.9  # y = x0 + NOISE z was seen


def log_prob(path: Path, x: Tensor, t: Tensor) -> Tensor:
    """log p(y | x_t) for x0 ~ U: x0 given x_t is a Gaussian, and y adds its noise to it."""
    c = path.coeffs(t, x.ndim)
    var_t = (c.alpha * U[1]) ** 2 + c.sigma**2
    mean, var = U[0] + c.alpha * U[1] ** 2 / var_t * (x - c.alpha * U[0]), (U[1] * c.sigma) ** 2 / var_t
    return -((Y - mean).square() / (2 * (var + NOISE**2))).sum(1)


@pytest.mark.parametrize("path", [RectifiedFlow(), CosineVP(), LinearVP(), VE(3.0)], ids=repr)
@pytest.mark.parametrize("t", [0.0, 0.125, 0.5, 0.96875])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_classifier_guidance_is_bayes_rule(path: Path, t: float, scale: float) -> None:
    """At scale 1 the exact denoiser of p(x0 | y), at others classifier-free guidance between that and p(x0)."""
    d, time = exact(path, Eps()), torch.tensor(t, dtype=torch.float64)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        answer = classifier(partial(d, cond=law(U)), path, partial(log_prob, path), scale)(x, time)
        s2 = 1 / (1 / U[1] ** 2 + 1 / NOISE**2)  # p(x0 | y), a dimension after the other
        m = s2 * (U[0] / U[1] ** 2 + Y / NOISE**2)
        each = [
            classifier_free(d, law((mean, math.sqrt(s2))), law(U), scale)(x[:, i : i + 1], time)
            for i, mean in enumerate(m.tolist())
        ]
    for name in ("x0", "eps"):
        expected = torch.cat([getattr(one, name) for one in each], dim=1)
        torch.testing.assert_close(getattr(answer, name), expected, rtol=1e-10, atol=1e-10)
