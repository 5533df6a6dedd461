"""Networks that are shown something beside the latents: folders that stock opens, and pictures that are stock's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from torch import Tensor

from ldm.latents import LatentScale
from ldm.models.grow import grow_input, grow_labels
from ldm.models.vae import VAE
from pipelines.conditions import draw, small
from pipelines.core import Parts, decode, generate
from pipelines.folder import load_parts, save_parts
from pipelines.kinds import kind_of
from pipelines.stock import from_stock_pipeline, rescaled, to_stock_pipeline
from pipelines.text_to_image import TextToImagePipeline
from tests import families, tiny
from tests.families import quiet
from training.batches import to_unit
from training.conditioning import Conditioner
from training.schema.adapt import Hint, Inpaint, LowResolution

PROMPTS, STEPS, SCALE, SIDE = ["a red apple", "a zebra"], 4, 3.0, 16


def grown(parts: Parts, more: int, labels: bool = False) -> Parts:
    """With weights in the new places that make a difference."""
    net: Any = parts.net
    grow_input(net, net.config["in_channels"] + more)
    if labels:
        grow_labels(net, 1000)
    new = net.pos_embed.proj.weight if hasattr(net, "pos_embed") else net.conv_in.weight
    with torch.no_grad():
        g = torch.Generator().manual_seed(3)
        new[:, -more:] = 0.2 * torch.randn(new[:, -more:].shape, generator=g)
        if labels:
            net.class_embedding.weight.copy_(0.3 * torch.randn(net.class_embedding.weight.shape, generator=g))
    for module in (net, parts.vae, parts.text):
        module.eval()
    return parts


def sd3() -> Parts:
    parts = from_stock_pipeline(families.sd3())
    width = families.POOLED + families.POOLED_2
    net = tiny.mmdit(
        in_channels=16, out_channels=16, joint_attention_dim=families.T5_WIDTH, pooled_projection_dim=width
    )
    return replace(parts, net=net, vae=tiny.vae(16, shift_factor=0.3))


def sd(**vae: Any) -> Parts:
    parts = from_stock_pipeline(families.sd())
    return replace(parts, vae=tiny.vae(**vae)) if vae else parts


MADE: dict[str, Callable[[], Parts]] = {
    "StableDiffusionInpaintPipeline": lambda: grown(sd(), 5),
    "StableDiffusionXLInpaintPipeline": lambda: grown(from_stock_pipeline(families.sdxl()), 5),
    "StableDiffusion3InpaintPipeline": lambda: grown(sd3(), 17),
    "StableDiffusionInstructPix2PixPipeline": lambda: grown(sd(), 4),
    "StableDiffusionXLInstructPix2PixPipeline": lambda: grown(from_stock_pipeline(families.sdxl()), 4),
    "StableDiffusionUpscalePipeline": lambda: grown(sd(), 3, labels=True),
    "StableDiffusionUpscalePipeline untold": lambda: grown(sd(block_out_channels=(8, 8, 8)), 3),
}


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory) -> SimpleNamespace:
    parts = MADE[request.param]()
    folder = save_parts(tmp_path_factory.mktemp("made") / "pipeline", parts)
    return SimpleNamespace(name=request.param.split()[0], parts=parts, folder=folder)


@pytest.fixture(scope="module")
def inpaint(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("inpaint") / "pipeline", MADE["StableDiffusionInpaintPipeline"]())


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)]


def bytes_of(side: int = SIDE) -> Tensor:
    coarse = torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").round().to(torch.uint8)


def masks() -> Tensor:
    mask = torch.zeros(2, 1, SIDE, SIDE)
    mask[0, :, 3:12, 5:10], mask[1, :, :, 7:] = 1, 1
    return mask


def pil(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray(x.permute(1, 2, 0).numpy().squeeze()) for x in pictures]


def stocks(pipe: Any, pictures: Tensor, **kw: Any) -> Tensor:
    """Its own pictures, called as its documentation says."""
    name = type(pipe).__name__
    how: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    how |= {"generator": seeds(), "output_type": "np", "image": pil(pictures)}
    if "Inpaint" in name:
        how |= {"mask_image": pil((255 * masks()).to(torch.uint8)), "strength": 1.0, "height": SIDE, "width": SIDE}
    if "Pix2Pix" in name:
        how |= {"image_guidance_scale": 1.0}
    if name.startswith(("StableDiffusionXLInstruct",)):
        how |= {"height": SIDE, "width": SIDE}
    if (
        name == "StableDiffusion3InpaintPipeline"
    ):  # which decodes without the VAE's shift, unlike StableDiffusion3Pipeline
        x = quiet(pipe)(**(how | kw | {"output_type": "latent"})).images
        return decode(VAE.from_diffusers(pipe.vae), x, "sd3")
    return torch.from_numpy(quiet(pipe)(**(how | kw)).images).permute(0, 3, 1, 2)


def ours(parts: Parts, pictures: Tensor, **kw: Any) -> Tensor:
    mask = masks() if kind_of(parts.net) == "inpaint" else None
    how = {"steps": STEPS, "guidance_scale": SCALE, "generator": seeds()}
    return draw(parts, PROMPTS, to_unit(pictures), mask, **(how | kw))


def test_stock_opens_the_folder_and_draws_the_same_pictures(made):
    pipe = DiffusionPipeline.from_pretrained(made.folder)
    assert type(pipe).__name__ == made.name
    pictures = bytes_of(8 if "Upscale" in made.name else SIDE)
    theirs, drawn = stocks(pipe, pictures), ours(made.parts, pictures)
    assert drawn.shape == theirs.shape and theirs.std() > 0.05
    torch.testing.assert_close(drawn, theirs, rtol=0, atol=1e-4)
    # of what they are shown: another picture is another drawing, by more than rounding
    other = ours(made.parts, 255 - pictures)
    assert (other - drawn).abs().max() > 0.01


def test_the_folder_comes_back_as_the_parts(made):
    back = load_parts(made.folder)
    assert kind_of(back.net) == kind_of(made.parts.net)
    state = back.net.state_dict()
    assert all(value.equal(state[key]) for key, value in made.parts.net.state_dict().items())
    pictures = bytes_of(8 if "Upscale" in made.name else SIDE)
    torch.testing.assert_close(ours(back, pictures), ours(made.parts, pictures), rtol=0, atol=1e-4)
    again = from_stock_pipeline(DiffusionPipeline.from_pretrained(made.folder))
    assert again.net.config["in_channels"] == made.parts.net.config["in_channels"]


@pytest.mark.parametrize(
    "name",
    ["StableDiffusionInpaintPipeline", "StableDiffusionInstructPix2PixPipeline", "StableDiffusionUpscalePipeline"],
)
def test_the_trainers_sample_is_the_stock_pipelines_picture(name: str):
    """From a batch as the task has it: for the upscaler the pictures are made small, and stock is given those."""
    parts = MADE[name]()
    section = {
        "StableDiffusionInpaintPipeline": Inpaint(name="inpaint"),
        "StableDiffusionInstructPix2PixPipeline": Hint(name="image"),
    }.get(name, LowResolution(name="low_resolution"))
    shown = Conditioner(section, parts.net, 7, parts.vae.factor, parts.vae.latent_scale)
    pictures = bytes_of()
    batch = {"index": torch.tensor([2**40, 2**40 + 3]), "pictures": to_unit(pictures), "hint": to_unit(pictures)}
    drawn = shown.draw(parts, PROMPTS, batch, steps=STEPS, guidance_scale=SCALE, generator=seeds())
    told: dict[str, Any] = {}
    if shown.kind == "inpaint":
        mask = shown.mask(batch)
        assert 0 < mask.mean() < 1
        told["mask_image"] = pil((255 * mask).to(torch.uint8))
    if shown.kind == "low_resolution":
        told["image"] = small(to_unit(pictures), 2) / 2 + 0.5  # stock takes tensors in [0, 1] too
        told["noise_level"] = 20
    theirs = stocks(to_stock_pipeline(parts), pictures, **told)
    torch.testing.assert_close(drawn, theirs, rtol=0, atol=1e-4)


def test_without_guidance_and_from_given_noise(inpaint):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    pipe, parts = DiffusionPipeline.from_pretrained(inpaint), load_parts(inpaint)
    theirs = stocks(pipe, bytes_of(), guidance_scale=1.0, latents=noise)
    drawn = ours(parts, bytes_of(), guidance_scale=1.0, noise=noise)
    torch.testing.assert_close(drawn, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quant", [True, False])
def test_another_scale_of_the_same_autoencoder(quant: bool):
    """Normalized latents and pictures stay; log variances, which the scale moves, stay too once normalized."""
    vae = tiny.vae(use_quant_conv=quant, use_post_quant_conv=quant)
    other = rescaled(vae, 0.08333)
    assert other.latent_scale == LatentScale(0.08333) and vae.latent_scale == LatentScale(0.7)
    a, b = (v.encode(to_unit(bytes_of())) for v in (vae, other))
    old, new = vae.latent_scale, other.latent_scale
    eps = torch.randn(a.mean.shape)
    torch.testing.assert_close(new.normalize(b.mean), old.normalize(a.mean), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new.normalize(b.sample(eps)), old.normalize(a.sample(eps)), rtol=1e-4, atol=1e-5)
    z = torch.randn(a.mean.shape)
    torch.testing.assert_close(other.decode(new.denormalize(z)), vae.decode(old.denormalize(z)), rtol=1e-4, atol=1e-4)


def test_text_alone_is_refused_and_says_what_is_needed(inpaint):
    for folder_of, wanted in (("StableDiffusionInpaintPipeline", "a picture and a mask"),):
        parts = MADE[folder_of]()
        with pytest.raises(ValueError, match=f"9 channels, 5 more than the latents' 4: it draws from {wanted}"):
            generate(parts, PROMPTS, steps=1)
    pipe = quiet(TextToImagePipeline.from_pretrained(inpaint))
    with pytest.raises(ValueError, match="StableDiffusionInpaintPipeline takes them, not from text alone"):
        pipe("a red apple", num_inference_steps=1)
    parts = load_parts(inpaint)
    with pytest.raises(ValueError, match="mask is missing"):
        draw(parts, PROMPTS, to_unit(bytes_of()), steps=1)
    with pytest.raises(ValueError, match="draws from text alone"):
        draw(sd(), PROMPTS, to_unit(bytes_of()), steps=1)


def test_an_inpainting_folder_may_hold_a_network_that_is_shown_nothing(tmp_path):
    plain = families.sd().components
    plain.pop("image_encoder", None)
    StableDiffusionInpaintPipeline(**plain, requires_safety_checker=False).save_pretrained(tmp_path / "a")
    parts = load_parts(tmp_path / "a")
    assert kind_of(parts.net) is None
    save_parts(tmp_path / "b", parts)
    assert json.loads((tmp_path / "b" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def renamed(name: str) -> Callable:
    def change(folder) -> None:
        file = folder / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": name}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("StableDiffusionPipeline"), "no network of 9 input channels; StableDiffusionInpaintPipeline has one"),
        (renamed("StableDiffusionInstructPix2PixPipeline"), "no network of 9 .*StableDiffusionInpaintPipeline has one"),
        (renamed("StableDiffusionUpscalePipeline"), "low_res_scheduler.*missing"),
    ],
)
def test_a_folder_whose_name_and_network_differ_is_refused(inpaint, tmp_path, change, message):
    folder = shutil.copytree(inpaint, tmp_path / "copy")
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_parts(folder)


def test_other_betas_of_the_small_pictures_noise_are_refused(tmp_path):
    folder = save_parts(tmp_path / "a", MADE["StableDiffusionUpscalePipeline"]())
    file = folder / "low_res_scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.012}))
    with pytest.raises(ValueError, match=r"low_res_scheduler.*beta_end 0\.012; only .*0\.02"):
        load_parts(folder)


def test_what_has_no_stock_form_is_refused():
    with pytest.raises(
        ValueError, match=r"no stock pipeline has a DiT of 9 channels, which is shown a picture and a m"
    ):
        to_stock_pipeline(grown(from_stock_pipeline(families.pixart()), 5))
    with pytest.raises(ValueError, match="no stock pipeline has a MMDiT of 20 channels"):
        to_stock_pipeline(grown(replace(sd3(), vae=tiny.vae(10, shift_factor=0.3), net=_narrow()), 10))
    wide = sd(latent_channels=6)
    wide = grown(replace(wide, net=tiny.unet(in_channels=6, out_channels=6, cross_attention_dim=families.WIDTH)), 7)
    with pytest.raises(ValueError, match="StableDiffusionInpaintPipeline takes 9 channels, 4 of them latents; not 6"):
        to_stock_pipeline(wide)
    odd = grown(sd(), 2)
    with pytest.raises(
        ValueError, match=r"in_channels is 6, for latents of 4: expected 4 \(text alone\), 9 \(inpaint\)"
    ):
        to_stock_pipeline(odd)


def _narrow() -> Any:
    width = families.POOLED + families.POOLED_2
    return tiny.mmdit(
        in_channels=10, out_channels=10, joint_attention_dim=families.T5_WIDTH, pooled_projection_dim=width
    )


def test_of_two_kinds_with_as_many_channels_the_told_level_decides():
    net = tiny.unet(in_channels=3, out_channels=3)
    grow_input(net, 6)
    assert kind_of(net) == "image"
    grow_labels(net, 1000)
    assert kind_of(net) == "low_resolution"
    assert np.isfinite(net.conv_in.weight.detach().numpy()).all()
