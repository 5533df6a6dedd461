"""The linear map from latents to colours."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.latents import LatentScale
from ldm.models.vae import VAE
from pipelines.preview import LinearPreview, fit_preview, gradients
from tests import tiny

FACTOR, SCALE = 4, LatentScale(0.5, 0.2)
MIX = torch.tensor([[0.5, -0.2, 0.1, 0.0], [0.1, 0.6, -0.3, 0.2], [-0.1, 0.2, 0.4, 0.5]])  # (3, C)
LIFT = torch.tensor([0.1, -0.3, 0.2])


class Linear:
    """An autoencoder whose decoder is MIX z + LIFT for each latent's pixels; with noise of its own on wish."""

    factor, dtype, device, latent_scale = FACTOR, torch.float32, torch.device("cpu"), SCALE

    def __init__(self, noise: float = 0.0):
        self.noise = noise

    def encode(self, x: Tensor) -> Any:
        small = torch.nn.functional.avg_pool2d(x, FACTOR) - LIFT[:, None, None]
        return SimpleNamespace(mean=torch.einsum("cd,bdhw->bchw", torch.linalg.pinv(MIX), small))

    def decode(self, z: Tensor) -> Tensor:
        rgb = torch.einsum("dc,bchw->bdhw", MIX, z) + LIFT[:, None, None]
        rgb = rgb + self.noise * rgb.std() * torch.randn_like(rgb)
        return rgb.repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)


def test_a_linear_decoder_is_found_exactly():
    found = fit_preview(Linear())  # type: ignore[arg-type]
    # rgb = (MIX raw + LIFT) / 2 + 1/2 with raw = z / scale + shift
    weight, bias = MIX / SCALE.scale / 2, (MIX.sum(1) * SCALE.shift + LIFT) / 2 + 0.5
    torch.testing.assert_close(found.weight, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.bias, bias, atol=1e-5, rtol=0)
    assert found.r2 == pytest.approx(1, abs=1e-6)


def test_r2_is_the_share_that_is_explained():
    """Noise of the colours' own variance halves it."""
    assert fit_preview(Linear(noise=1.0)).r2 == pytest.approx(0.5, abs=0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [4, 16])
def test_a_real_autoencoder_gives_colours_and_always_the_same(channels: int):
    vae: VAE = tiny.vae(latent_channels=channels)
    first, second = fit_preview(vae), fit_preview(vae)
    assert first.weight.shape == (3, channels) and torch.equal(first.weight, second.weight)
    assert first.r2 == second.r2 <= 1
    rgb = first(torch.randn(2, channels, 8, 6))
    assert rgb.shape == (2, 3, 8, 6) and 0 <= rgb.min() < rgb.max() <= 1


def test_the_map_is_applied_to_each_latent():
    preview = LinearPreview(torch.tensor([[1.0, 0], [0, 1], [0, 0]]), torch.tensor([0.0, 0.25, 2.0]), 1.0)
    z = torch.tensor([0.5, 0.25])[None, :, None, None].bfloat16()
    assert preview(z).flatten().tolist() == [0.5, 0.5, 1.0]  # the last is cut


def test_half_precision_overflow_is_stepped_around():
    vae = tiny.vae().half()
    preview = fit_preview(vae)
    assert preview.weight.isfinite().all() and vae.dtype == torch.float16


def test_the_pictures_that_it_is_fitted_to_are_of_many_colours():
    pictures = gradients(8, 64, torch.Generator().manual_seed(0))
    assert pictures.shape == (8, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    assert (pictures.flatten(2).std(2) > 0.1).all()
