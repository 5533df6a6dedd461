"""Noise offset, input perturbation and what else the loss is made of, against closed forms and diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor, nn

from ldm import rng
from ldm.cond import Cond
from ldm.denoiser import Denoiser, TimeInput
from ldm.models.unet import UNet
from ldm.paths import DiscreteVP, RectifiedFlow
from ldm.prediction import X0, Eps, Flow, V
from ldm.timesteps import WEIGHTINGS
from pipelines.core import with_sizes
from tests.families import sdxl
from training.batches import Stream
from training.buckets import size_ids
from training.noise import noises

SHAPE = (4, 6, 5)
INDEX = torch.arange(3000) + 2**33
CHAIN = dict(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
BETAS = [CHAIN, dict(schedule="linear", beta_start=1e-4, beta_end=0.02)]


# --- the noise -------------------------------------------------------------------------------------------------------


def test_neither_is_the_noise_as_it_was():
    eps, noisy = noises(3, INDEX[:20], SHAPE)
    assert noisy is None and eps.equal(rng.normal(3, INDEX[:20], SHAPE, Stream.NOISE))


@pytest.mark.parametrize("offset", [0.1, 1.0])
def test_variance_and_correlation_with_an_offset(offset: float):
    """1 + offset² and, of two values of a channel, offset² / (1 + offset²); values of two channels have none. Of n
    normal numbers the variance is known to sqrt(2 / n), and the offset is drawn 12,000 times."""
    eps, noisy = noises(3, INDEX, SHAPE, offset)
    assert noisy is None
    sure = 4 * math.sqrt(2 / len(INDEX) / SHAPE[0])
    assert eps.var().item() == pytest.approx(1 + offset**2, abs=(1 + offset**2) * sure)
    assert abs(eps.mean().item()) < 4 * math.sqrt((offset**2 + 1 / 30) / 12_000)
    flat = eps.double().flatten(2)  # (N, C, P)
    together = flat.sum(2)  # of a channel: variance P + P² offset²
    pixels = flat.shape[2]
    covariance = (together.square() - flat.square().sum(2)).mean().item() / (pixels * (pixels - 1))
    assert covariance == pytest.approx(offset**2, abs=(offset**2 + 1 / pixels) * sure)
    correlation = covariance / eps.var().item()
    assert correlation == pytest.approx(offset**2 / (1 + offset**2), abs=2 * (offset**2 + 1 / pixels) * sure)
    across = (together[:, 0] * together[:, 1]).mean().item() / pixels**2
    assert abs(across) < 4 * (offset**2 + 1 / pixels) / math.sqrt(len(INDEX))


def test_the_offset_is_one_number_of_its_own_for_each_channel():
    plain = noises(3, INDEX[:50], SHAPE)[0]
    added = noises(3, INDEX[:50], SHAPE, 0.3)[0] - plain
    own = rng.normal(3, INDEX[:50], (4, 1, 1), Stream.OFFSET)
    torch.testing.assert_close(added, (0.3 * own).expand_as(added), rtol=0, atol=1e-6)
    assert abs((own.flatten() * plain[:, :, 0, 0].flatten()).mean()) < 4 / math.sqrt(200)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_perturbation_is_in_the_input_alone(offset: float):
    eps, noisy = noises(3, INDEX, SHAPE, offset, 0.1)
    assert noisy is not None and eps.equal(noises(3, INDEX, SHAPE, offset)[0])
    more = (noisy - eps) / 0.1
    n = more.numel()
    assert more.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert abs((more * eps).mean().item()) < 4 * math.sqrt((1 + offset**2) / n)


def test_noise_belongs_to_the_image_and_not_to_the_batch():
    whole = noises(3, INDEX[:8], SHAPE, 0.3, 0.1)
    parts = [noises(3, part, SHAPE, 0.3, 0.1) for part in INDEX[:8].split(3)]
    for kind, all_of_it in enumerate(whole):
        found: list[Tensor] = [x for part in parts if (x := part[kind]) is not None]
        assert all_of_it is not None and torch.cat(found).equal(all_of_it)
    other = noises(4, INDEX[:8], SHAPE, 0.3, 0.1)[0]
    assert whole[0] is not None and not whole[0].equal(other)


# --- the loss --------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """a x_t, in place of a network."""

    def __init__(self, a: float):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.a * x


def nothing(rows: int) -> Cond:
    return Cond(torch.zeros(rows, 1, 1))


@pytest.mark.parametrize(("offset", "perturbation"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.4), (0.5, 0.4)])
@pytest.mark.parametrize("kind", [Eps(), V(), Flow(), X0()], ids=lambda k: type(k).__name__)
def test_loss_of_a_linear_network(kind, offset: float, perturbation: float):
    """For data N(0, s²), eps of variance u = 1 + offset², and a target p x0 + q eps: the mean of (a x_t - target)² is
    (a alpha - p)² s² + (a sigma - q)² u + (a sigma)² perturbation²."""
    path = RectifiedFlow() if isinstance(kind, Flow) else DiscreteVP(**CHAIN)
    a, s, t = 0.7, 1.5, torch.tensor(0.4, dtype=torch.float64)
    alpha, sigma = path.alpha(t).item(), path.sigma(t).item()
    p, q = {"Eps": (0, 1), "V": (-sigma, alpha), "Flow": (-1, 1), "X0": (1, 0)}[type(kind).__name__]
    x0 = s * torch.randn(len(INDEX), *SHAPE, generator=torch.Generator().manual_seed(0))
    eps, noisy = noises(3, INDEX, SHAPE, offset, perturbation)
    each = Denoiser(Scaled(a), path, kind).loss(x0, t, nothing(1), eps=eps, noisy_eps=noisy)
    expected = (a * alpha - p) ** 2 * s**2 + (a * sigma - q) ** 2 * (1 + offset**2) + (a * sigma * perturbation) ** 2
    sure = 4 * each.std().item() / math.sqrt(len(INDEX))
    assert sure < 0.05 * expected
    assert each.mean().item() == pytest.approx(expected, abs=sure)


def test_the_target_is_the_noise_that_the_input_was_not_made_with():
    x0, eps, more, t = *torch.randn(3, 2, *SHAPE), torch.tensor([0.3, 0.8])
    d, column = Denoiser(Scaled(0.5), RectifiedFlow(), Flow()), t.view(-1, 1, 1, 1)
    error = 0.5 * ((1 - column) * x0 + column * (eps + more)) - (eps - x0)
    found = d.loss(x0, t, nothing(2), eps=eps, noisy_eps=eps + more)
    torch.testing.assert_close(found, error.square().mean((1, 2, 3)))
    plain = d.loss(x0, t, nothing(2), eps=eps)
    assert d.loss(x0, t, nothing(2), eps=eps, noisy_eps=eps).equal(plain) and not found.allclose(plain)
    mask = torch.zeros(2, 1, 6, 5)
    mask[:, :, :2] = 0.5
    inside = d.loss(x0, t, nothing(2), eps=eps, noisy_eps=eps + more, mask=mask)
    torch.testing.assert_close(inside, error[:, :, :2].square().mean((1, 2, 3)))
    with pytest.raises(ValueError, match=r"noisy_eps has shape \(2, 4, 6, 4\)"):
        d.loss(x0, t, nothing(2), eps=eps, noisy_eps=eps[..., :4])


def test_perturbed_input_with_learned_variance():
    """The bound's term sees the x_t that the network sees."""

    class Double(nn.Module):
        def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
            return torch.cat([0.5 * x, 0.1 * x], dim=1)

    d = Denoiser(Double(), DiscreteVP(**CHAIN), Eps(), TimeInput(1000, offset=-1), learned_variance=True)
    x0, eps, more, t = *torch.randn(3, 2, *SHAPE), torch.tensor([0.3, 0.8])
    perturbed = d.loss(x0, t, nothing(2), eps=eps, noisy_eps=eps + more)
    # the same x_t from eps + more alone has the same bound, and another L_simple
    other = d.loss(x0, t, nothing(2), eps=eps + more)
    path = d.path
    c = path.coeffs((t * 1000).ceil().double() / 1000, 4)
    x_t = (c.alpha * x0 + c.sigma * (eps + more)).float()
    simple = [(0.5 * x_t - target).square().mean((1, 2, 3)) for target in (eps, eps + more)]
    torch.testing.assert_close(perturbed - simple[0], other - simple[1], rtol=1e-4, atol=1e-5)


# --- weights and chains ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_of_a_flow_is_that_of_the_same_x0(gamma: float):
    """Hang et al. weigh the error of x0 by min(SNR, γ). On x_t = (1 - t) x0 + t eps an error e of x0 is one of -e / t
    of eps - x0: (1 - t) e + t e_eps = 0 gives e_eps - e = -e / t. So the flow's loss is e² / t², and its weight
    t² min(SNR, γ), SNR = (1 - t)² / t². On eps, whose error is (1 - t) / t e, it is min(SNR, γ) / SNR."""
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    snr = ((1 - t) / t) ** 2
    told = {kind: WEIGHTINGS["min_snr"](RectifiedFlow(), kind(), t, gamma=gamma) for kind in (Flow, Eps, X0)}
    torch.testing.assert_close(told[Flow], t**2 * snr.clamp(max=gamma))
    torch.testing.assert_close(told[Eps], snr.clamp(max=gamma) / snr)
    torch.testing.assert_close(told[X0], snr.clamp(max=gamma))
    x0, eps, e = torch.randn(3, len(t), *SHAPE, dtype=torch.float64)
    column, losses = t.view(-1, 1, 1, 1), []
    wrong = {Flow: (eps - x0) - e / column, Eps: eps - (1 - column) / column * e, X0: x0 + e}
    for kind, output in wrong.items():
        d = Denoiser(lambda x, time, cond, output=output: output, RectifiedFlow(), kind())
        losses.append(told[kind] * d.loss(x0, t, nothing(len(t)), eps=eps))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


@pytest.mark.parametrize("chain", BETAS, ids=lambda x: x["schedule"])
def test_zero_terminal_snr_is_diffusers(chain: dict):
    """Lin et al. 2024, algorithm 1; at the last step there is nothing but noise, and v is -x0."""
    plain, zero = DiscreteVP(**chain), DiscreteVP(**chain, zero_terminal_snr=True)
    stock = rescale_zero_terminal_snr(plain.betas.double())
    torch.testing.assert_close(zero.betas.double(), stock, rtol=1e-9, atol=1e-12)
    assert zero.alpha(torch.tensor(1.0)) == 0 and zero.sigma(torch.tensor(1.0)) == 1
    x0, eps = torch.randn(2, 3, *SHAPE)
    end = torch.ones(3)
    d = Denoiser(lambda x, time, cond: -x0, zero, V())
    assert d.loss(x0, end, nothing(3), eps=eps).abs().max() < 1e-12
    weight = WEIGHTINGS["min_snr"](zero, V(), end.double())  # diffusers' min(SNR, γ) / (SNR + 1) is 0 there
    assert weight.abs().max() < 1e-12


def test_sizes_are_told_in_the_order_of_sdxl():
    pipe = sdxl()
    width = pipe.text_encoder_2.config.projection_dim
    told = dict(dtype=torch.float32, text_encoder_projection_dim=width)
    stock = pipe._get_add_time_ids((50, 100), (0, 25), (64, 48), **told)
    net, cond = UNet.from_diffusers(pipe.unet), nothing(3)
    ours = with_sizes(net, cond, 64, 48, (50, 100), (0, 25), (64, 48)).size_ids
    assert ours is not None and ours.equal(stock.expand(3, -1))
    # a row's: as it is in the file, what is cut off at the left once it covers the bucket, the bucket
    rows = size_ids(np.array([50]), np.array([100]), (64, 64), True)
    assert rows.tolist() == pipe._get_add_time_ids((50, 100), (0, 32), (64, 64), **told).tolist()
