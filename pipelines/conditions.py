"""What some networks are shown beside the latents (``kinds``), made as the stock pipelines make it, and drawing with
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.cond import Cond
from ldm.latents import LatentScale
from ldm.models.vae import Moments
from ldm.paths import DiscreteVP

from .core import Generators, Parts, decode, latent_shape, sample_latents, start_latents
from .kinds import kind_of
from .stock import LOW_RES

NOISE_LEVELS: int = LOW_RES["num_train_timesteps"]


# --- pictures (B, 3, H, W) in [-1, 1] -> Cond.extra (B, C', h, w) ----------------------------------------------------


def masked(pictures: Tensor, mask: Tensor) -> Tensor:
    """The pictures, grey where the mask (B, 1, H, W) is 0.5 or more: what is to be painted anew."""
    return pictures * (mask < 0.5)


def inpainting(mask: Tensor, moments: Moments, eps: Tensor, scale: LatentScale) -> Tensor:
    """Mask and masked picture, (B, 1 + C, h, w).

    Args:
        mask: (B, 1, H, W), 1 where it is to be painted anew, cut at 0.5; of each latent its first pixel's.
        moments: of ``masked`` pictures. The stock pipeline draws from them, and takes no mean: so does this.
        eps: (B, C, h, w) to draw with.
        scale: of the latents.
    """
    small = F.interpolate((mask >= 0.5).to(eps.dtype), size=tuple(eps.shape[-2:]))  # the nearest
    return torch.cat([small, scale.normalize(moments.sample(eps))], dim=1)


def small(pictures: Tensor, factor: int) -> Tensor:
    """The pictures at the latents' resolution: of each latent the mean of its pixels, (B, 3, h, w) in [-1, 1]."""
    return F.avg_pool2d(pictures, factor)


def noised(pictures: Tensor, level: Tensor, eps: Tensor) -> Tensor:
    """Small pictures with the noise of the whole-numbered levels (B,), as the upscaler's ``low_res_scheduler`` adds it
    (noise conditioning augmentation, Ho et al. 2021)."""
    path = low_res_path()
    c = path.coeffs((level.double() + 1) / NOISE_LEVELS, pictures.ndim)
    return c.alpha.to(eps.dtype) * pictures + c.sigma.to(eps.dtype) * eps


@cache
def low_res_path() -> DiscreteVP:
    renamed = {"beta_schedule": "schedule"}
    return DiscreteVP(**{renamed.get(key, key): value for key, value in LOW_RES.items()})


# --- drawing -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(
    parts: Parts,
    prompts: Sequence[str],
    pictures: Tensor,
    mask: Tensor | None = None,
    *,
    noise_level: int = 20,
    generator: Generators | None = None,
    noise: Tensor | None = None,
    **kw: Any,
) -> Tensor:
    """Prompts and what the network is shown -> pictures (B, 3, H, W) in [0, 1]: those of the stock pipeline for the
    same input and generators, in which random numbers are drawn in its order.

    Args:
        pictures: (B, 3, H, W) in [-1, 1]: to be painted in, or to be edited; for ``low_resolution`` the small ones,
            (B, 3, h, w).
        mask: (B, 1, H, W) of ``inpaint``.
        noise_level: of ``low_resolution``.
        noise: (B, C, h, w) to start from, in place of the generator's.
        kw: of ``sample_latents``: ``steps``, ``guidance_scale``, … Guidance leads away from the empty text and not from
            the picture: InstructPix2Pix with ``image_guidance_scale=1``, inpainting with ``strength=1``.
    Raises:
        ValueError: the network is shown nothing, or a mask is missing.
    """
    kind, (net, vae) = kind_of(parts.net), (parts.net, parts.vae)
    if kind is None:
        raise ValueError("the network takes no channels beside the latents: it draws from text alone")
    if kind == "inpaint" and mask is None:
        raise ValueError("mask is missing: 1 where the pictures are to be painted anew")
    cond = parts.text.encode(prompts)
    uncond = parts.text.null() if kw.get("guidance_scale", 1.0) > 1 else None
    pictures = pictures.to(net.device)
    f = 1 if kind == "low_resolution" else vae.factor
    shape = latent_shape(parts, len(prompts), *(side // f * vae.factor for side in pictures.shape[-2:]))
    start: dict[str, Any] = {"device": net.device, "dtype": net.dtype}
    level, labels = torch.full((len(prompts),), noise_level, device=net.device), None
    if kind == "low_resolution":  # whose noise the stock pipeline draws first
        extra = noised(pictures.to(net.dtype), level, start_latents(pictures.shape, generator, **start))
        labels = level if net.config.get("num_class_embeds") is not None else None
        noise = start_latents(shape, generator, **start) if noise is None else noise
    else:
        noise = start_latents(shape, generator, **start) if noise is None else noise
        if mask is not None and kind == "inpaint":
            mask = mask.to(net.device)
            moments = vae.encode(masked(pictures, mask).to(vae.dtype))
            extra = inpainting(mask, moments, start_latents(shape, generator, **start), vae.latent_scale)
        else:
            extra = vae.encode(pictures.to(vae.dtype)).mean
    cond = replace(cond, extra=extra, class_labels=labels)
    x = sample_latents(parts, cond, None if uncond is None else beside(uncond, cond), noise, generator=generator, **kw)
    return decode(vae, x, parts.text.family)


def beside(uncond: Cond, cond: Cond) -> Cond:
    """``uncond``, one row or as many, shown what ``cond`` is shown: guidance is away from the text alone."""
    if len(uncond) != len(cond):
        uncond = uncond.map(lambda x: x.expand(len(cond), *x.shape[1:]))
    return replace(uncond, extra=cond.extra, class_labels=cond.class_labels)
