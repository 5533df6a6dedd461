"""Classifier-free guidance against its formula and diffusers' rescaling."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.guidance import GUIDANCE, classifier_free
from ldm.paths import RectifiedFlow
from ldm.prediction import Flow, Karras, V

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


def test_rescale_outside_its_range_is_refused() -> None:
    d = Denoiser(Counted(), RectifiedFlow(), Flow())
    with pytest.raises(ValueError, match=r"rescale is 1\.5"):
        GUIDANCE["classifier_free"](d, COND, NULL, 2.0, rescale=1.5)
