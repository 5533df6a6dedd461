"""Bits of latents and of pictures against Gaussian models, whose bits are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.denoiser import TimeInput
from ldm.latents import LatentScale
from ldm.models.vae import Moments
from ldm.paths import VE, DiscreteVP, Path, RectifiedFlow
from ldm.prediction import Eps, Flow, Karras, Prediction, V
from pipelines.core import Parts
from pipelines.inversion import encode
from pipelines.likelihood import bound_bits, decoder_std, ode_bits, picture_bits
from pipelines.schedulers import EDM_TIME, Schedule
from tests import forms

MEANS = {"low": -0.5, "high": 1.0}  # of each prompt
STD = 0.6
CHAIN = DiscreteVP(schedule="linear", beta_start=1e-3, beta_end=0.2, num_train_timesteps=100)
KINDS: dict[str, tuple[Path, Prediction, TimeInput, str, float]] = {  # and the time at which it takes its data
    "flow": (RectifiedFlow(), Flow(), TimeInput(1000.0), "uniform", 0.0),
    "chain": (CHAIN, Eps(), TimeInput(100.0, offset=-1.0), "trailing", 0.01),
    "v chain": (CHAIN, V(), TimeInput(100.0, offset=-1.0), "trailing", 0.01),
    "edm": (VE(20.0), Karras(0.7), EDM_TIME, "karras", 0.002 / 20),
}


class Told:
    """A text encoder of two prompts."""

    family = "sd"

    def encode(self, prompts: list[str]) -> Cond:
        return Cond(torch.tensor([[[MEANS[prompt]]] for prompt in prompts]))

    def null(self) -> Cond:
        return Cond(torch.zeros(1, 1, 1))


class Exact(nn.Module):
    """What a network that has learned N(mean, STD^2) answers; the mean is what the prompt says."""

    def __init__(self, path: Path, prediction: Prediction, time_input: TimeInput, std: float, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.config = {"in_channels": channels, "out_channels": channels}
        self.path, self.prediction, self.time_input, self.std = path, prediction, time_input, std

    dtype = torch.float32

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if self.time_input.log_sigma:
            t = self.path.time_at(-8 * time.double())
        else:
            t = (time.double() - self.time_input.offset) / self.time_input.scale
        c = self.path.coeffs(t, x.ndim)
        x = x.double() / self.prediction.scale_input(c)
        mean, var = cond.tokens.double().mean((1, 2)).view(-1, 1, 1, 1), (c.alpha * self.std) ** 2 + c.sigma**2
        off = (x - c.alpha * mean) / var
        return self.prediction.target(mean + c.alpha * self.std**2 * off, c.sigma * off, c).float()


class Linear(nn.Module):
    """x = weight z + noise of ``std``, with the exact posterior for z from N(0, 1)."""

    weight, std, factor, dtype, config = 0.5, 0.2, 1, torch.float32, {"latent_channels": 3, "force_upcast": False}
    latent_scale, device = LatentScale(2.0, 0.3), torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor) -> Moments:
        var = 1 / (1 + (self.weight / self.std) ** 2)
        mean = var * self.weight / self.std**2 * x
        raw = torch.full_like(x, math.log(var / self.latent_scale.scale**2))
        return Moments(self.latent_scale.denormalize(mean), raw)

    def decode(self, raw: Tensor) -> Tensor:
        return self.weight * self.latent_scale.normalize(raw)


def gaussian(kind: str, std: float = STD, channels: int = 4) -> Parts:
    path, prediction, time_input, spacing, _ = KINDS[kind]
    net: Any = Exact(path, prediction, time_input, std, channels)
    net.device = torch.device("cpu")
    vae: Any = Linear() if channels == 3 else SimpleNamespace(factor=1, config={"latent_channels": channels})
    text: Any = Told()
    return Parts(net, vae, text, Schedule(path, prediction, time_input, "ddim", spacing))


def latents(rows: int = 2) -> Tensor:
    return 0.2 + 0.8 * torch.randn(rows, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def gaussian_bits(z: Tensor, mean: Tensor | float, var: float) -> Tensor:
    nats = ((z - mean) ** 2 / var + math.log(2 * math.pi * var)) / 2
    return nats.double().flatten(1).mean(1) / math.log(2)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_the_ode(kind: str) -> None:
    """The ODE of a Gaussian is linear: at the noise it is scaled by the stds' ratio, and starts from N(0, r^2)."""
    path, *_, lowest = KINDS[kind]
    z, mean = latents(), torch.tensor([MEANS["low"], MEANS["high"]]).view(2, 1, 1, 1)
    found = ode_bits(
        gaussian(kind), z, ["low", "high"], atol=1e-6, rtol=1e-6, generator=torch.Generator().manual_seed(0)
    )
    a0, s0, a1, s1 = (
        f(torch.tensor(t, dtype=torch.float64)).item() for t in (lowest, 1.0) for f in (path.alpha, path.sigma)
    )
    ratio = math.sqrt(((a1 * STD) ** 2 + s1**2) / ((a0 * STD) ** 2 + s0**2))
    end = ratio * (z - a0 * mean) + a1 * mean
    truth = gaussian_bits(end, 0.0, a1**2 + s1**2) - math.log2(ratio)
    torch.testing.assert_close(found.bits_per_dim, truth, rtol=0, atol=2e-4)  # a network in float32
    torch.testing.assert_close(found.latent, end, rtol=0, atol=1e-3 * math.hypot(a1, s1))
    if kind == "flow":  # nothing but noise is left at the end: this is the data's own density
        torch.testing.assert_close(found.bits_per_dim, gaussian_bits(z, mean, STD**2), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("kind", "steps"), [("flow", 300), ("chain", None), ("edm", 300)])
def test_the_bound_lies_above_by_little(kind: str, steps: int | None) -> None:
    parts, z = (
        gaussian(kind),
        MEANS["high"] + STD * torch.randn(64, 4, 6, 6, generator=torch.Generator().manual_seed(2)),
    )
    found = bound_bits(parts, z, "high", steps=steps, generator=torch.Generator().manual_seed(0))
    truth = gaussian_bits(z, MEANS["high"], STD**2)
    assert found.terms.shape == (64, steps or 100)
    assert -0.06 < (found.total - truth).mean() < 0.15  # a mean of draws, whose standard error is 0.016
    if kind == "edm":
        fewer = bound_bits(parts, z, "high", steps=40, generator=torch.Generator().manual_seed(0))
        assert fewer.total.mean() > found.total.mean() + 0.3


def test_without_a_prompt_and_with_the_wrong_one() -> None:
    parts, z = gaussian("flow"), STD * torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    own, low, high = (ode_bits(parts, z, prompt).bits_per_dim.mean() for prompt in (None, "low", "high"))
    assert own < low < high


@pytest.mark.parametrize("method", ["bound", "ode"])
def test_bits_of_pictures(method: str) -> None:
    """With the exact posterior the three terms are -log p(x) whatever z is drawn: Gaussian of both variances."""
    parts = gaussian("flow", std=1.0, channels=3)
    x = (128 + 30 * torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))).round().clamp(40, 215)
    options: dict[str, Any] = {"steps": 300} if method == "bound" else {"atol": 1e-6, "rtol": 1e-6}
    found = picture_bits(
        parts, x / 255, decoder_std=Linear.std, method=method, generator=torch.Generator().manual_seed(0), **options
    )
    truth = gaussian_bits(2 * x / 255 - 1, 0.0, Linear.weight**2 + Linear.std**2) + math.log2(255 / 2)
    torch.testing.assert_close(found.total, found.decoder + found.latents - found.posterior)
    if method == "ode":  # levels are narrow beside the std: a level's mass is density times width, to 1e-3
        torch.testing.assert_close(found.total, truth, rtol=0, atol=2e-3, check_dtype=False)
    else:
        assert -0.1 < (found.total - truth).mean() < 0.15  # of 4 pictures


def test_the_std_about_the_decoder() -> None:
    parts = gaussian("flow", std=1.0, channels=3)
    x = (128 + 60 * torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(3))).round().clamp(0, 255) / 255
    spread, var = (2 * x - 1).square().mean().item(), 1 / (1 + (Linear.weight / Linear.std) ** 2)
    left = 1 - Linear.weight**2 * var / Linear.std**2  # of a picture, after posterior mean and decoder
    expected = math.sqrt(left**2 * spread + Linear.weight**2 * var)
    assert decoder_std(parts, x, torch.Generator().manual_seed(0)) == pytest.approx(expected, rel=0.02)


def test_a_real_pipeline_has_bits() -> None:
    pipe = forms.ours("unet")
    x = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255
    z = encode(pipe, x, torch.Generator().manual_seed(0))
    exact, bound = ode_bits(pipe, z, "zebra", probes=2), bound_bits(pipe, z, "zebra", steps=5)
    assert exact.bits_per_dim.isfinite().all() and bound.total.isfinite().all() and bound.terms.shape == (2, 5)
    assert exact.stderr.shape == (2,) and not any(p.grad is not None for p in pipe.net.parameters())
    drawn = [picture_bits(pipe, x, decoder_std=0.5, steps=5, generator=torch.Generator().manual_seed(1)) for _ in "12"]
    assert torch.equal(drawn[0].total, drawn[1].total)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"method": "guess"}, "method 'guess' is not one of bound, ode"),
        ({"decoder_std": 0.0}, r"decoder_std is 0\.0; expected a number above 0"),
        ({"pictures": torch.full((1, 3, 16, 16), 0.5)}, "pictures: expected 256 levels"),
        ({"prompt": ["a", "b", "c"]}, "prompt: 3 for 1 pictures"),
        ({"variance": "none"}, "variance 'none' is not one of"),
        ({"method": "ode", "probes": 0}, "probes is 0"),
    ],
)
def test_what_is_refused(told: dict[str, Any], message: str) -> None:
    asked = {"pictures": torch.zeros(1, 3, 16, 16), "decoder_std": 0.1} | told
    if asked.get("method", "bound") == "bound":
        asked["steps"] = 2
    with pytest.raises(ValueError, match=message):
        picture_bits(forms.ours("unet"), **asked)
