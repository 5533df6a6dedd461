"""The density of the probability-flow ODE against mixtures of Gaussians, whose density is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.denoiser import Denoised, Denoiser
from ldm.likelihood import Likelihood, divergence, log_likelihood
from ldm.paths import NCSN, VE, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow, SigmoidVP
from ldm.prediction import PREDICTIONS, Eps, Flow, Score, V
from tests.gmm import Mixture, three_modes

Denoise = Callable[[Tensor, Tensor], Denoised]
PATHS: dict[str, Path] = {
    "rectified_flow": RectifiedFlow(),
    "cosine": CosineVP(),
    "sigmoid": SigmoidVP(),
    "linear": LinearVP(),
    "ve": VE(),
    "ncsn": NCSN(),
    "chain": DiscreteVP(),
    "zero_snr": DiscreteVP(zero_terminal_snr=True),
    "short": DiscreteVP([0.1, 0.2, 0.4, 0.9]),
}
REACHES_NOISE = ("rectified_flow", "cosine", "sigmoid", "zero_snr")
PLANE = three_modes()
NONE = Cond(torch.zeros(1, 1, 1))


def points() -> Tensor:
    """(16, 2): from the law, between its modes, and far out, down to exp(-200)."""
    far = torch.tensor([[0.0, 0.0], [3.0, 3.0], [-4.0, 0.5], [1.0, -4.0], [-1.5, -2.0], [0.2, 0.6]])
    return torch.cat([PLANE.sample(10, torch.Generator().manual_seed(0)), far.double()])


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


@pytest.mark.parametrize("name", PATHS)
def test_density_of_a_mixture(name: str) -> None:
    path, x = PATHS[name], points()
    end = PLANE.marginal(path, at(1.0))
    found = log_likelihood(PLANE.denoise(path), path, x, log_prior=end.log_prob, atol=1e-7, rtol=1e-7)
    truth = PLANE.log_prob(x)
    # asked for: 1e-3 nats; the tolerance of the solver, over some 50 steps, promises 1e-4 where log p is -200
    torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.bits_per_dim, -truth / (2 * math.log(2)), rtol=0, atol=1e-4)
    assert found.latent.shape == x.shape and torch.equal(found.stderr, torch.zeros_like(truth))
    if name in REACHES_NOISE:  # what samplers start from is then the truth
        plain = log_likelihood(PLANE.denoise(path), path, x, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(plain.log_prob, truth, rtol=0, atol=1e-4)


def test_default_tolerance_is_enough() -> None:
    for path in (RectifiedFlow(), CosineVP()):
        found = log_likelihood(PLANE.denoise(path), path, points())
        torch.testing.assert_close(found.log_prob, PLANE.log_prob(points()), rtol=0, atol=1e-3)


def test_default_prior_is_what_samplers_start_from() -> None:
    """One Gaussian, N(m, s^2): the ODE keeps the quantile, so the answer for the wrong prior is known, too."""
    mean, std = 0.7, 0.4
    law, x = Mixture(at(1.0)[None], at(mean)[None, None], at(std**2)[None, None, None]), torch.randn(5, 1).double()
    for name in ("linear", "ve", "ncsn", "chain", "short"):
        path = PATHS[name]
        a, s = path.alpha(at(1.0)), path.sigma(at(1.0))
        spread = torch.sqrt((a * std) ** 2 + s**2)
        latent = a * mean + spread / std * (x - mean)
        truth = torch.distributions.Normal(0.0, torch.hypot(a, s)).log_prob(latent) + torch.log(spread / std)
        found = log_likelihood(law.denoise(path), path, x, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(found.latent, latent, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.log_prob, truth[:, 0], rtol=0, atol=1e-5)


# --- pictures and probes ---------------------------------------------------------------------------------------------

SHAPE = (3, 4, 4)


def pictures() -> tuple[Mixture, Tensor]:
    """Two modes with full covariances in 48 dimensions, and six rows of it."""
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(2, 48, 48, generator=g, dtype=torch.float64) / 7
    law = Mixture(
        torch.tensor([0.4, 0.6]), torch.randn(2, 48, generator=g), mix @ mix.mT + 0.1 * torch.eye(48).double()
    )
    return law, law.sample(6, g).reshape(6, *SHAPE)


def pictured(law: Mixture, path: Path) -> Denoise:
    flat = law.denoise(path)

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        answer = flat(x.flatten(1), t)
        return Denoised(*(v.reshape(x.shape) for v in answer[:3]))

    return denoise


def test_exact_trace_for_small_pictures() -> None:
    law, x = pictures()
    found = log_likelihood(pictured(law, CosineVP()), CosineVP(), x)
    truth = law.log_prob(x.flatten(1))
    torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=1e-3)  # the solver keeps 1e-6 a dimension
    torch.testing.assert_close(found.bits_per_dim, -truth / (48 * math.log(2)), rtol=0, atol=1e-4)


def test_probes_are_right_on_average_and_know_their_error() -> None:
    law, x = pictures()
    truth = law.log_prob(x.flatten(1))

    def run(probes: int, seed: int) -> Likelihood:
        g = torch.Generator().manual_seed(seed)
        return log_likelihood(
            pictured(law, CosineVP()), CosineVP(), x, probes=probes, generator=g, atol=1e-4, rtol=1e-4
        )

    few, many = run(4, 2), run(64, 3)
    for found in (few, many):
        assert (found.stderr > 0.01).all()
    # Student's t with 3 degrees of freedom has heavy tails: the six rows of `few` are judged by their mean
    assert ((many.log_prob - truth).abs() < 4 * many.stderr).all()
    assert (few.log_prob - truth).mean().abs() < 4 * few.stderr.square().sum().sqrt() / 6
    # 1 / sqrt(probes): 16 times as many, a quarter of the error; 6 rows with 3 degrees of freedom tell it to 25 %
    ratio = few.stderr.square().mean().sqrt() / many.stderr.square().mean().sqrt()
    assert 2.8 < ratio < 5.6, ratio
    assert run(1, 4).stderr.isnan().all()


def test_rows_have_their_own_probes() -> None:
    law, x = pictures()

    def run(rows: slice) -> Tensor:
        g = [torch.Generator().manual_seed(i) for i in range(6)][rows]
        return log_likelihood(pictured(law, path), path, x[rows], probes=2, generator=g).log_prob

    path = CosineVP()
    # equal but for the steps that the solver chooses, which keep 1e-6 a dimension
    torch.testing.assert_close(run(slice(2, 4)), run(slice(0, 6))[2:4], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="2 generators for 6 rows"):
        log_likelihood(pictured(law, path), path, x, probes=1, generator=[torch.Generator(), torch.Generator()])


def test_divergence_is_the_trace_of_the_jacobian() -> None:
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def f(row: Tensor) -> Tensor:
        return torch.tanh(weight @ row.flatten()).reshape(2, 3) * row

    jacobian = torch.func.vmap(torch.func.jacrev(f))(x).reshape(4, 6, 6)
    inside = x.clone().requires_grad_()
    made = torch.func.vmap(f)(inside)
    torch.testing.assert_close(divergence(made, inside)[:, 0], jacobian.diagonal(dim1=1, dim2=2).sum(1))
    v = torch.randn(4, 5, 2, 3, dtype=torch.float64)
    expected = torch.einsum("bni,bij,bnj->bn", v.flatten(2), jacobian, v.flatten(2))
    torch.testing.assert_close(divergence(made, inside, v), expected)


# --- networks --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Knows nothing, but is smooth; x (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.layers(torch.cat([x, time.to(x.dtype)[:, None] / 1000], 1))


@pytest.mark.parametrize(("prediction", "path"), [(Flow(), RectifiedFlow()), (V(), CosineVP()), (V(), VE(4.0))])
def test_density_of_any_network_integrates_to_one(prediction, path: Path) -> None:
    denoiser = Denoiser(Net().double(), path, prediction)
    x = torch.linspace(-12, 12, 1201, dtype=torch.float64)[:, None]
    found = log_likelihood(lambda x, t: denoiser(x, t, NONE), path, x)
    density = found.log_prob.exp()
    assert density[[0, -1]].max() < 1e-6  # the range holds it all
    torch.testing.assert_close(torch.trapezoid(density, x[:, 0]), at(1.0), rtol=0, atol=1e-4)
    assert all(p.grad is None for p in denoiser.parameters())


def test_a_float32_network_under_no_grad() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 3, padding=1)
    denoiser = Denoiser(lambda x, time, cond: torch.tanh(net(x)), RectifiedFlow(), Flow())
    x = torch.randn(2, *SHAPE)
    before = x.clone()

    def run(x: Tensor, **options) -> Likelihood:
        with torch.no_grad():
            return log_likelihood(lambda x, t: denoiser(x, t, NONE), RectifiedFlow(), x, **options)

    low = run(x)
    assert low.latent.dtype == torch.float32 and low.log_prob.dtype == torch.float64 and torch.equal(x, before)
    assert not low.log_prob.requires_grad and net.weight.grad is None
    net.double()
    high = run(x.double())
    # 48 dimensions to 1e-6 each, by the solver and by float32
    torch.testing.assert_close(low.log_prob, high.log_prob, rtol=0, atol=1e-3)
    torch.testing.assert_close(run(x.double(), bins=256).bits_per_dim, high.bits_per_dim + 7)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("path", [RectifiedFlow(), LinearVP(), VE()], ids=repr)
def test_predictions_that_say_nothing_at_an_end_start_beside_it(path: Path, name: str) -> None:
    """The exact answer, told as each kind of output; t_min and t_max where that kind has none."""
    denoiser, best = Denoiser(nn.Identity(), path, PREDICTIONS[name]()), PLANE.denoise(path)

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        answer = best(x, t)
        output = denoiser.prediction.target(answer.x0, answer.eps, path.coeffs(t, 2))
        return denoiser.interpret(x, t, output)

    x, low = points(), at(0.0 if name in ("epsilon", "v_prediction", "karras") else 1e-4)
    high = at(1.0 if path.alpha(at(1.0)) > 0 or not denoiser.prediction.needs_signal else 0.99)
    end = PLANE.marginal(path, high)
    found = log_likelihood(
        denoise, path, x, log_prior=end.log_prob, t_min=low.item(), t_max=high.item(), atol=1e-7, rtol=1e-7
    )
    torch.testing.assert_close(found.log_prob, PLANE.marginal(path, low).log_prob(x), rtol=0, atol=1e-3)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(probes=0), "probes is 0"),
        (dict(t_min=0.5, t_max=0.5), "t_min is 0.5 and t_max 0.5"),
        (dict(t_min=-0.1), "t_min"),
        (dict(t_max=1.1), "t_max"),
        (dict(bins=1), "bins is 1"),
        (dict(log_prior=lambda x: x), r"log_prior gave \(16, 2\)"),
    ],
)
def test_bad_options_are_named(options: dict, says: str) -> None:
    path = RectifiedFlow()
    with pytest.raises(ValueError, match=says):
        log_likelihood(PLANE.denoise(path), path, points(), **options)


def test_what_cannot_be_integrated_is_named() -> None:
    path, best = RectifiedFlow(), PLANE.denoise(RectifiedFlow())
    with pytest.raises(ValueError, match="without gradient"):
        log_likelihood(torch.no_grad()(best), path, points())

    def broken(x: Tensor, t: Tensor) -> Denoised:
        return Denoised(x / 0 if 0 < t < 0.7 else x, x, x)

    with pytest.raises(ValueError, match="cannot be followed from t = 0"):
        log_likelihood(broken, path, points())
    eps = Denoiser(lambda x, time, cond: torch.tanh(x), path, Eps())
    with pytest.raises(ValueError, match="alpha = 0"):
        log_likelihood(lambda x, t: eps(x, t, NONE), path, points())
    with pytest.raises(ValueError, match=r"not finite.*t_max below 1"):
        log_likelihood(lambda x, t: eps.interpret(x, t, torch.tanh(x)), path, points())
    score = Denoiser(lambda x, time, cond: -x / time[:, None], VE(), Score())  # has no bound at t = 0
    with pytest.raises(ValueError, match=r"not finite.*t_min above 0"):
        log_likelihood(lambda x, t: score(x, t, NONE), VE(), points())
