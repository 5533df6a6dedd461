"""What a denoiser is shown beside the latents while it trains, against brute force and the stock classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionInpaintPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ldm import rng
from ldm.latents import LatentScale
from ldm.models.grow import grow_input
from pipelines.stock import LOW_RES
from tests import tiny
from training.batches import Stream, dropped
from training.conditioning import Conditioner, check_conditioning, grown
from training.fit import ConfigError
from training.random_masks import PARTS, RECTANGLES, SEGMENTS, random_masks
from training.schema import AdaptConfig
from training.schema.adapt import Hint, Inpaint, LowResolution

SCALE = LatentScale(0.7, 0.2)
INDEX = torch.arange(40) + 2**33


def shown(section: Any, net: Any = None, seed: int = 5, **kw: Any) -> Conditioner:
    return Conditioner(section, tiny.unet() if net is None else net, seed, 4, SCALE, **kw)


def pictures(rows: int, seed: int = 0, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def encode(x: Tensor) -> Tensor:
    """In an autoencoder's place: raw moments of 4 channels, factor 4."""
    low = F.avg_pool2d(x.float(), 4)
    return torch.cat([low, low[:, :1] * 3, -low - 1, low[:, 1:2]], dim=1)


# --- masks -----------------------------------------------------------------------------------------------------------


def by_hand(u: list[float], height: int, width: int, whole: float) -> Tensor:
    """One mask, pixel by pixel."""
    short, mask = min(height, width), torch.zeros(height, width)
    first, boxes = u[:2], u[2 : 2 + 5 * RECTANGLES]
    brush, half = u[2 + 5 * RECTANGLES : -2], u[-2:]
    tall, wide = height / short, width / short
    points = [(tall * brush[2 + 2 * i], wide * brush[3 + 2 * i]) for i in range(SEGMENTS + 1)]
    for row in range(height):
        for column in range(width):
            y, x, inside = (row + 0.5) / short, (column + 0.5) / short, False
            if int(first[1] * 3) == 0:
                for i in range(RECTANGLES):
                    there, my, mx, h, w = boxes[5 * i : 5 * i + 5]
                    near = abs(y - tall * my) <= tall * (0.05 + h / 4) and abs(x - wide * mx) <= wide * (0.05 + w / 4)
                    inside |= near and (i == 0 or there < 0.5)
            elif int(first[1] * 3) == 1:
                for i in range(2 + int(brush[1] * (SEGMENTS - 1))):
                    a, b = (torch.tensor(p, dtype=torch.float64) for p in points[i : i + 2])
                    p = torch.tensor([y, x], dtype=torch.float64)
                    along = (((p - a) @ (b - a)) / ((b - a) @ (b - a))).clamp(0, 1)
                    inside |= bool((p - a - along * (b - a)).norm() <= 0.02 + 0.06 * brush[0])
            else:
                side, share = int(half[0] * 4), 0.25 + half[1] / 2
                across = y / tall if side < 2 else x / wide
                inside = (across if side % 2 == 0 else 1 - across) < share
            mask[row, column] = float(inside or first[0] < whole)
    return mask


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (21, 9)])
def test_random_masks_are_what_they_say(size: tuple[int, int]):
    masks = random_masks(5, INDEX, size, 0.2)
    u = rng.uniform(5, INDEX, (sum(PARTS),), Stream.MASK)
    assert masks.shape == (40, 1, *size) and masks.dtype == torch.float32
    expected = torch.stack([by_hand(row, *size, 0.2) for row in u.tolist()])
    # a pixel on the very border may fall to either side in float32
    assert (masks[:, 0] != expected).sum() <= 3 and set(masks.unique().tolist()) == {0, 1}
    kinds = (u[:, 1] * 3).long()[u[:, 0] >= 0.2]
    assert len(kinds.unique()) == 3
    assert masks.flatten(1).any(1).float().mean() > 0.9


def test_a_share_of_masks_is_the_whole_picture():
    index = torch.arange(3000)
    masks = random_masks(5, index, (8, 8), 0.25).mean((1, 2, 3))
    assert abs((masks == 1).sum().item() - 750) < 4 * (3000 * 0.25 * 0.75) ** 0.5
    assert (random_masks(5, index[:50], (8, 8), 1.0) == 1).all()
    assert not (random_masks(5, index, (8, 8), 0.0).mean((1, 2, 3)) == 1).any()
    assert 0.15 < masks[masks < 1].mean() < 0.45


def test_a_mask_belongs_to_the_image_and_is_drawn_finer_in_a_larger_picture():
    small, large = random_masks(5, INDEX, (16, 16)), random_masks(5, INDEX, (64, 64))
    one = torch.cat([random_masks(5, i[None], (16, 16)) for i in INDEX])
    assert one.equal(small) and not random_masks(6, INDEX, (16, 16)).equal(small)
    apart = (F.avg_pool2d(large, 4) - small).abs().mean((1, 2, 3))
    assert apart.max() < 0.12  # what the border's pixels hold


# --- inpainting ------------------------------------------------------------------------------------------------------


def stock_inputs(mask: Tensor, masked_image: Tensor, eps: Tensor) -> Tensor:
    """``prepare_mask_latents`` of the stock pipeline on this autoencoder, whose draw takes these numbers."""

    class Drawn(DiagonalGaussianDistribution):
        def sample(self, generator: Any = None) -> Tensor:  # type: ignore[override]
            return self.mean + self.std * eps

    vae = SimpleNamespace(
        config=SimpleNamespace(scaling_factor=SCALE.scale),
        encode=lambda x: SimpleNamespace(latent_dist=Drawn(encode(x))),
    )
    pipe: Any = SimpleNamespace(vae=vae, vae_scale_factor=4)
    pipe._encode_vae_image = lambda x, generator: StableDiffusionInpaintPipeline._encode_vae_image(pipe, x, generator)
    told = len(mask), *mask.shape[-2:], torch.float32, "cpu", None, False
    small, latents = StableDiffusionInpaintPipeline.prepare_mask_latents(pipe, mask, masked_image, *told)
    return torch.cat([small, latents - SCALE.scale * SCALE.shift], dim=1)  # this one knows no shift


@pytest.mark.parametrize("masks", ["random", "given"])
def test_inpainting_is_shown_what_the_stock_pipeline_shows(masks: Any):
    conditioner = shown(Inpaint(name="inpaint", masks=masks))
    x, grey = pictures(40), torch.rand(40, 1, 16, 24)
    batch = {"index": INDEX, "pictures": x, "pixel_mask": grey}
    extra = conditioner.extra(batch, encode)
    mask = (grey >= 0.5).float() if masks == "given" else random_masks(5, INDEX, (16, 24))
    eps = rng.normal(5, INDEX, (4, 4, 6), Stream.SHOWN)
    torch.testing.assert_close(extra, stock_inputs(mask, x * (mask < 0.5), eps), rtol=1e-5, atol=1e-5)
    assert extra[:, :1].equal(mask[:, :, ::4, ::4]) and extra.shape == (40, 5, 4, 6)
    assert conditioner.needs_pictures and conditioner.class_labels(batch) is None
    some = {k: v[7:9] for k, v in batch.items()}
    torch.testing.assert_close(conditioner.extra(some, encode), extra[7:9])


# --- small pictures --------------------------------------------------------------------------------------------------


def test_small_pictures_have_the_noise_of_the_stock_scheduler():
    net = grown(LowResolution(name="low_resolution"), tiny.unet())
    conditioner, x = shown(LowResolution(name="low_resolution"), net), pictures(40)
    batch = {"index": INDEX, "pictures": x}
    extra, levels = conditioner.extra(batch, encode), conditioner.class_labels(batch)
    assert levels is not None and levels.dtype == torch.int64 and 0 <= levels.min() < levels.max() <= 350
    low = torch.stack([x[..., r::4, c::4] for r in range(4) for c in range(4)]).mean(0)  # the mean of 4 x 4 pixels
    noise = rng.normal(5, INDEX, (3, 4, 6), Stream.SHOWN)
    stock = DDPMScheduler(**LOW_RES).add_noise(low, noise, cast(Any, levels))
    torch.testing.assert_close(extra, stock, rtol=1e-4, atol=1e-5)  # a product of float32 factors in stock
    assert extra.shape == (40, 3, 4, 6)
    untold = shown(LowResolution(name="low_resolution"), tiny.unet())
    assert untold.class_labels(batch) is None and untold.extra(batch, encode).equal(extra)


@pytest.mark.parametrize("most", [0, 3, 999])
def test_every_level_up_to_the_last_comes_as_often(most: int):
    section = LowResolution(name="low_resolution", max_noise_level=most)
    conditioner = shown(section, grown(section, tiny.unet()))
    levels = conditioner.class_labels({"index": torch.arange(8000)})
    assert levels is not None and (levels.min() >= 0) and levels.max() <= most
    counts = torch.bincount(levels, minlength=most + 1)
    share = 1 / (most + 1)
    if most < 10:
        assert (counts - 8000 * share).abs().max() <= 4 * (8000 * share * (1 - share)) ** 0.5 + 1e-6
    else:
        assert abs(levels.float().mean().item() - most / 2) < 4 * most / (12 * 8000) ** 0.5


# --- hints -----------------------------------------------------------------------------------------------------------


def test_a_hint_is_raw_latents_without_noise():
    conditioner = shown(Hint(name="image", dropout=0.0))
    batch = {"index": INDEX, "hint": pictures(40, 3)}
    extra = conditioner.extra(batch, encode)
    assert extra.equal(encode(batch["hint"])[:, :4]) and not conditioner.needs_pictures


def test_hints_and_captions_are_dropped_as_in_instruct_pix2pix():
    """A twentieth loses its caption alone, a twentieth its picture alone, and a twentieth both."""
    n = 20_000
    index = torch.arange(n)
    conditioner = shown(Hint(name="image"), caption_dropout=0.1)
    batch = {"index": index, "hint": torch.ones(n, 3, 4, 4)}
    no_hint = conditioner.extra(batch, encode).eq(0).flatten(1).all(1)
    no_text = dropped(5, index, 0.1)
    for share in (no_text & ~no_hint, no_hint & ~no_text, no_text & no_hint):
        assert abs(share.sum().item() - n / 20) < 4 * (n * 0.05 * 0.95) ** 0.5
    assert not conditioner.extra(batch, encode, train=False).eq(0).flatten(1).all(1).any()


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "channels"),
    [
        (Inpaint(name="inpaint"), 9),
        (Hint(name="image"), 8),
        (LowResolution(name="low_resolution"), 7),
    ],
)
def test_a_network_grows_as_the_section_says(section: Any, channels: int):
    net = grown(section, tiny.unet())
    assert net.config["in_channels"] == channels
    assert (net.config["num_class_embeds"] == 1000) == (section.name == "low_resolution")
    assert grown(section, net) is net
    assert grown(section, tiny.mmdit()).config["in_channels"] == channels
    other = Hint(name="image") if channels != 8 else Inpaint(name="inpaint")
    with pytest.raises(ValueError, match=f"takes {channels} channels"):
        grown(other, net)


def config(**kw: Any) -> AdaptConfig:
    data = {"path": "unused", **kw.pop("data", {})}
    base = {"task": "adapt", "output_dir": "unused", "base": "unused", "train": {"images": 8, "batch_size": 2}}
    return AdaptConfig.model_validate({**base, "data": data, **kw})


def base(more: int = 0, family: str = "sd", channels: int = 4) -> Any:
    def blank() -> Any:
        net = {"sd3": tiny.mmdit, "pixart": tiny.dit}.get(family, tiny.unet)(
            in_channels=channels, out_channels=channels
        )
        if more:
            grow_input(net, channels + more)
        return net

    return SimpleNamespace(
        blank=blank, family=family, channels=channels, folder="FOLDER", net={"in_channels": channels + more}
    )


INPAINT: Any = {"name": "inpaint"}


@pytest.mark.parametrize(
    ("given", "of", "says"),
    [
        ({}, base(5), r"conditioning is missing.*9 channels.*\{name: inpaint\}"),
        ({}, base(2), "in_channels is 6, for latents of 4"),
        ({"conditioning": INPAINT}, base(4), "conditioning inpaint: the base FOLDER was made for image"),
        (
            {"conditioning": INPAINT},
            base(0, "pixart"),
            "family is pixart; what there is: StableDiffusionInpaintPipeline",
        ),
        (
            {"conditioning": {"name": "low_resolution"}},
            base(0, "sd3", 16),
            "what there is: StableDiffusionUpscalePipel",
        ),
        ({"conditioning": INPAINT}, base(0, "sd", 8), "needs 4 latent channels, the base has 8"),
        ({"conditioning": INPAINT | {"masks": "given"}}, base(), "set data.mask_column or data.mask_suffix"),
    ],
)
def test_a_base_that_does_not_go_with_the_conditioning_is_refused(given: dict, of: Any, says: str):
    with pytest.raises(ConfigError, match=says):
        check_conditioning(config(**given), of)


def test_what_goes_together_is_let_through():
    check_conditioning(config(), base())
    check_conditioning(config(conditioning=INPAINT), base())
    check_conditioning(config(conditioning=INPAINT), base(5))
    check_conditioning(config(conditioning=INPAINT), base(0, "sd3", 16))
    masked = INPAINT | {"masks": "given"}
    check_conditioning(config(conditioning=masked, data={"mask_suffix": "-mask.png"}), base())
