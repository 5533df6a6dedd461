"""Upscaling beyond what the stock pipeline compares (``test_pipeline_stock``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines import UpscalePipeline
from tests.families import quiet
from tests.forms import parts
from tests.test_pipeline_stock import ROWS, pictures, seeds

CALL: dict[str, Any] = dict(num_inference_steps=3, output_type="pt")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return quiet(UpscalePipeline.from_parts(ROWS["upscales"].parts()))


def test_pictures_are_larger_and_a_batch_equals_single_calls(pipe):
    prompts, small = ["a red apple", "a zebra"], pictures(2, 8, 12)
    four = pipe(prompts, small, num_images_per_prompt=2, generator=seeds(4), **CALL).images
    assert four.shape == (4, 3, 16, 24)
    for i, generator in enumerate(seeds(4)):
        one = pipe(prompts[i // 2], small[i // 2], generator=generator, **CALL).images[0]
        assert torch.allclose(four[i], one, atol=1e-5)


def test_the_level_is_told_and_defaults_are_stocks(pipe):
    drawn = [
        pipe("zebra", pictures(1, 8, 8), generator=seeds(1), **CALL, **level).images
        for level in (dict(noise_level=20), {}, dict(noise_level=300))
    ]
    assert torch.equal(drawn[0], drawn[1]) and (drawn[1] - drawn[2]).abs().max() > 1e-3
    pipe("zebra", pictures(1, 8, 8), output_type="latent")
    assert (pipe.num_timesteps, pipe.guidance_scale) == (75, 9.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(noise_level=1000), "noise_level is 1000, expected 0 to 999"),
        (dict(noise_level=-1), "noise_level is -1"),
        (dict(image=None), "image is NoneType"),
        (dict(image=pictures(3, 8, 8)), "image: 3 for 2 prompts"),
        (dict(image=pictures(1, 8, 9)), "nearest that fits"),
        (dict(latents=torch.zeros(2, 4, 8, 9)), r"latents: \(2, 4, 8, 9\), expected \(2, 4, 8, 8\)"),
    ],
)
def test_a_wrong_argument_is_named(pipe, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipe(**(dict(prompt=["a", "b"], image=pictures(1, 8, 8)) | CALL | wrong))


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="of the kind None, expected 'low_resolution'"):
        UpscalePipeline.from_parts(parts("unet"))("zebra", pictures(1, 8, 8)[0])
