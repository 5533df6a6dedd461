"""Our pipelines beside their stock namesakes: the same weights, arguments and generators, and the same latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from PIL import Image

from pipelines import ImageToImagePipeline, InpaintPipeline, UpscalePipeline
from pipelines.base import LatentPipeline
from pipelines.core import Parts
from pipelines.stock import from_stock_pipeline, to_stock_pipeline
from tests import families
from tests.families import quiet
from tests.test_conditioning_stock import MADE, sd3

PROMPTS, NEGATIVE, SIZE = ["a red apple", "a zebra"], ["green", ""], dict(height=16, width=24)


def seeds(n: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(n)]


def pictures(n: int = 2, height: int = 16, width: int = 24) -> list[Image.Image]:
    coarse = torch.randint(0, 256, (n, 3, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").round().to(torch.uint8)
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in smooth]


def masks() -> list[Image.Image]:
    made = [Image.new("L", (24, 16)) for _ in range(2)]
    made[0].paste(255, (3, 2, 15, 9))
    made[1].paste(200, (12, 0, 24, 16))
    return made


def stock_of(parts: Parts, name: str) -> Any:
    """A stock pipeline of this name around the parts' weights."""
    pipe: Any = to_stock_pipeline(parts)
    if type(pipe).__name__ != name:
        kind = getattr(diffusers, name)
        given = pipe.components | {"requires_safety_checker": False}
        pipe = kind(**{k: v for k, v in given.items() if k in inspect.signature(kind.__init__).parameters})
    return quiet(pipe)


class Row(NamedTuple):
    ours: type[LatentPipeline]
    parts: Callable[[], Parts]
    stock: str
    call: dict[str, Any]
    sized: bool = True  # stock is told the pictures' size: else it brings them to the network's own


def family(name: str) -> Callable[[], Parts]:
    return lambda: from_stock_pipeline(families.PIPELINES[name]())


HALF, WHOLE = dict(strength=0.55, num_inference_steps=9), dict(strength=1.0, num_inference_steps=5)
FEW = dict(num_inference_steps=5)
TO_IMAGE, PAINT, UPSCALE = ImageToImagePipeline, InpaintPipeline, UpscalePipeline
ROWS = {
    "sd": Row(TO_IMAGE, family("sd"), "StableDiffusionImg2ImgPipeline", HALF, False),
    "sd, all": Row(TO_IMAGE, family("sd"), "StableDiffusionImg2ImgPipeline", WHOLE, False),
    "sdxl": Row(TO_IMAGE, family("sdxl"), "StableDiffusionXLImg2ImgPipeline", HALF | {"guidance_rescale": 0.6}, False),
    "sd3": Row(TO_IMAGE, family("sd3"), "StableDiffusion3Img2ImgPipeline", HALF),
    "sd edits": Row(
        TO_IMAGE, MADE["StableDiffusionInstructPix2PixPipeline"], "StableDiffusionInstructPix2PixPipeline",
        FEW | {"image_guidance_scale": 1.7}, False,
    ),
    "sdxl edits": Row(
        TO_IMAGE, MADE["StableDiffusionXLInstructPix2PixPipeline"], "StableDiffusionXLInstructPix2PixPipeline",
        FEW | {"image_guidance_scale": 1.7, "guidance_rescale": 0.6},
    ),
    "sd paints, 4 channels": Row(PAINT, family("sd"), "StableDiffusionInpaintPipeline", HALF | {"eta": 0.7}),
    "sd paints all, 4 channels": Row(PAINT, family("sd"), "StableDiffusionInpaintPipeline", WHOLE),
    "sd paints, 9 channels": Row(
        PAINT, MADE["StableDiffusionInpaintPipeline"], "StableDiffusionInpaintPipeline", HALF
    ),
    "sd paints all, 9 channels": Row(
        PAINT, MADE["StableDiffusionInpaintPipeline"], "StableDiffusionInpaintPipeline", WHOLE
    ),
    "sdxl paints, 4 channels": Row(PAINT, family("sdxl"), "StableDiffusionXLInpaintPipeline", HALF),
    "sdxl paints, 9 channels": Row(
        PAINT, MADE["StableDiffusionXLInpaintPipeline"], "StableDiffusionXLInpaintPipeline", HALF
    ),
    "sd3 paints, 16 channels": Row(PAINT, sd3, "StableDiffusion3InpaintPipeline", HALF),
    "sd3 paints all, 16 channels": Row(PAINT, sd3, "StableDiffusion3InpaintPipeline", WHOLE),
    "sd3 paints, 33 channels": Row(
        PAINT, MADE["StableDiffusion3InpaintPipeline"], "StableDiffusion3InpaintPipeline", HALF
    ),
    "upscales": Row(
        UPSCALE, MADE["StableDiffusionUpscalePipeline"], "StableDiffusionUpscalePipeline",
        FEW | {"noise_level": 35}, False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=ROWS)
def pair(request) -> tuple[Row, Any, Any]:
    row = ROWS[request.param]
    stock = stock_of(row.parts(), row.stock)
    return row, quiet(row.ours.from_pipe(stock)), stock


def test_latents_are_stocks(pair):
    """Guided, with negative prompts and a generator for each picture; then with one generator and without guidance."""
    row, pipe, stock = pair
    call = dict(prompt=PROMPTS, image=pictures(), output_type="latent") | row.call
    if row.ours is InpaintPipeline:
        call["mask_image"] = masks()
    size = SIZE if row.sized else {}
    for told in (
        lambda: dict(guidance_scale=3.0, negative_prompt=NEGATIVE, generator=seeds()),
        lambda: dict(guidance_scale=1.0, generator=torch.Generator().manual_seed(3)),
    ):
        drawn = pipe(**call, **told()).images
        expected = stock(**call, **size, **told()).images
        assert drawn.shape == expected.shape and drawn.std() > 0.1
        assert (drawn - expected).abs().max() < 1e-4
