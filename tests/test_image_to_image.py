"""Image to image beyond what stock pipelines compare (``test_pipeline_stock``): what it takes, refuses and shares."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from PIL import Image

from pipelines import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline, UpscalePipeline, core
from pipelines.core import steps_walked
from pipelines.pictures import to_pictures
from tests import families, tiny
from tests.families import quiet
from tests.forms import PICTURE, noise, ours, parts
from tests.test_pipeline_stock import ROWS, pictures, seeds

CALL: dict[str, Any] = dict(num_inference_steps=4, strength=0.5, guidance_scale=2.0, output_type="latent")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return quiet(ImageToImagePipeline.from_parts(parts("unet")))


def square(n: int = 1) -> list[Image.Image]:
    return pictures(n, 16, 16)


# --- pictures ----------------------------------------------------------------------------------------------------


def test_one_picture_in_all_its_forms():
    picture = square()[0]
    array = np.array(picture)
    expected = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
    floats = array / 255
    forms: list[Any] = [
        picture, [picture], array, array[None], floats, [floats.astype(np.float32)], picture.convert("RGBA"),
        torch.from_numpy(floats).permute(2, 0, 1)[None].half(), torch.from_numpy(array).permute(2, 0, 1),
    ]  # fmt: skip
    for form in forms:
        assert to_pictures(form).dtype == torch.float32
        torch.testing.assert_close(to_pictures(form), expected, rtol=0, atol=1e-3 if form is forms[7] else 1e-6)
    two = square(2)
    assert to_pictures(two).shape == to_pictures(np.stack([np.array(x) for x in two])).shape == (2, 3, 16, 16)


def test_pictures_are_upright_on_white_and_in_colour():
    see_through = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    assert (to_pictures(see_through) == 1).all()
    assert to_pictures(Image.new("L", (4, 2), 255)).shape == to_pictures(np.ones((2, 4))).shape == (1, 3, 2, 4)
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6
    assert to_pictures(turned).shape == (1, 3, 4, 2)
    assert to_pictures(Image.new("RGB", (9, 5)), (8, None)).shape == (1, 3, 8, 9)
    assert to_pictures(np.zeros((5, 9, 3)), (8, 16)).shape == (1, 3, 8, 16)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "image is NoneType; expected a picture"),
        ("cat.png", "image is str; expected a picture of Pillow, numpy or torch"),
        ([], "an empty list"),
        ([Image.new("RGB", (4, 4)), np.zeros((4, 4, 3))], "one kind"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 6))], "pictures of 4 by 4 and 6 by 4 pixels together"),
        (torch.rand(3, 16, 16) * 2 - 1, r"image: numbers from -0\.9.*x / 2 \+ 0\.5"),
        (np.full((16, 16, 3), 200.0), "numbers from 200 to 200; expected 0 to 1, or uint8"),
        (torch.full((3, 16, 16), torch.nan), "numbers from nan"),
        (torch.zeros(5, 16, 16), r"shape \(1, 5, 16, 16\); expected numpy's \(H, W, 3\), torch's \(3, H, W\)"),
        (np.zeros((15, 16, 3)), "image: its height is 15, expected a multiple of 2.*height and width bring it"),
        (torch.zeros(3, 3, 16, 16), "image: 3 for 2 prompts; expected 1, or one for each"),
    ],
)
def test_a_wrong_picture_is_refused(pipe, image, message):
    with pytest.raises(ValueError, match=message):
        pipe(["a", "b"], image, **CALL)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(strength=1.5), ValueError, r"strength is 1\.5, expected 0 to 1"),
        (dict(strength=-0.1), ValueError, r"strength is -0\.1"),
        (dict(strength=0.2), ValueError, r"strength 0\.2 of num_inference_steps 4 is less than one step"),
        (dict(image_guidance_scale=1.5), ValueError, "image_guidance_scale is for networks that edit"),
        (dict(latents=torch.zeros(1, 4, 8, 9)), ValueError, r"latents: \(1, 4, 8, 9\), expected \(1, 4, 8, 8\)"),
        (dict(height=17), ValueError, "its height is 17, expected a multiple of 2"),
        (dict(negative_promt="x"), TypeError, "no argument 'negative_promt'; did you mean 'negative_prompt'"),
        (dict(long_promt="cut"), TypeError, "did you mean 'long_prompt'"),
    ],
)
def test_a_wrong_argument_is_named(pipe, wrong, error, message):
    with pytest.raises(error, match=message):
        pipe("zebra", square()[0], **(CALL | wrong))


def test_a_network_of_another_kind_names_its_pipeline():
    for row, name in (("sd paints, 9 channels", "InpaintPipeline"), ("upscales", "UpscalePipeline")):
        with pytest.raises(ValueError, match=rf"call pipelines\.{name}\.from_pipe\(pipe\)"):
            ImageToImagePipeline.from_parts(ROWS[row].parts())("zebra", square()[0])
    edits = ImageToImagePipeline.from_parts(ROWS["sd edits"].parts())
    with pytest.raises(ValueError, match=r"strength is 0\.5, but this network edits from pure noise"):
        edits("zebra", square()[0], 0.5)
    with pytest.raises(ValueError, match=r"image_guidance_scale is 0\.5, expected 1 or more"):
        quiet(edits)("zebra", square()[0], image_guidance_scale=0.5, num_inference_steps=1)


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_equals_single_calls(pipe, count):
    """Two of each prompt, and of each prompt's own picture; stock hands the pictures out in turns: 0, 1, 0, 1."""
    prompts, given = ["a red apple", "a zebra"], square(count)
    four = pipe(prompts, given, num_images_per_prompt=2, generator=seeds(4), **CALL).images
    for i, generator in enumerate(seeds(4)):
        one = pipe(prompts[i // 2], given[i // 2 * (count - 1)], generator=generator, **CALL).images[0]
        assert torch.allclose(four[i], one, atol=1e-5)


def test_one_prompt_goes_with_many_pictures(pipe):
    both = pipe("a zebra", square(2), generator=seeds(), **CALL).images
    assert torch.equal(both, pipe(["a zebra"] * 2, square(2), generator=seeds(), **CALL).images)


def test_latents_stand_for_the_picture_and_little_strength_keeps_it(pipe):
    latents = noise(1)
    call = CALL | dict(num_inference_steps=1000, strength=0.002, guidance_scale=1.0)
    drawn = pipe("zebra", latents, **call).images
    assert drawn.shape == latents.shape and 0 < (drawn - latents).abs().max() < 0.2
    assert (pipe("zebra", latents, **(call | dict(num_inference_steps=2, strength=1.0))).images - latents).std() > 0.5


def test_steps_and_callbacks_are_those_that_are_walked(pipe):
    seen: list[Any] = []

    def callback(_, step, timestep, tensors):
        seen.append((step, float(timestep)))
        pipe._interrupt = step == 2

    call = CALL | dict(num_inference_steps=10, callback_on_step_end=callback)
    pipe("zebra", square()[0], **call)
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] < 700 and pipe.num_timesteps == 5
    assert [steps_walked(10, s) for s in (0.1, 0.55, 0.99, 1.0)] == [1, 5, 9, 10]
    assert [steps_walked(10, s, "sd3") for s in (0.01, 0.55, 0.99, 1.0)] == [1, 6, 10, 10]


def test_defaults_are_stocks():
    for name in ("sd", "sdxl", "sd3", "sd edits"):
        row = ROWS[name]
        made = quiet(row.ours.from_parts(row.parts()))
        told = defaults_of(row.stock)
        made("zebra", square()[0], output_type="latent", callback_on_step_end=stop)
        steps, strength = told["num_inference_steps"], told.get("strength", 1.0)
        assert made.num_timesteps == steps_walked(steps, strength, made.text.family), name
        assert made.guidance_scale == told["guidance_scale"], name


def stop(pipe: Any, *_: Any) -> None:
    pipe._interrupt = True


def defaults_of(stock: str) -> dict[str, Any]:
    return {key: p.default for key, p in inspect.signature(getattr(diffusers, stock).__call__).parameters.items()}


# --- the same weights in another pipeline --------------------------------------------------------------------------


def test_from_pipe_shares_the_weights(pipe):
    for kind in (TextToImagePipeline, InpaintPipeline, UpscalePipeline):
        assert (kind.from_pipe(pipe).net, kind.from_pipe(pipe).vae) == (pipe.net, pipe.vae)
    assert kind.from_pipe(pipe, vae=(other := tiny.vae())).vae is other and pipe.vae is not other
    with pytest.raises(ValueError, match="'unet' is no part of a pipeline; net, vae, text and schedule are"):
        TextToImagePipeline.from_pipe(pipe, unet=pipe.net)
    half = families.sd().to(torch.float16)
    half.components.pop("image_encoder", None)
    ours = ImageToImagePipeline.from_pipe(half)
    assert ours.dtype == torch.float16
    assert {p.data_ptr() for p in ours.net.parameters()} == {p.data_ptr() for p in half.unet.parameters()}


def test_a_stock_folder_of_image_to_image_opens_and_is_written_as_text_to_image(tmp_path):
    given = {k: v for k, v in families.sd().components.items() if k != "image_encoder"}
    StableDiffusionImg2ImgPipeline(**given, requires_safety_checker=False).save_pretrained(tmp_path / "a")
    ImageToImagePipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "b")).__name__ == "StableDiffusionPipeline"


# --- where it runs -------------------------------------------------------------------------------------------------


def test_precision_moves(pipe):
    half = quiet(ImageToImagePipeline.from_parts(parts("mmdit"))).to(torch.bfloat16)
    drawn = half("zebra", square()[0], num_inference_steps=2, output_type="np").images
    assert drawn.dtype == np.float32 and np.isfinite(drawn).all() and drawn.std() > 0


def test_sdxls_autoencoder_encodes_in_float32_where_half_would_overflow():
    given = ROWS["sdxl"].parts()
    with torch.no_grad():
        given.vae.encoder.conv_in.weight.mul_(1e5)
    made = quiet(ImageToImagePipeline.from_parts(given)).to(torch.float16)
    made.enable_model_cpu_offload(device="cpu")
    assert made("zebra", square()[0], **CALL).images.isfinite().all()
    assert made.vae.dtype == torch.float16
    assert core._float32_copy(made.vae)._hf_hook is made.vae._hf_hook  # which would bring a copy of the network


def test_model_cpu_offload_wakes_each_part_in_its_turn(monkeypatch):
    """On a CPU the hooks move nothing, but they are called, and chained, as on a GPU."""
    from accelerate.hooks import CpuOffload

    made, woken = ours("unet"), []
    edits = quiet(ImageToImagePipeline.from_pipe(made))
    call = CALL | {"output_type": "np"}
    expected = edits("zebra", square()[0], generator=seeds(1), **call).images
    edits.enable_model_cpu_offload(device="cpu")
    names = {id(getattr(edits, name)): name for name in ("net", "vae", "text")}
    wake = CpuOffload.pre_forward

    def pre_forward(self, module, *args, **kwargs):
        woken.append(names[id(module)])
        return wake(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    for _ in range(2):  # the hooks are put back after a call
        drawn = edits("zebra", square()[0], generator=seeds(1), **call).images
        assert np.array_equal(drawn, expected)
    assert [name for i, name in enumerate(woken) if woken[i - 1 : i] != [name]] == ["text", "vae", "net", "vae"] * 2
    assert [names[id(hook.model)] for hook in edits._all_hooks] == ["text", "net", "vae"]
    assert [hook.hook.prev_module_hook for hook in edits._all_hooks] == [None, *edits._all_hooks[:2]]
    with pytest.raises(ValueError, match="enable_model_cpu_offload"):
        edits.enable_sequential_cpu_offload()


def test_the_autoencoder_in_tiles_and_row_by_row(pipe):
    call = CALL | {"output_type": "pt"}
    given = replace(parts("unet"), vae=tiny.vae())
    made = quiet(ImageToImagePipeline.from_parts(given))
    whole = made("zebra", pictures(2, 48, 48), generator=seeds(), **call).images
    made.vae.enable_slicing()
    assert torch.allclose(made("zebra", pictures(2, 48, 48), generator=seeds(), **call).images, whole, atol=1e-5)
    made.vae.enable_tiling(32)
    tiled = made("zebra", pictures(2, 48, 48), generator=seeds(), **call).images
    assert 0 < (tiled - whole).abs().mean() < 0.05
    assert PICTURE[0] == made.parts.channels
