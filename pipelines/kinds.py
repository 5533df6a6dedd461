"""The kinds of networks that are shown something beside the latents, told by their channels; guidance by what is shown.

They are named as in a config's ``conditioning``:

``inpaint``: a mask, and latents of the masked picture (``StableDiffusionInpaintPipeline``);
``image``: another picture's latents (``StableDiffusionInstructPix2PixPipeline``, Brooks et al. 2023);
``low_resolution``: the picture, small, with noise of a told level (``StableDiffusionUpscalePipeline``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoised, Denoiser
from ldm.guidance import Denoise, rescaled
from ldm.models.base import Network
from ldm.models.grow import latent_channels
from ldm.reuse import once

KINDS = {
    "inpaint": "a picture and a mask, as StableDiffusionInpaintPipeline takes them",
    "image": "a picture, as StableDiffusionInstructPix2PixPipeline takes it",
    "low_resolution": "a small picture, as StableDiffusionUpscalePipeline takes it",
}


def extra_channels(kind: str, latents: int) -> int:
    """How many channels a kind adds to so many latent ones."""
    return {"inpaint": 1 + latents, "image": latents, "low_resolution": 3}[kind]


def kind_of(net: Network) -> str | None:
    """What a network is shown beside the latents; of two kinds with as many channels, by whether it is told a noise
    level. None: nothing.

    Raises:
        ValueError: it has as many more as no kind has.
    """
    latents, total = latent_channels(net), net.config["in_channels"]
    if total == latents:
        return None
    fits = [kind for kind in KINDS if latents + extra_channels(kind, latents) == total]
    if len(fits) > 1:
        labels = net.config.get("num_class_embeds") is not None
        fits = [kind for kind in fits if (kind == "low_resolution") == labels]
    if not fits:
        known = ", ".join(f"{latents + extra_channels(kind, latents)} ({kind})" for kind in KINDS)
        raise ValueError(
            f"the network's in_channels is {total}, for latents of {latents}: expected {latents} (text alone), {known}"
        )
    return fits[0]


def check_shown(net: Network, latents: int, cond: Cond) -> None:
    """Raises ValueError where a network is shown something beside the latents, and ``cond`` has no ``extra``."""
    total = net.config["in_channels"]
    if cond.extra is None and total > latents:
        raise ValueError(
            f"the network takes {total} channels, {total - latents} more than the latents' {latents}: it draws from "
            f"{KINDS[kind_of(net) or 'image']}, not from text alone"
        )


def image_guided(
    denoiser: Denoiser,
    cond: Cond,
    uncond: Cond,
    guidance_scale: float,
    image_guidance_scale: float,
    *,
    rescale: float = 0.0,
    one_batch: bool = True,
) -> Denoise:
    """Guidance of the kind ``image`` by text and by picture, each with a scale of its own (Brooks et al. 2023, eq. 3):

        none + s_I (picture - none) + s_T (text and picture - picture)

    on the network's output. ``uncond`` is shown the picture too; "none" is ``uncond`` with zeros in its place.

    Raises:
        ValueError: image_guidance_scale below 1, rescale outside [0, 1].
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}; expected a number in [0, 1]")
    if image_guidance_scale < 1 or uncond.extra is None:
        raise ValueError(f"image_guidance_scale is {image_guidance_scale}, expected 1 or more, and a picture")

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        both, picture, none = denoiser(x_t, t, [cond, uncond, once(_without_picture, uncond)], one_batch=one_batch)
        output = none.output + image_guidance_scale * (picture.output - none.output)
        output = output + guidance_scale * (both.output - picture.output)
        if rescale:
            output = rescaled(output, both.output, rescale)
        return denoiser.interpret(x_t, t, output)._replace(var_frac=both.var_frac)

    return denoise


def _without_picture(cond: Cond) -> Cond:
    return replace(cond, extra=None if cond.extra is None else torch.zeros_like(cond.extra))
