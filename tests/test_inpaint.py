"""Inpainting beyond what stock pipelines compare (``test_pipeline_stock``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import InpaintPipeline
from pipelines.core import encode
from pipelines.pictures import to_masks, to_pictures
from tests.families import quiet
from tests.forms import noise, parts
from tests.test_pipeline_stock import ROWS, pictures, seeds, stock_of

CALL: dict[str, Any] = dict(num_inference_steps=4, guidance_scale=2.0, output_type="latent")


@pytest.fixture(scope="module")
def plain() -> Any:
    return quiet(InpaintPipeline.from_parts(parts("unet")))


@pytest.fixture(scope="module")
def shown() -> Any:
    return quiet(InpaintPipeline.from_parts(ROWS["sd paints, 9 channels"].parts()))


def mask(height: int = 16, width: int = 16) -> np.ndarray:
    made = np.zeros((height, width), dtype=np.float32)
    made[4:12, 2:10] = 1
    return made


def test_one_mask_in_all_its_forms():
    array, expected = mask(), torch.from_numpy(mask())[None, None]
    picture = Image.fromarray((array * 255).astype(np.uint8))
    forms = [
        picture, picture.convert("RGB"), array, [array], array[..., None], array[None], array.astype(np.uint8) * 255,
        array.astype(np.uint8), torch.from_numpy(array).bool(), array[::-1].copy()[::-1],
        torch.from_numpy(array), torch.from_numpy(array)[None], expected, array * 0.4 + 0.3,
    ]  # fmt: skip
    for form in forms:
        assert torch.equal(to_masks(form, (16, 16)), expected)
    assert to_masks([picture, picture], (8, 24)).shape == (2, 1, 8, 24)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim", "heun", "euler_ancestral", "unipc", "predictor_corrector"])
def test_what_the_mask_does_not_cover_stays_to_the_bit(plain, sampler):
    """With any sampler that walks the grid, for a network that knows nothing of masks."""
    latents = noise(1)
    drawn = plain("zebra", latents, mask(), sampler=sampler, generator=seeds(1), **CALL).images
    covered = torch.from_numpy(mask()[::2, ::2]).expand_as(latents) > 0
    assert torch.equal(drawn[~covered], latents[~covered])
    assert (drawn - latents)[covered].abs().mean() > 0.1


def test_a_callback_sees_what_is_put_back(plain):
    latents, seen = noise(1), []
    covered = torch.from_numpy(mask()[::2, ::2]).expand_as(latents) > 0

    def callback(_, step, timestep, tensors):
        seen.append((tensors["latents"] - latents)[~covered].std().item())

    plain("zebra", latents, mask(), callback_on_step_end=callback, **CALL)
    assert seen[0] > seen[1] > seen[2] > seen[3] == 0  # less and less noise


@pytest.mark.parametrize("of", ["plain", "shown"])
def test_a_batch_equals_single_calls(of, request):
    pipe, prompts, given = request.getfixturevalue(of), ["a red apple", "a zebra"], pictures(2, 16, 16)
    covers, call = [mask(), 1 - mask()], CALL | {"strength": 0.8}
    four = pipe(prompts, given, covers, num_images_per_prompt=2, generator=seeds(4), **call).images
    for i, generator in enumerate(seeds(4)):
        one = pipe(prompts[i // 2], given[i // 2], covers[i // 2], generator=generator, **call).images[0]
        assert torch.allclose(four[i], one, atol=1e-5)
    alone = pipe("zebra", given[0], covers, generator=seeds(), **call).images  # a picture under two masks
    assert torch.allclose(
        alone[1], pipe("zebra", given[0], covers[1], generator=seeds()[1], **call).images[0], atol=1e-5
    )


def test_both_are_brought_to_a_size(plain):
    picture = pictures(1, 20, 30)[0]
    drawn = plain("zebra", picture, mask(20, 30), 16, 24, generator=seeds(1), **CALL).images
    small = plain("zebra", picture, mask(16, 24), 16, 24, generator=seeds(1), **CALL).images
    assert drawn.shape == small.shape == (1, 4, 8, 12)
    given = plain.parts.vae.latent_scale.normalize(encode(plain.vae, to_pictures(picture, (16, 24))).mean)
    assert (drawn - given).std() > 0.1 and drawn.isfinite().all()


def test_what_is_near_the_mask_is_drawn_alone_and_put_back_as_in_stock(plain):
    from diffusers import StableDiffusionInpaintPipeline

    stock = stock_of(parts("unet"), StableDiffusionInpaintPipeline.__name__)
    picture, cover = pictures(1, 40, 60)[0], Image.new("L", (60, 40))
    cover.paste(255, (30, 10, 41, 22))
    call: dict[str, Any] = dict(prompt="zebra", image=picture, mask_image=cover, height=16, width=24)
    call |= dict(padding_mask_crop=3, num_inference_steps=3)
    drawn, expected = (np.asarray(f(**call, generator=seeds(1)[0]).images[0], dtype=int) for f in (plain, stock))
    assert drawn.shape == (40, 60, 3) and abs(drawn - expected).max() <= 1  # rounding to 256 levels
    changed = (drawn != np.asarray(picture, dtype=int)).any(-1)
    assert changed[10:22, 30:41].mean() > 0.9 and not changed[np.asarray(cover) == 0].any()
    for wrong, message in (
        (dict(mask_image=Image.new("L", (60, 40))), "black all over"),
        (dict(image=[picture]), "one picture of Pillow"),
        (dict(output_type="np"), "output_type is 'np', expected 'pil'"),
    ):
        with pytest.raises(ValueError, match=message):
            plain(**(call | wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(mask_image=None), "mask_image is NoneType; expected a picture"),
        (dict(mask_image=mask(16, 24)), r"mask_image: 16 by 24 pixels \(height, width\), the picture 16 by 16"),
        (dict(mask_image=mask() * 255), "mask_image: numbers from 0 to 255; expected 0 to 1, or uint8"),
        (dict(mask_image=np.zeros((16, 16, 3))), r"mask_image: shape .*expected numpy's \(H, W\)"),
        (dict(mask_image=[mask()] * 3, image=[pictures(1, 16, 16)[0]] * 2), "mask_image: 3 for 2 pictures"),
        (dict(image=None), "image is NoneType"),
        (dict(strength=2), "strength is 2, expected 0 to 1"),
        (dict(sampler="rk45"), "rk45 takes steps of its own"),
        (dict(height=15), "its height is 15, expected a multiple of 2"),
    ],
)
def test_a_wrong_argument_is_named(plain, wrong, message):
    with pytest.raises(ValueError, match=message):
        plain(**(dict(prompt="zebra", image=pictures(1, 16, 16)[0], mask_image=mask()) | CALL | wrong))


def test_networks_and_pictures_that_do_not_go_together_are_refused(shown):
    with pytest.raises(ValueError, match=r"image: shape \(1, 4, 8, 8\)"):  # latents, of which nothing can be masked
        shown("zebra", noise(1), mask(), **CALL)
    edits = InpaintPipeline.from_parts(ROWS["sd edits"].parts())
    with pytest.raises(ValueError, match=r"of the kind 'image': call pipelines\.ImageToImagePipeline"):
        edits("zebra", pictures(1, 16, 16)[0], mask())
