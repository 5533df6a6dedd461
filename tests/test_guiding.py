"""Guidance by name: the same as ``ldm.guidance`` put together by hand, bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm import guidance as by_hand
from ldm.denoiser import Denoiser
from ldm.sampling import ddim
from pipelines.core import sample_latents
from pipelines.guiding import guide
from tests import tiny
from tests.forms import noise, ours, parts

PARTS = parts("mmdit")
DENOISER = PARTS.denoiser()
with torch.no_grad():
    COND, UNCOND = PARTS.text.encode(["a red apple", "zebra"]), PARTS.text.null()
WEAK = tiny.randomize(tiny.mmdit(), 9, 0.05)
X, STEPS, PATH = noise(2), 4, PARTS.schedule.path
PLAIN, AWAY = partial(DENOISER, cond=COND), partial(Denoiser(WEAK, PATH, DENOISER.prediction), cond=COND)


def likes(x: Tensor, t: Tensor) -> Tensor:
    return -(x - 0.3).square().flatten(1).sum(1) / 2


def free(scale: float = 4.0, **kw: Any) -> by_hand.Denoise:
    return by_hand.classifier_free(DENOISER, COND, UNCOND, scale, **kw)


HAND: dict[str, tuple[Any, Any]] = {
    "the default": ("classifier_free", free),
    "in turns": ({"name": "classifier_free", "rescale": 0.5}, lambda: free(rescale=0.5)),
    "apg": ("apg", lambda: by_hand.apg(DENOISER, COND, UNCOND, 4.0)),
    "apg told": (
        {"name": "apg", "eta": 0.5, "norm_threshold": 0, "momentum": 0.25},
        lambda: by_hand.apg(DENOISER, COND, UNCOND, 4.0, eta=0.5, norm_threshold=0, momentum=0.25),
    ),
    "autoguidance": (
        {"name": "autoguidance", "weak": WEAK},
        lambda: by_hand.autoguidance(PLAIN, AWAY, 4.0),
    ),
    "autoguidance with its own scale": (
        [{"name": "autoguidance", "weak": AWAY.func, "guidance_scale": 1.5}],
        lambda: by_hand.autoguidance(PLAIN, AWAY, 1.5),
    ),
    "interval": (
        {"name": "interval", "low": 0.3, "high": 0.8},
        lambda: by_hand.interval(free(), PLAIN, 0.3, 0.8),
    ),
    "sigma interval": (
        {"name": "sigma_interval", "low": 0.4, "high": 3},
        lambda: by_hand.sigma_interval(free(), PLAIN, PATH, 0.4, 3),
    ),
    "thresholded": (
        {"name": "dynamic_thresholding", "percentile": 0.9},
        lambda: by_hand.dynamic_thresholding(free(), PATH, 0.9),
    ),
    "classifier, but not at the noise": (
        [{"name": "classifier", "log_prob": likes, "guidance_scale": 0.5}, {"name": "interval", "low": 0, "high": 0.9}],
        lambda: by_hand.interval(by_hand.classifier(free(), PATH, likes, 0.5), PLAIN, 0, 0.9),
    ),
    "four": (
        [
            {"name": "apg", "eta": 0.5},
            {"name": "autoguidance", "weak": WEAK, "guidance_scale": 2},
            {"name": "interval", "low": 0.2, "high": 0.8},
            "dynamic_thresholding",
        ],
        lambda: by_hand.dynamic_thresholding(
            by_hand.interval(
                by_hand.autoguidance(by_hand.apg(DENOISER, COND, UNCOND, 4.0, eta=0.5), AWAY, 2), PLAIN, 0.2, 0.8
            ),
            PATH,
        ),
    ),
}


@pytest.mark.parametrize("name", HAND)
@torch.no_grad()
def test_by_name_is_by_hand(name: str) -> None:
    guidance, made = HAND[name]
    asked = dict(steps=STEPS, guidance_scale=4.0, sampler="ddim")
    found = sample_latents(PARTS, COND, UNCOND, X, guidance=guidance, **asked)
    expected = ddim(made(), PATH, X, PARTS.schedule.times(STEPS))
    assert torch.equal(found, expected)
    assert name == "the default" or not torch.equal(found, sample_latents(PARTS, COND, UNCOND, X, **asked))


@torch.no_grad()
def test_in_turns() -> None:
    rows = counted()
    denoise = guide(rows.denoiser, COND, UNCOND, 4.0, rescale=0.5, one_batch=False)
    answer = denoise(X, torch.tensor(0.5, dtype=torch.float64))
    assert rows.seen == [2, 2]
    expected = free(rescale=0.5, one_batch=False)(X, torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(answer.x0, expected.x0)


class counted:
    """A denoiser that keeps how many rows its network was asked for."""

    def __init__(self) -> None:
        self.seen: list[int] = []

        def net(x: Tensor, time: Tensor, cond: Any) -> Tensor:
            self.seen.append(len(x))
            return PARTS.net(x, time, cond)

        self.denoiser = Denoiser(net, PATH, DENOISER.prediction, DENOISER.time_input)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "unipc", "midpoint", "predictor_corrector"])
def test_outside_the_interval_only_one_half_is_asked(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[float, int]] = []
    forward = type(PARTS.net).forward

    def spy(net: Any, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        rows.append((time[0].item() / 1000, len(x)))
        return forward(net, x, time, cond)

    monkeypatch.setattr(type(PARTS.net), "forward", spy)
    asked: dict[str, Any] = {"name": "interval", "low": 0.4, "high": 0.9}
    sample_latents(PARTS, COND, UNCOND, X, steps=6, guidance_scale=4.0, sampler=sampler, guidance=asked)
    assert {n for t, n in rows if 0.4 < t <= 0.9} == {4} and {n for t, n in rows if not 0.4 < t <= 0.9} == {2}


@torch.no_grad()
def test_weak_models_in_every_form(tmp_path: Any) -> None:
    """A network, parts, a pipeline or its folder."""
    strong, weak = ours("unet"), ours("unet")
    tiny.randomize(weak.net, 9)
    weak.save_pretrained(tmp_path / "weak")
    call = dict(num_inference_steps=3, guidance_scale=2.0, latents=noise(1), output_type="latent")
    forms = [weak.net, weak.parts, weak, tmp_path / "weak", str(tmp_path / "weak")]
    drawn = [strong("zebra", guidance={"name": "autoguidance", "weak": one}, **call).images for one in forms]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    assert not torch.equal(drawn[0], strong("zebra", **call).images)


def test_what_is_remembered_is_made_anew_for_each_call() -> None:
    pipe = ours("unet")
    call = dict(num_inference_steps=3, guidance_scale=4.0, latents=noise(1), output_type="latent", guidance="apg")
    assert torch.equal(pipe("zebra", **call).images, pipe("zebra", **call).images)


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ("agp", "guidance 'agp' is not one of classifier_free, .*; did you mean 'apg'"),
        ({"low": 0.2}, "guidance None is not one of"),
        ({"name": "apg", "etta": 1}, "guidance apg has no option 'etta'; it takes .*; did you mean 'eta'"),
        ({"name": "apg", "eta": "much"}, "guidance apg: eta is 'much', expected a number"),
        ({"name": "apg", "eta": float("nan")}, "guidance apg: eta is nan, expected a number"),
        (["apg", 3], "guidance is 3; expected a name"),
        ({"name": "apg", "denoiser": 1}, "has no option 'denoiser'"),
        ({"name": "apg", "guidance_scale": 3}, "guidance_scale is the call's own"),
        ({"name": "interval", "low": 0.1}, "guidance interval: high must be given"),
        ({"name": "interval", "low": 0.9, "high": 0.1}, "low is 0.9 and high is 0.1"),
        ({"name": "sigma_interval", "low": 3, "high": 1}, "low is 3 and high is 1"),
        ("autoguidance", "guidance autoguidance: weak must be given"),
        (["apg", {"name": "autoguidance", "weak": WEAK}], "guidance autoguidance: guidance_scale must be given"),
        ({"name": "autoguidance", "weak": 3}, "weak is 3; expected a network, Parts, a pipeline or its folder"),
        ({"name": "autoguidance", "weak": parts("unet_v")}, "weak walks on DiscreteVP.*, the model on RectifiedFlow"),
        ({"name": "classifier", "log_prob": "a", "guidance_scale": 1}, "log_prob is 'a', expected a Python function"),
        (["interval", "apg"], "apg asks the network itself, and can only be the first"),
        (["apg", "classifier_free"], "classifier_free asks the network itself"),
    ],
)
def test_what_is_refused(guidance: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guide(DENOISER, COND, UNCOND, 4.0, guidance=guidance)


def test_more_that_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance_rescale is 0\.5, but apg has none"):
        guide(DENOISER, COND, UNCOND, 4.0, guidance="apg", rescale=0.5)
    with pytest.raises(ValueError, match=r"guidance_scale 4\.0 needs the conditioning to lead away from"):
        guide(DENOISER, COND, None, 4.0, guidance="apg")
    answer = guide(DENOISER, COND, None, 1.0)(X, torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(answer.x0, PLAIN(X, torch.tensor(0.5, dtype=torch.float64)).x0)
