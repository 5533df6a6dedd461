"""Inversion leads back to the pictures, and editing changes what it is asked to."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.core import Parts, decode
from pipelines.inversion import edit, encode, invert
from pipelines.stock import from_stock_pipeline
from pipelines.text_to_image import TextToImagePipeline
from tests import families, forms, tiny
from tests.forms import quiet

TEXTS = ["a red apple", "zebra"]
STEPS = 6


@cache
def pipe_of(family: str) -> TextToImagePipeline:
    stock = family in families.PIPELINES
    parts = from_stock_pipeline(families.PIPELINES[family]()) if stock else forms.parts(family)
    with torch.no_grad():  # as smooth as trained ones are: else no iteration finds a step's fixed point
        for name, p in parts.net.named_parameters():
            p.mul_(0.02 if name.startswith(("conv_out", "proj_out")) else 1)
    return quiet(TextToImagePipeline.from_parts(parts))


@cache
def pictures() -> Tensor:
    """(2, 3, 16, 16) in [0, 1], as smooth as pictures are."""
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear").clamp(0, 1)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize("family", ["sdxl", "sd3", "unet_v"])
def test_the_way_back_leads_to_the_pictures(family: str) -> None:
    pipe = pipe_of(family)
    z = encode(pipe, pictures())
    call: dict[str, Any] = dict(num_inference_steps=STEPS, guidance_scale=1.0)

    def back(iterations: int) -> Any:
        noise = invert(pipe, pictures(), TEXTS, iterations=iterations, **call)
        return pipe(TEXTS, latents=noise, sampler="ddim", output_type="latent", **call).images

    plain, solved = error(back(1), z), error(back(6), z)
    assert solved < 0.01 and solved < plain / 5


def test_the_way_back_with_guidance() -> None:
    pipe, call = pipe_of("unet"), dict(num_inference_steps=STEPS, guidance_scale=2.0, guidance="apg")
    noise = invert(pipe, pictures(), TEXTS, negative_prompt="green", iterations=6, **call)
    back = pipe(TEXTS, negative_prompt="green", latents=noise, sampler="ddim", output_type="pt", **call).images
    assert error(back, decode(pipe.vae, encode(pipe, pictures()))) < 0.02


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("family", ["sd", "unet"])
def test_with_the_same_prompt_nothing_is_edited(family: str, strength: float) -> None:
    pipe = pipe_of(family)
    asked: dict[str, Any] = dict(
        source_prompt=TEXTS, strength=strength, num_inference_steps=STEPS, guidance_scale=5.0, iterations=6,
        output_type="latent",
    )  # fmt: skip
    z = encode(pipe, pictures())
    same, changed = (error(edit(pipe, pictures(), prompt, **asked), z) for prompt in (TEXTS, TEXTS[::-1]))
    assert same < 0.01 and same < changed / 4
    if strength < 1:
        assert changed < error(edit(pipe, pictures(), TEXTS[::-1], **asked | {"strength": 1.0}), z)


def test_every_form_of_pictures_and_of_answers() -> None:
    pipe = pipe_of("unet")
    whole = (pictures() * 255).round() / 255
    files = [Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy()) for x in whole]
    asked: dict[str, Any] = dict(strength=0.4, num_inference_steps=5, iterations=1)
    expected = edit(pipe, whole, "zebra", output_type="pt", **asked)
    assert expected.shape == (2, 3, 16, 16) and expected.min() >= 0 and expected.max() <= 1
    torch.testing.assert_close(edit(pipe, files, "zebra", output_type="pt", **asked), expected, rtol=0, atol=1e-4)
    array = edit(pipe.parts, whole, ["zebra"], output_type="np", **asked)
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), expected, rtol=0, atol=1e-4)
    (drawn,) = edit(pipe, files[0], "zebra", **asked)
    assert isinstance(drawn, Image.Image) and drawn.size == (16, 16)


def test_latents_are_the_mean_or_drawn() -> None:
    pipe = pipe_of("unet")
    moments = pipe.vae.encode(2 * pictures() - 1)
    torch.testing.assert_close(encode(pipe, pictures()), pipe.vae.latent_scale.normalize(moments.mean))
    eps = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(3))
    found = encode(pipe, pictures(), torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, pipe.vae.latent_scale.normalize(moments.sample(eps)))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"pictures": torch.zeros(3, 15, 16)}, "picture of 15 by 16 pixels"),
        ({"pictures": torch.full((1, 3, 16, 16), 2.0)}, "image: numbers from 2 to 2; expected 0 to 1"),
        ({"pictures": []}, "image is an empty list"),
        ({"pictures": [Image.new("RGB", (16, 16)), Image.new("RGB", (8, 8))]}, "or one size"),
        ({"prompt": ["a"] * 3}, "prompt: 3 for 2 pictures; expected 1, or one for each"),
        ({"strength": 0.01}, "less than one step"),
        ({"iterations": 0}, "iterations is 0"),
        ({"output_type": "jpg"}, "output_type 'jpg' is not one of"),
        ({"guidance": "cfg"}, "guidance 'cfg' is not one of"),
        ({"pipe": "folder"}, "pipe is str; expected one of our pipelines"),
    ],
)
def test_what_is_refused(told: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"pipe": pipe_of("unet"), "pictures": pictures(), "prompt": "zebra"}
    with pytest.raises(ValueError, match=message):
        edit(**asked | {"num_inference_steps": 5} | told)


def test_a_model_that_is_shown_more_is_refused() -> None:
    parts: Parts = forms.parts("unet")
    shown = Parts(tiny.unet(in_channels=9), parts.vae, parts.text, parts.schedule)
    with pytest.raises(ValueError, match="the network takes 9 channels"):
        invert(shown, pictures())
