"""The SDE and Langevin samplers (``sampling.dynamics``) against their formulas, the papers' algorithms and diffusers'
ScoreSdeVeScheduler. Which laws they find is in test_truth.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler
from torch import Tensor

from ldm.denoiser import Denoised
from ldm.paths import VE, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow, SigmoidVP
from ldm.sampling import annealed_langevin, euler, euler_maruyama, langevin, noise_like, predictor_corrector, time_grid

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SHORT = torch.tensor([0.9, 0.6, 0.35], dtype=torch.float64)


def seed(n: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def eps_of(x: Tensor, t: Tensor) -> Tensor:
    """A network: not linear, and no denoiser of anything."""
    return torch.tanh(x + t) + 0.3 * x


def denoiser(path: Path, eps: Callable[[Tensor, Tensor], Tensor] = eps_of) -> Callable[[Tensor, Tensor], Denoised]:
    def denoise(x: Tensor, t: Tensor) -> Denoised:
        e, alpha, sigma = eps(x, t), path.alpha(t), path.sigma(t)
        if alpha == 0:  # then x is the noise, and x0 anything
            return Denoised(e, x / sigma, e)
        return Denoised((x - sigma * e) / alpha, e, e)

    return denoise


def normal_data(path: Path) -> Callable[[Tensor, Tensor], Denoised]:
    """E[x0 | x_t] and E[eps | x_t] for data N(0, 1)."""

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return Denoised(alpha / (alpha**2 + sigma**2) * x, sigma / (alpha**2 + sigma**2) * x, x)

    return denoise


def asked(denoise: Callable[[Tensor, Tensor], Denoised], calls: list[float]) -> Callable[[Tensor, Tensor], Denoised]:
    def ask(x: Tensor, t: Tensor) -> Denoised:
        calls.append(t.item())
        return denoise(x, t)

    return ask


# --- Euler-Maruyama ---------------------------------------------------------------------------------------------------


def test_euler_maruyama_is_the_reverse_sde_of_the_paper() -> None:
    """dx = [f - g^2 score] dt + g dW with f = -beta x / 2, g^2 = beta (Song et al. 2021, eq. 6 and 11)."""
    path, g, x = LinearVP(), seed(), X
    for t, s in pairwise(SHORT):
        beta, score = 0.1 + t * 19.9, -eps_of(x, t) / path.sigma(t)
        x = x + (t - s) * (beta * x / 2 + beta * score) + (beta * (t - s)).sqrt() * noise_like(x, g)
    torch.testing.assert_close(euler_maruyama(denoiser(path), path, X, SHORT, generator=seed()), x)


def test_euler_maruyama_with_any_g() -> None:
    path, g, x = RectifiedFlow(), seed(), X
    for t, s in pairwise(SHORT):
        e = eps_of(x, t)
        u, score, g2 = e - (x - t * e) / (1 - t), -e / t, (1 + t) ** 2
        x = x - (t - s) * (u - g2 / 2 * score) + (g2 * (t - s)).sqrt() * noise_like(x, g)
    denoise = denoiser(path)
    torch.testing.assert_close(euler_maruyama(denoise, path, X, SHORT, g=lambda t: 1 + t, generator=seed()), x)
    constant = euler_maruyama(denoise, path, X, SHORT, g=2.0, generator=seed())
    torch.testing.assert_close(constant, euler_maruyama(denoise, path, X, SHORT, g=lambda t: 2.0, generator=seed()))


def test_euler_maruyama_without_noise_is_euler_in_t() -> None:
    path, times = RectifiedFlow(), time_grid(RectifiedFlow(), 6)  # from alpha = 0 to sigma = 0
    ours = euler_maruyama(denoiser(path), path, X, times, g=0.0)
    torch.testing.assert_close(ours, euler(denoiser(path), path, X, times))
    path, x = CosineVP(), X
    for t, s in pairwise(SHORT):
        d, (dalpha, dsigma) = denoiser(path)(x, t), path.rates(t)
        x = x + (s - t) * (dalpha * d.x0 + dsigma * d.eps)
    torch.testing.assert_close(euler_maruyama(denoiser(path), path, X, SHORT, g=0), x)


@pytest.mark.parametrize("path", [LinearVP(), DiscreteVP(), VE(20.0)], ids=repr)
def test_the_last_noise_is_left_out_where_no_noise_is_left(path: Path) -> None:
    times = torch.tensor([0.5, 0.0], dtype=torch.float64)  # rates without bound at 0 are not asked for
    g = seed()
    end = euler_maruyama(denoiser(path), path, X, times, generator=g)
    torch.testing.assert_close(end, denoiser(path)(X, times[0]).x0)
    assert torch.equal(g.get_state(), seed().get_state())


def test_euler_maruyama_refuses_what_has_no_bound_before_it_asks_the_network() -> None:
    ones = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    calls: list[float] = []

    def run(path: Path, **options: Any) -> Tensor:
        return euler_maruyama(asked(denoiser(path), calls), path, X, ones, **options)

    for path in (RectifiedFlow(), CosineVP(), SigmoidVP(), DiscreteVP(zero_terminal_snr=True)):
        with pytest.raises(
            ValueError, match=rf"g has no bound at t = 1, where {type(path).__name__} has alpha = 0: sta"
        ):
            run(path)
    with pytest.raises(ValueError, match="SigmoidVP has a rate without bound at t = 1: start the grid below"):
        run(SigmoidVP(), g=1.0)
    for g in (-1.0, math.nan, math.inf, lambda t: t - 1.5):
        with pytest.raises(ValueError, match=r"g is .* at t = \S+; expected a number of at least 0"):
            run(RectifiedFlow(), g=g)
    assert calls == []
    for path in (RectifiedFlow(), CosineVP(), DiscreteVP(zero_terminal_snr=True)):
        assert run(path, g=1.0).isfinite().all()


# --- predictor and corrector ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 10, 25])
@pytest.mark.parametrize("corrections", [0, 1, 2])
def test_predictor_and_corrector_are_those_of_diffusers(n: int, corrections: int) -> None:
    """One row, so that its means of norms over the batch are the row's own; in the order of the paper's algorithm 1
    (its pipeline corrects first). It names the steps by index through a float: the test sees that none is off."""
    stock = ScoreSdeVeScheduler(num_train_timesteps=n, sigma_min=0.02, sigma_max=30.0, snr=0.16)
    stock.set_timesteps(n)
    stock.set_sigmas(n)
    sigmas, path = stock.discrete_sigmas.double().flip(0), VE(30.0)
    assert torch.equal((torch.as_tensor(stock.timesteps) * (n - 1)).long(), torch.arange(n).flip(0))
    x = start = 30.0 * torch.randn(1, 3, 8, 8, generator=seed(0))
    g = seed()

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return -eps_of(x / 10, sigma / 30.0) / sigma.item()

    for i, t in enumerate(torch.as_tensor(stock.timesteps)):
        step = stock.step_pred(score(x, sigmas[i]), t, x, generator=g)
        x = step.prev_sample
        if i + 1 < n:
            for _ in range(corrections):
                x = stock.step_correct(score(x, sigmas[i + 1]), x, generator=g).prev_sample
    expected = step.prev_sample_mean  # as its pipeline returns, the last step without noise
    times = torch.cat([sigmas / 30.0, sigmas.new_zeros(1)])
    times[0] = 1.0
    options: dict[str, Any] = dict(corrector_steps=corrections, norms="row", generator=seed())
    ours = predictor_corrector(denoiser(path, lambda x, t: eps_of(x / 10, t)), path, start, times, **options)
    assert ours.dtype == torch.float32
    # float32, from values near 100: stock keeps its sigmas in it
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * start.abs().max().item())


@pytest.mark.parametrize("norms", ["expected", "row"])
def test_predictor_and_corrector_of_the_chain(norms: str) -> None:
    """Song et al. 2021, algorithms 3 and 5: (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z, then steps of
    2 alpha_i (r |z| / |score|)^2 with alpha_i = 1 - beta_i."""
    path, g, x, r = DiscreteVP(torch.linspace(0.01, 0.2, 6)), seed(), X, 0.2
    times = torch.linspace(1, 0, 7, dtype=torch.float64)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -eps_of(x, t) / path.sigma(t)

    for i in range(5, 0, -1):  # the chain's own index, from 0
        t, s, beta = times[5 - i], times[6 - i], path.betas[i]
        x = (2 - (1 - beta).sqrt()) * x + beta * score(x, t) + beta.sqrt() * noise_like(x, g)
        for _ in range(2):
            grad, z = score(x, s), noise_like(x, g)
            ratio = z.norm(dim=1, keepdim=True) / grad.norm(dim=1, keepdim=True) if norms == "row" else path.sigma(s)
            e = (2 * (1 - path.betas[i - 1]) * (r * ratio) ** 2).clamp(max=path.sigma(s) ** 2)
            x = x + e * grad + (2 * e).sqrt() * z
    expected = denoiser(path)(x, times[5]).x0
    options: dict[str, Any] = dict(corrector_steps=2, snr=r, norms=norms)
    ours = predictor_corrector(denoiser(path), path, X, times, generator=seed(), **options)
    torch.testing.assert_close(ours, expected)


def test_what_the_norms_do_in_few_dimensions_and_in_many() -> None:
    """Data N(0, 1) and sigma = 1, so that p_s is N(0, 2). In the plane, small steps ~ |z|^2 / |score|^2 settle at
    |x|^2 sqrt(p_s), whose variance is 8; in thousands of dimensions both steps are the same, up to the norms' own
    scatter."""
    path = VE(1.0)
    times = torch.tensor([1.0, 0.999], dtype=torch.float64)

    def run(x: Tensor, norms: str, corrections: int) -> Tensor:
        options: dict[str, Any] = dict(corrector_steps=corrections, snr=0.1, norms=norms)
        return predictor_corrector(normal_data(path), path, x, times, generator=seed(), **options)

    x = math.sqrt(2) * torch.randn(4000, 2, generator=seed(1), dtype=torch.float64)
    error = 2 / math.sqrt(4000)  # of a variance of 2 over 8000 numbers, (x^2 has variance 8)
    assert abs(run(x, "expected", 200).var().item() - 2) < 4.5 * error
    assert 7 < run(x, "row", 400).var().item() < 8.2  # not all steps are small
    x = 40 * torch.randn(2, 20_000, generator=seed(1), dtype=torch.float64)  # far out, where eps is known from x
    path = VE(40.0)
    torch.testing.assert_close(run(x, "row", 5), run(x, "expected", 5), rtol=0, atol=0.02 * 40)


def test_a_row_without_score_stays_finite() -> None:
    path = VE(1.0)
    times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    flat = predictor_corrector(denoiser(path, lambda x, t: 0 * x), path, X, times, norms="row", generator=seed())
    assert flat.isfinite().all() and not torch.equal(flat, X)


def test_predictor_corrector_at_the_ends_of_the_path() -> None:
    path, calls = RectifiedFlow(), []
    times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    end = predictor_corrector(asked(denoiser(path), calls), path, X, times, generator=seed())
    assert calls == [1.0, 0.5, 0.5]  # predictor, corrector, and the last step's answer
    d = denoiser(path)(X, times[0])
    x, z = 0.5 * d.x0 + 0.5 * d.eps, noise_like(X, seed())  # DDIM's, from no signal
    step = 2 * 0.5**2 * (0.16 * 0.5) ** 2
    x = x - step * eps_of(x, times[1]) / 0.5 + math.sqrt(2 * step) * z
    torch.testing.assert_close(end, denoiser(path)(x, times[1]).x0)


# --- Langevin ---------------------------------------------------------------------------------------------------------


def test_langevin_step_and_the_law_it_settles_at() -> None:
    path, t, e = RectifiedFlow(), torch.tensor(0.4, dtype=torch.float64), 0.05
    z = noise_like(X, seed())
    one = langevin(denoiser(path), path, X, 0.4, steps=1, step_size=e, generator=seed())
    torch.testing.assert_close(one, X - e * eps_of(X, t) / 0.4 + math.sqrt(2 * e) * z)
    assert torch.equal(langevin(denoiser(path), path, X, t, steps=0, step_size=e), X)
    # on N(0, V) the step is x <- (1 - e / V) x + sqrt(2 e) z, whose variance is V / (1 - e / (2 V)), to the digit
    variance, e, rows = 0.6**2 + 0.4**2, 0.3, 40_000
    x = langevin(normal_data(path), path, torch.zeros(rows, 1).double(), t, steps=40, step_size=e, generator=seed())
    settled = variance / (1 - e / (2 * variance))
    assert abs(x.var().item() - settled) < 4.5 * settled * math.sqrt(2 / rows) and settled > 1.3 * variance


def test_annealed_langevin_is_ncsn() -> None:
    """Song & Ermon 2019, algorithm 1, line by line, and the answer at the end."""
    path, g, x, epsilon = VE(10.0), seed(), X, 2e-3
    sigmas = torch.tensor([10.0, 3.0, 0.5], dtype=torch.float64)
    for sigma in sigmas:
        alpha_i = epsilon * sigma**2 / sigmas[-1] ** 2
        for _ in range(4):
            x = x + alpha_i / 2 * (-eps_of(x, sigma / 10) / sigma) + alpha_i.sqrt() * noise_like(x, g)
    options: dict[str, Any] = dict(steps=4, step_size=epsilon)
    above = annealed_langevin(denoiser(path), path, X, sigmas / 10, generator=seed(), **options)
    torch.testing.assert_close(above, x)  # a grid that ends above: a draw from the law there
    times, seen_at, calls = torch.cat([sigmas / 10, sigmas.new_zeros(1)]), [], []
    end = annealed_langevin(
        asked(denoiser(path), calls), path, X, times, generator=seed(), **options,
        callback=lambda i, t, x, d: seen_at.append((i, t.item())),
    )  # fmt: skip
    torch.testing.assert_close(end, denoiser(path)(x, times[2]).x0)
    assert len(calls) == 3 * 4 + 1 and seen_at == list(enumerate(times[:3].tolist()))


def test_annealed_langevin_is_the_same_in_x_over_alpha_on_every_path() -> None:
    nu = torch.tensor([4.0, 1.0, 0.2], dtype=torch.float64)

    def run(path: Path, steps: int = 3) -> Tensor:
        def eps(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = path.alpha(t), path.sigma(t)
            return eps_of(x / alpha, sigma / alpha)

        times = torch.cat([path.time_at(-2 * nu.log()), nu.new_zeros(1)])
        start = X * path.alpha(times[0])
        return annealed_langevin(denoiser(path, eps), path, start, times, steps=steps, step_size=0.01, generator=seed())

    for path in (RectifiedFlow(), CosineVP(), LinearVP(), DiscreteVP()):
        torch.testing.assert_close(run(path), run(VE(10.0)))


def test_annealed_langevin_by_default_and_from_no_signal() -> None:
    path = VE(1.0)
    times = torch.tensor([0.1, 0.01, 0.0], dtype=torch.float64)
    given = annealed_langevin(denoiser(path), path, X, times, steps=2, step_size=2e-5, generator=seed())
    torch.testing.assert_close(annealed_langevin(denoiser(path), path, X, times, steps=2, generator=seed()), given)
    path, times = RectifiedFlow(), torch.tensor([1.0, 0.5, 0.3], dtype=torch.float64)
    d = denoiser(path)(X, times[0])
    below = annealed_langevin(denoiser(path), path, 0.5 * d.x0 + 0.5 * d.eps, times[1:], steps=2, generator=seed())
    torch.testing.assert_close(annealed_langevin(denoiser(path), path, X, times, steps=2, generator=seed()), below)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda d, p: langevin(d, p, X, 0.0, steps=1, step_size=0.1), "t = 0 has sigma = 0, where there is no score"),
        (lambda d, p: langevin(d, p, X, 1.5, steps=1, step_size=0.1), r"t is 1\.5; expected one time in \[0, 1\]"),
        (lambda d, p: langevin(d, p, X, SHORT, steps=1, step_size=0.1), "expected one time"),
        (lambda d, p: langevin(d, p, X, 0.5, steps=-1, step_size=0.1), "steps is -1; expected a whole number"),
        (lambda d, p: langevin(d, p, X, 0.5, steps=1, step_size=0.0), r"step_size is 0\.0; expected a number above 0"),
        (lambda d, p: annealed_langevin(d, p, X, SHORT, steps=0), "steps is 0; expected a whole number of at least 1"),
        (lambda d, p: annealed_langevin(d, p, X, SHORT, step_size=-0.1), r"step_size is -0\.1"),
        (lambda d, p: predictor_corrector(d, p, X, SHORT, corrector_steps=-1), "corrector_steps is -1"),
        (lambda d, p: predictor_corrector(d, p, X, SHORT, snr=0.0), r"snr is 0\.0; expected a number above 0"),
        (lambda d, p: predictor_corrector(d, p, X, SHORT, norms="batch"), "'batch' is not one of expected, row"),
        (lambda d, p: euler_maruyama(d, p, X, SHORT.flip(0)), "times must fall"),
    ],
)
def test_refusals(run: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(denoiser(RectifiedFlow()), RectifiedFlow())


def test_langevin_rows_dtype_and_callback() -> None:
    path, seen_at = RectifiedFlow(), []
    options: dict[str, Any] = dict(steps=4, step_size=0.01)
    together = langevin(denoiser(path), path, X, 0.5, generator=[seed(i) for i in range(3)], **options)
    alone = langevin(denoiser(path), path, X[1:2], 0.5, generator=[seed(1)], **options)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-14)
    assert together.dtype == torch.float64
    assert langevin(denoiser(path), path, X.bfloat16(), 0.5, **options).dtype == torch.float32

    def add(i: int, t: Tensor, x: Tensor, d: Denoised) -> Tensor | None:
        seen_at.append((i, t.item()))
        return x + 7 if i == 3 else None

    moved = langevin(denoiser(path), path, X, 0.5, generator=[seed(i) for i in range(3)], callback=add, **options)
    torch.testing.assert_close(moved, together + 7)
    assert seen_at == [(i, 0.5) for i in range(4)]
