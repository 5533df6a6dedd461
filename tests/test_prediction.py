"""Every prediction on every path gives back the pair (x0, eps) that its target was made of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.paths import NCSN, VE, Coeffs, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow, SigmoidVP
from ldm.prediction import PREDICTIONS, X0, Eps, Flow, Karras, Prediction, Score, V

PATHS = [RectifiedFlow(), CosineVP(), LinearVP(), SigmoidVP(), VE(), NCSN(), DiscreteVP(),
         DiscreteVP(zero_terminal_snr=True)]  # fmt: skip
KINDS: list[Prediction] = [Eps(), X0(), V(), Flow(), Score(), Karras(0.5), Karras(1.0), Karras(2.5)]


def sample(
    path: Path, dtype=torch.float64, low: float = 0.01, high: float = 0.99
) -> tuple[Tensor, Tensor, Tensor, Coeffs]:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 50, 3, 4, generator=g, dtype=torch.float64).to(dtype).unbind()
    t = torch.linspace(low, high, 50, dtype=torch.float64).to(dtype)
    return x0, eps, path.mix(x0, eps, t), path.coeffs(t, 3)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_cycle(path: Path, kind: Prediction) -> None:
    x0, eps, x, c = sample(path)
    output = kind.target(x0, eps, c)
    # float64 has 1e-16; at t = 0.01 or 0.99 the algebra divides by as little as 1e-3, once or twice
    torch.testing.assert_close(kind.to_x0(x, output, c), x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(kind.to_eps(x, output, c), eps, rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("other", KINDS, ids=repr)
def test_any_output_says_the_same_in_every_other_language(path: Path, kind: Prediction, other: Prediction) -> None:
    """An output, right or wrong, told as another prediction and back again."""
    _, _, x, c = sample(path)
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    x0, eps = kind.to_x0(x, output, c), kind.to_eps(x, output, c)
    told = other.target(x0, eps, c)
    back = kind.target(other.to_x0(x, told, c), other.to_eps(x, told, c), c)
    scale = max(1.0, output.abs().max().item(), x0.abs().max().item(), eps.abs().max().item(), told.abs().max().item())
    assert (back - output).abs().max() < 1e-9 * scale


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_any_output_explains_x(path: Path, kind: Prediction) -> None:
    """alpha x0 + sigma eps = x_t whatever the network says: a sampler's step at s = t moves nothing."""
    _, _, x, c = sample(path)
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    back = c.alpha * kind.to_x0(x, output, c) + c.sigma * kind.to_eps(x, output, c)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [Eps(), V(), Flow(), Karras(0.5)], ids=repr)
def test_eps_keeps_its_digits_in_float32_near_the_data(kind: Prediction) -> None:
    x0, eps, x, c = sample(RectifiedFlow(), torch.float32, 1e-6, 1e-4)
    found = kind.to_eps(x, kind.target(x0, eps, c), c)
    # (x - alpha x0) / sigma would lose 1e-7 / 1e-6: a tenth
    torch.testing.assert_close(found, eps, rtol=0, atol=1e-5)


def test_flow_is_the_velocity_and_on_the_straight_path_eps_minus_x0() -> None:
    x0, eps, _, c = sample(RectifiedFlow())
    torch.testing.assert_close(Flow().target(x0, eps, c), eps - x0)
    t = torch.linspace(0.1, 0.9, 50, dtype=torch.float64)
    for path in PATHS[:3]:
        ahead, behind = path.mix(x0, eps, t + 1e-6), path.mix(x0, eps, t - 1e-6)
        # central differences: 1e-12 of curvature, 1e-16 / 1e-6 of rounding
        torch.testing.assert_close(
            Flow().target(x0, eps, path.coeffs(t, 3)), (ahead - behind) / 2e-6, rtol=0, atol=1e-7
        )


def test_score_is_the_gradient_of_the_log_density() -> None:
    x0, eps, x, c = sample(LinearVP())
    x = x.requires_grad_()
    log_p = -((x - c.alpha * x0) ** 2) / (2 * c.sigma**2)
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(Score().target(x0, eps, c), gradient)


def test_karras_at_alpha_one_is_edm() -> None:
    """Karras et al. 2022, table 1: c_skip, c_out, c_in."""
    d, x0, eps = 0.5, torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)[:, None]
    c = Coeffs(torch.ones_like(sigma), sigma, torch.zeros_like(sigma), torch.ones_like(sigma))
    x, output, total = x0 + sigma * eps, torch.randn(9, 4, dtype=torch.float64), sigma**2 + d**2
    torch.testing.assert_close(Karras(d).to_x0(x, output, c), d**2 / total * x + sigma * d / total.sqrt() * output)
    torch.testing.assert_close(torch.as_tensor(Karras(d).scale_input(c)), 1 / total.sqrt())


def test_karras_of_unit_data_is_minus_v_where_variance_is_preserved() -> None:
    x0, eps, _, c = sample(CosineVP())
    torch.testing.assert_close(Karras(1.0).target(x0, eps, c), -V().target(x0, eps, c))


def test_karras_input_and_target_have_unit_variance() -> None:
    g, d = torch.Generator().manual_seed(0), 0.3
    x0 = d * torch.randn(5, 100_000, generator=g, dtype=torch.float64)
    eps = torch.randn(5, 100_000, generator=g, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    c = RectifiedFlow().coeffs(t, 2)
    x = RectifiedFlow().mix(x0, eps, t)
    for values in (Karras(d).scale_input(c) * x, Karras(d).target(x0, eps, c)):
        # the standard error of a standard deviation is 1 / sqrt(2 n) = 0.0022
        torch.testing.assert_close(values.std(1), torch.ones(5, dtype=torch.float64), rtol=0, atol=4 / math.sqrt(2e5))


def test_x0_where_there_is_no_noise() -> None:
    x = torch.randn(2, 3)
    c = RectifiedFlow().coeffs(torch.tensor([0.0, 0.5]), 2)
    eps = X0().to_eps(x, torch.zeros(2, 3), c)
    torch.testing.assert_close(eps, torch.stack([torch.zeros(3), x[1] / 0.5]))


def test_names() -> None:
    assert {
        "epsilon": Eps, "sample": X0, "v_prediction": V, "flow_prediction": Flow, "score": Score, "karras": Karras,
    } == PREDICTIONS  # fmt: skip
    assert all(isinstance(make(), Prediction) for make in PREDICTIONS.values())
    with pytest.raises(ValueError, match="sigma_data"):
        Karras(0.0)
