"""Each kind of guidance against its formula and, where there is one, diffusers' own; and that they compose.

What the guided sampler's law is: ``test_guidance_truth``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoised, Denoiser, TimeInput
from ldm.guidance import (
    GUIDANCE,
    apg,
    autoguidance,
    classifier,
    classifier_free,
    dynamic_thresholding,
    interval,
    sigma_interval,
)
from ldm.paths import VE, CosineVP, DiscreteVP, LinearVP, RectifiedFlow
from ldm.prediction import X0, Eps, Flow, Karras, V
from ldm.sampling import ddpm, time_grid

X = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
T = torch.tensor(0.6, dtype=torch.float64)
COND = Cond(torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1))
NULL = Cond(torch.full((1, 1, 1), 0.1))


class Counted:
    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.rows.append(len(x))
        told = cond.tokens.view(-1, 1, 1, 1)
        return torch.tanh(x * told) + told + time.view(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("prediction", [Flow(), V(), Karras(0.5)], ids=repr)
@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("one_batch", [True, False])
def test_guided_output(prediction, rescale: float, one_batch: bool) -> None:
    net = Counted()
    d = Denoiser(net, RectifiedFlow(), prediction)
    with_, without = d(X, T, COND), d(X, T, NULL)
    net.rows.clear()
    answer = classifier_free(d, COND, NULL, 4.5, rescale=rescale, one_batch=one_batch)(X, T)
    assert net.rows == ([6] if one_batch else [3, 3])
    output = without.output + 4.5 * (with_.output - without.output)
    expected = rescale_noise_cfg(output, with_.output, rescale) if rescale else output
    torch.testing.assert_close(answer.output, expected)
    c = d.path.coeffs(T, 4)
    torch.testing.assert_close(answer.x0, d.prediction.to_x0(X, expected, c))
    torch.testing.assert_close(answer.eps, d.prediction.to_eps(X, expected, c))


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.0])
def test_without_guidance_the_network_is_asked_once(scale: float) -> None:
    net = Counted()
    d = Denoiser(net, RectifiedFlow(), Flow())
    answer = classifier_free(d, COND, NULL, scale, rescale=0.7)(X, T)
    assert net.rows == [3] and torch.equal(answer.output, d(X, T, COND).output)


def test_full_rescale_has_the_spread_of_the_conditional_output() -> None:
    d = Denoiser(Counted(), RectifiedFlow(), Flow())
    answer = classifier_free(d, COND, NULL, 9.0, rescale=1.0)(X, T)
    torch.testing.assert_close(answer.output.std((1, 2, 3)), d(X, T, COND).output.std((1, 2, 3)))


def tie(denoiser: Denoiser, cond: Cond):
    return partial(denoiser, cond=cond)


def consistent(answer: Denoised, x_t: Tensor, t: Tensor, path) -> None:
    """x_t is still alpha x0 + sigma eps."""
    c = path.coeffs(t, x_t.ndim)
    torch.testing.assert_close((c.alpha * answer.x0 + c.sigma * answer.eps).to(x_t.dtype), x_t, rtol=1e-5, atol=1e-5)


# --- autoguidance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.4, 1.0, 3.0])
def test_autoguidance_mixes_with_the_weights_as_they_are(scale: float) -> None:
    strong = Denoiser(Counted(), RectifiedFlow(), Flow())
    weak = Denoiser(lambda x, time, cond: x.sin(), RectifiedFlow(), X0())  # another network, of another prediction
    a, b = strong(X, T, COND), weak(X, T, NULL)
    answer = autoguidance(tie(strong, COND), tie(weak, NULL), scale)(X, T)
    torch.testing.assert_close(answer.x0, scale * a.x0 + (1 - scale) * b.x0)
    torch.testing.assert_close(answer.eps, scale * a.eps + (1 - scale) * b.eps)
    consistent(answer, X, T, strong.path)


def test_autoguidance_away_from_the_unconditional_model_is_classifier_free() -> None:
    d = Denoiser(Counted(), CosineVP(), V())
    expected = classifier_free(d, COND, NULL, 4.5)(X, T)
    torch.testing.assert_close(autoguidance(tie(d, COND), tie(d, NULL), 4.5)(X, T)[:3], expected[:3])


def test_autoguidance_of_two_guided_models() -> None:
    d = Denoiser(Counted(), CosineVP(), Eps())
    e = Denoiser(lambda x, time, cond: 0.3 * x + cond.tokens[..., None], CosineVP(), Eps())
    answer = autoguidance(classifier_free(d, COND, NULL, 3.0), classifier_free(e, COND, NULL, 2.0), 1.5)(X, T)
    parts = (1.5 * 3, d, COND), (1.5 * -2, d, NULL), (-0.5 * 2, e, COND), (-0.5 * -1, e, NULL)
    torch.testing.assert_close(answer.eps, sum(w * model(X, T, cond).eps for w, model, cond in parts))


def test_outputs_of_two_shapes_are_not_mixed() -> None:
    strong = Denoised(X, X, X[:, :1])
    answer = autoguidance(lambda x, t: strong, lambda x, t: Denoised(X, X, X), 2.0)(X, T)
    assert answer.output is strong.output


# --- interval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "rows"), [(0.2, 3), (0.2001, 6), (0.7, 6), (0.7001, 3)])
def test_interval_is_open_below_and_asks_once(t: float, rows: int) -> None:
    net, time = Counted(), torch.tensor(t, dtype=torch.float64)
    d = Denoiser(net, RectifiedFlow(), Flow())
    guided, plain = classifier_free(d, COND, NULL, 4.0), tie(d, COND)
    answer = interval(guided, plain, 0.2, 0.7)(X, time)
    assert net.rows == [rows]
    assert torch.equal(answer.x0, (guided if rows == 6 else plain)(X, time).x0)


def test_interval_with_a_time_for_each_row() -> None:
    d = Denoiser(Counted(), RectifiedFlow(), Flow())
    guided, plain, t = classifier_free(d, COND, NULL, 4.0), tie(d, COND), torch.tensor([0.2, 0.5, 0.9])
    answer, inside, outside = interval(guided, plain, 0.2, 0.7)(X, t), guided(X, t), plain(X, t)
    for got, a, b in zip(answer[:3], inside[:3], outside[:3], strict=True):
        assert torch.equal(got, torch.stack([b[0], a[1], b[2]]))


def test_interval_in_noise_over_signal() -> None:
    """EDM's sigma, where the path is its own."""
    guided = sigma_interval(lambda x, t: Denoised(x, x, x), lambda x, t: Denoised(-x, x, x), VE(), 0.28, 2.9)
    for sigma, sign in ((0.279, -1), (0.281, 1), (2.89, 1), (2.91, -1)):
        assert torch.equal(guided(X, torch.tensor(sigma / 80, dtype=torch.float64)).x0, sign * X)


# --- classifier ------------------------------------------------------------------------------------------------------

TARGET = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(4))


def log_prob(x: Tensor, t: Tensor) -> Tensor:
    """A Gaussian about TARGET: the gradient is (TARGET - x) (1 + t)."""
    return -(0.5 * (x - TARGET).square() * (1 + t.reshape(-1, 1, 1, 1))).sum((1, 2, 3))


@pytest.mark.parametrize("t", [T, torch.tensor([0.1, 0.5, 0.9])], ids=["one", "rows"])
@pytest.mark.parametrize("path", [RectifiedFlow(), LinearVP(), VE(2.0)], ids=repr)
def test_classifier_moves_the_score(path, t: Tensor) -> None:
    d = Denoiser(Counted(), path, Eps())
    with torch.no_grad():
        answer, plain = classifier(tie(d, COND), path, log_prob, 2.5)(X, t), d(X, t, COND)
    c = path.coeffs(t, 4)
    gradient = (TARGET - X) * (1 + t.reshape(-1, 1, 1, 1))
    before, after = -plain.eps / c.sigma, -answer.eps / c.sigma
    torch.testing.assert_close(after, (before + 2.5 * gradient).to(after.dtype))
    torch.testing.assert_close(answer.x0, (plain.x0 + 2.5 * c.sigma**2 / c.alpha * gradient).to(answer.x0.dtype))
    consistent(answer, X, t, path)


def test_classifier_leaves_no_gradients_behind() -> None:
    head, path = torch.nn.Linear(120, 1), RectifiedFlow()
    guided = classifier(lambda x, t: Denoised(x, x, x), path, lambda x, t: head(x.flatten(1))[:, 0].sigmoid(), 1.0)
    with torch.inference_mode():
        quiet = guided(X.clone(), T.clone())
    loud = guided(X, T)
    assert not loud.x0.requires_grad and not X.requires_grad and head.weight.grad is None
    torch.testing.assert_close(quiet.x0, loud.x0)
    x = X.clone().requires_grad_()  # a graph of the caller's own stays
    assert guided(x, T).x0.requires_grad and x.grad is None


def test_classifier_may_judge_the_denoised_picture() -> None:
    """Through the network: for x0 = x / 2 and -|x0|^2 / 2 the gradient is -x / 4."""

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        return Denoised(x / 2, x, x)

    guided = classifier(denoise, RectifiedFlow(), lambda x, t: -denoise(x, t).x0.square().flatten(1).sum(1) / 2, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(guided(X, T).eps, X + 0.6 * X / 4)


# --- adaptive projected guidance -------------------------------------------------------------------------------------

TIMES = [torch.tensor(t, dtype=torch.float64) for t in (0.9, 0.6, 0.3)]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("norm_threshold", [0.0, 2.5, 15.0])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
@pytest.mark.parametrize("one_batch", [True, False])
def test_apg_is_the_papers(eta: float, norm_threshold: float, momentum: float, one_batch: bool) -> None:
    """Stock has algorithm 1 as its "original formulation", with w - 1 for w. It hands it the network's output, where
    the paper, and we, mean x0."""
    net = Counted()
    d = Denoiser(net, RectifiedFlow(), Flow())
    guided = apg(d, COND, NULL, 6.0, eta=eta, norm_threshold=norm_threshold, momentum=momentum, one_batch=one_batch)
    buffer = MomentumBuffer(momentum) if momentum else None
    for i, t in enumerate(TIMES):
        x, rows = X + i, len(net.rows)
        answer = guided(x, t)
        assert net.rows[rows:] == ([6] if one_batch else [3, 3])
        a, b = d(x, t, COND), d(x, t, NULL)
        stock = normalized_guidance(
            a.x0, b.x0, 5.0, buffer, eta=eta, norm_threshold=norm_threshold, use_original_formulation=True
        )
        # stock projects in float64, we in float32: 1e-5 of values of about 10
        torch.testing.assert_close(answer.x0, stock, rtol=1e-5, atol=1e-4)
        consistent(answer, x, t, d.path)
        assert torch.equal(answer.output, a.output)


def test_apg_begins_at_the_conditional_model() -> None:
    """Stock's default does not: it adds w u to the unconditional answer, which misses the conditional one at w = 1
    by what projection and bound have taken from cond - uncond."""
    d = Denoiser(Counted(), RectifiedFlow(), Flow())
    cond, uncond = d(X, T, COND).x0, d(X, T, NULL).x0
    answer = apg(d, COND, NULL, 1 + 1e-6)(X, T).x0
    torch.testing.assert_close(answer, cond, rtol=0, atol=1e-5)
    assert (normalized_guidance(cond, uncond, 1 + 1e-6, eta=0.0, norm_threshold=15.0) - cond).abs().max() > 0.1


def test_apg_without_its_three_parts_is_classifier_free() -> None:
    d = Denoiser(Counted(), CosineVP(), V())
    answer = apg(d, COND, NULL, 5.0, eta=1.0, norm_threshold=0.0, momentum=0.0)(X, T)
    expected = classifier_free(d, COND, NULL, 5.0)(X, T)
    torch.testing.assert_close(answer.x0, expected.x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer.eps, expected.eps, rtol=1e-5, atol=1e-5)


def test_apg_remembers_within_a_run_only() -> None:
    d = Denoiser(Counted(), RectifiedFlow(), Flow())
    guided = apg(d, COND, NULL, 5.0)
    first, second = guided(X, T).x0, guided(X, T).x0
    assert not torch.equal(first, second)
    assert torch.equal(first, apg(d, COND, NULL, 5.0)(X, T).x0)


def test_apg_rows_do_not_see_each_other() -> None:
    d, one = Denoiser(Counted(), RectifiedFlow(), Flow()), COND.map(lambda x: x[:1])
    alone, together = apg(d, NULL, one, 5.0), apg(d, NULL, one, 5.0)
    for t in TIMES:
        torch.testing.assert_close(alone(X[:1], t).x0, together(X, t).x0[:1])


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_apg_without_guidance_asks_once(scale: float) -> None:
    net = Counted()
    d = Denoiser(net, RectifiedFlow(), Flow())
    answer = apg(d, COND, NULL, scale)(X, T)
    assert net.rows == [3] and torch.equal(answer.x0, d(X, T, COND).x0)


# --- dynamic thresholding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("most", [1.0, 1.5, 100.0])
def test_dynamic_thresholding_is_the_stock_one(ratio: float, most: float) -> None:
    x0 = X * torch.tensor([0.1, 1.0, 20.0]).view(3, 1, 1, 1)  # one row inside [-1, 1], one at it, one far outside
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=most)
    x_t, path = RectifiedFlow().mix(x0, X, T), RectifiedFlow()
    answer = dynamic_thresholding(lambda x, t: Denoised(x0, X, X), path, ratio, most)(x_t, T)
    torch.testing.assert_close(answer.x0, scheduler._threshold_sample(x0), rtol=1e-6, atol=1e-6)
    consistent(answer, x_t, T, path)


def test_thresholded_sampling_is_the_stock_one() -> None:
    """A whole run with the same noise. (Stock DDIM keeps the network's eps with the clipped x0 unless told
    ``use_clipped_model_output``; DDPM, like ours, lets x_t decide.)"""
    path = DiscreteVP(schedule="linear", beta_start=1e-4, beta_end=0.02)
    scheduler: Any = DDPMScheduler(
        trained_betas=path.betas.tolist(), thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5,
        clip_sample=False, timestep_spacing="trailing",
    )  # fmt: skip

    def net(x: Tensor, time: Tensor, cond: Cond | None = None) -> Tensor:
        return torch.tanh(x) * torch.cos(time.view(-1, 1, 1, 1) / 20)

    scheduler.set_timesteps(10)
    x, generator = X, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.float().expand(3)), t, x, generator=generator).prev_sample
    d = Denoiser(net, path, Eps(), TimeInput(1000, offset=-1))
    denoise = dynamic_thresholding(tie(d, NULL), path, 0.9, 1.5)
    times = time_grid(path, 10, spacing="trailing")
    ours = ddpm(denoise, path, X, times, generator=torch.Generator().manual_seed(1))
    # stock keeps its coefficients in float32, as products of 1000 factors
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)
    assert (ddpm(tie(d, NULL), path, X, times, generator=torch.Generator().manual_seed(1)) - x).abs().max() > 0.1


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_dynamic_thresholding_at_the_ends(t: float) -> None:
    answer = dynamic_thresholding(lambda x, t: Denoised(9 * x, x, x), RectifiedFlow())(X, torch.tensor(t))
    assert answer.x0.abs().max() <= 1 and torch.equal(answer.eps, X)


# --- together --------------------------------------------------------------------------------------------------------


def test_interval_of_guided_and_thresholded() -> None:
    net = Counted()
    d = Denoiser(net, CosineVP(), V())
    bounded = dynamic_thresholding(classifier_free(d, COND, NULL, 8.0), d.path)
    denoise = interval(bounded, tie(d, COND), 0.3, 0.8)
    for t in TIMES:
        net.rows.clear()
        answer, inside = denoise(X, t), 0.3 < t.item() <= 0.8
        assert net.rows == ([6] if inside else [3])
        expected = classifier_free(d, COND, NULL, 8.0)(X, t).x0 if inside else d(X, t, COND).x0
        assert (expected.abs().max() > 1.5).item()  # there is something to threshold
        s = expected.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1).view(3, 1, 1, 1)
        torch.testing.assert_close(answer.x0, expected.clamp(-s, s) / s if inside else expected)
        consistent(answer, X, t, d.path)


CALLS: dict[str, Any] = {
    "classifier_free": lambda d: classifier_free(d, COND, NULL, 3.0),
    "autoguidance": lambda d: autoguidance(tie(d, COND), tie(d, NULL), 3.0),
    "interval": lambda d: interval(classifier_free(d, COND, NULL, 3.0), tie(d, COND), 0.0, 0.5),
    "sigma_interval": lambda d: sigma_interval(classifier_free(d, COND, NULL, 3.0), tie(d, COND), d.path, 0.0, 1.0),
    "classifier": lambda d: classifier(tie(d, COND), d.path, lambda x, t: -x.reshape(3, -1).square().sum(1), 3.0),
    "apg": lambda d: apg(d, COND, NULL, 3.0),
    "dynamic_thresholding": lambda d: dynamic_thresholding(tie(d, COND), d.path),
}


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize("t", [T, torch.tensor([0.3, 0.5, 0.7])], ids=["one", "rows"])
def test_learned_variance_is_the_conditional_answers(name: str, t: Tensor) -> None:
    plain = Counted()
    d = Denoiser(lambda *told: plain(*told).repeat(1, 2, 1, 1).tanh(), RectifiedFlow(), Flow(), learned_variance=True)
    x = X.clone()
    answer = CALLS[name](d)(x, t)
    assert answer.var_frac is not None and torch.equal(x, X)
    torch.testing.assert_close(answer.var_frac, d(X, t, COND).var_frac)


@pytest.mark.parametrize("name", GUIDANCE)
def test_every_kind_keeps_float64_and_takes_plain_rows(name: str) -> None:
    """x of shape (B,): rows of one number each."""

    def net(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return 2 * x + cond.tokens[:, 0, 0]

    d = Denoiser(net, RectifiedFlow(), X0())
    x = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64)
    answer = CALLS[name](d)(x, T)
    assert answer.x0.dtype == answer.eps.dtype == torch.float64 and answer.x0.shape == (3,)
    if name == "dynamic_thresholding":  # a row of one number is its own percentile
        assert torch.equal(answer.x0, d(x, T, COND).x0.clamp(-1, 1))
    if name == "apg":  # and has nothing beside its own direction
        torch.testing.assert_close(answer.x0, d(x, T, COND).x0)


D = Denoiser(Counted(), RectifiedFlow(), Flow())
PLAIN, WEIGHTS = tie(D, COND), torch.nn.Parameter(torch.zeros(3))


def twice(guided) -> None:
    guided(X, T)
    guided(X[:1], T)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GUIDANCE["classifier_free"](D, COND, NULL, 2.0, rescale=1.5), r"rescale is 1\.5"),
        (lambda: interval(PLAIN, PLAIN, 0.7, 0.2), r"low is 0\.7 and high is 0\.2; expected 0 <= low < high <= 1"),
        (lambda: interval(PLAIN, PLAIN, 0.28, 2.9), r"high is 2\.9"),
        (lambda: interval(PLAIN, PLAIN, float("nan"), 1.0), "low is nan"),
        (
            lambda: classifier(PLAIN, D.path, log_prob, 1.0)(X, torch.tensor(1.0)),
            "at t = 1, where RectifiedFlow has alpha = 0: start",
        ),
        (lambda: classifier(PLAIN, D.path, log_prob, 1.0)(X, torch.tensor([0.5, 1.0, 0.2])), "alpha = 0"),
        (lambda: classifier(PLAIN, D.path, lambda x, t: x.sum(), 1.0)(X, T), r"gave shape \(\); expected .* \(3,\)"),
        (lambda: classifier(PLAIN, D.path, lambda x, t: torch.zeros(3), 1.0)(X, T), "does not depend on x_t"),
        (lambda: classifier(PLAIN, D.path, lambda x, t: WEIGHTS, 1.0)(X, T), "does not depend on x_t"),
        (lambda: apg(D, COND, NULL, 4.0, norm_threshold=-1.0), r"norm_threshold is -1\.0"),
        (lambda: apg(D, COND, NULL, 4.0, momentum=-1.0), r"momentum -1\.0; expected"),
        (lambda: twice(apg(D, NULL, NULL, 4.0)), r"shape \(3, 4, 6, 5\), now \(1, 4, 6, 5\); make one function"),
        (lambda: dynamic_thresholding(PLAIN, D.path, 99.5), r"percentile is 99\.5"),
        (lambda: dynamic_thresholding(PLAIN, D.path, 0.995, 0.5), r"max_value 0\.5"),
    ],
)
def test_refusals(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
