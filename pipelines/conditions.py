"""What some networks are shown beside the latents (``kinds``), made as the stock pipelines make it, and drawing with
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.cond import Cond
from ldm.latents import LatentScale
from ldm.models.vae import Moments
from ldm.paths import DiscreteVP

from .core import Generators, Parts, decode, encode, latent_shape, sample_latents, start_latents, told
from .kinds import kind_of
from .prompts import LongPrompt
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


class Start(NamedTuple):
    """What sampling begins with, and what the network is shown, a row for each picture to be drawn.

    Args:
        noise: (B, C, h, w) of unit variance.
        source, mask: of ``sample_latents``.
        extra, class_labels: of ``Cond``.
    """

    noise: Tensor
    source: Tensor | None = None
    mask: Tensor | None = None
    extra: Tensor | None = None
    class_labels: Tensor | None = None

    def told(self, cond: Cond, uncond: Cond | None) -> tuple[Cond, Cond | None]:
        """Both shown it: guidance is away from the text alone."""
        cond = replace(cond, extra=self.extra, class_labels=self.class_labels)
        return cond, None if uncond is None else beside(uncond, cond)


@torch.no_grad()
def start(
    parts: Parts,
    rows: int,
    size: tuple[int | None, int | None] = (None, None),
    pictures: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    strength: float = 1.0,
    noise_level: int = 20,
    generator: Generators | None = None,
    noise: Tensor | None = None,
    device: torch.device | None = None,
) -> Start:
    """Random numbers are drawn in the order of the stock pipelines: of the picture's latents, the noise, the masked
    picture's latents; of the upscaler, the small picture's noise and the noise.

    Args:
        rows: B, a multiple of the pictures, which then serve for as many rows in turn, with one generator by one draw.
        size: height and width, where there are no pictures.
        pictures: (n, 3, H, W) in [-1, 1] to begin with, to be painted in or to be edited, or normalized latents
            (n, C, h, w) of them; for ``low_resolution`` the small ones, (n, 3, h, w).
        mask: (1 or n, 1, H, W), 1 where the pictures are to be painted anew.
        strength: below 1 an inpainting network begins with the picture too; all others always do.
        noise_level: of ``low_resolution``.
        noise: (B, C, h, w) in place of the generator's.
    Raises:
        ValueError: what the network's kind needs is missing, or is not for it.
    """
    kind, vae, family = kind_of(parts.net), parts.vae, parts.text.family
    where: dict[str, Any] = {"device": parts.net.device if device is None else device, "dtype": parts.net.dtype}
    shape = _shape(parts, kind, rows, size, pictures, noise)

    def drawn(count: int, of: Sequence[int] = shape[1:], dtype: torch.dtype = parts.net.dtype) -> Tensor:
        """Noise for ``count`` pictures, each serving for as many rows; with a generator for each row, for each."""
        count = count if generator is None or isinstance(generator, torch.Generator) else rows
        return own(start_latents((count, *of), generator, device=where["device"], dtype=dtype))

    def own(x: Tensor) -> Tensor:
        return x.repeat_interleave(rows // len(x), dim=0)

    def fresh() -> Tensor:
        return drawn(rows) if noise is None else noise.to(where["device"])

    if pictures is None:
        return Start(fresh())
    n = len(pictures)
    if kind == "low_resolution":
        if not 0 <= noise_level < NOISE_LEVELS:
            raise ValueError(f"noise_level is {noise_level}, expected 0 to {NOISE_LEVELS - 1}")
        level = torch.full((rows,), noise_level, device=where["device"])
        extra = noised(own(pictures.to(**where)), level, drawn(n, pictures.shape[1:]))
        labels = level if parts.net.config.get("num_class_embeds") is not None else None
        return Start(fresh(), extra=extra, class_labels=labels)
    latents = _are_latents(parts, pictures)
    if kind == "image":
        raw = vae.latent_scale.denormalize(pictures) if latents else encode(vae, pictures, family).mean
        return Start(fresh(), extra=own(raw.to(**where)))
    if kind == "inpaint" and (mask is None or latents):
        raise ValueError(
            "mask is missing: 1 where the pictures are to be painted anew"
            if mask is None
            else "image: the network is shown the masked picture: give it in pixels, not in latents"
        )

    def moments_and_eps(x: Tensor) -> tuple[Moments, Tensor]:
        moments = Moments(*(own(part) for part in encode(vae, x, family)))
        return moments, drawn(n, dtype=moments.mean.dtype).to(moments.mean.device)

    source = None
    if latents:
        source = own(pictures.to(**where))
    elif kind is None or strength < 1:
        moments, eps = moments_and_eps(pictures)
        source = vae.latent_scale.normalize(moments.sample(eps)).to(**where)
    x = fresh()
    if mask is None:
        return Start(x, source)
    if kind is None:
        drawn(n)  # stock's draw of a masked picture that no one is shown: a sampler's noise comes after it
        small = F.interpolate((mask >= 0.5).to(**where), size=shape[-2:])
        return Start(x, source, own(small))
    moments, eps = moments_and_eps(masked(pictures, mask.to(pictures.device)))
    extra = inpainting(own(mask.to(eps.device)), moments, eps, vae.latent_scale)
    return Start(x, source, extra=extra.to(**where))


def _shape(
    parts: Parts,
    kind: str | None,
    rows: int,
    size: tuple[int | None, int | None],
    pictures: Tensor | None,
    noise: Tensor | None,
) -> tuple[int, ...]:
    """(rows, C, h, w) of the latents. Raises ValueError where noise is given that is not so."""
    if pictures is None and noise is None:
        return latent_shape(parts, rows, *size)
    if pictures is None:
        shape = (rows, parts.channels, *noise.shape[2:])  # type: ignore[union-attr]
    elif kind == "low_resolution" or _are_latents(parts, pictures):
        shape = (rows, parts.channels, *pictures.shape[-2:])
    else:
        try:
            shape = latent_shape(parts, rows, *pictures.shape[-2:])
        except ValueError as error:
            raise ValueError(f"image: its {error}; height and width bring it to another size") from error
    if noise is not None and (noise.ndim != 4 or noise.shape != shape):
        wanted = (rows, parts.channels, *(("h", "w") if pictures is None else shape[2:]))
        raise ValueError(f"latents: {tuple(noise.shape)}, expected ({', '.join(map(str, wanted))})")
    return shape


def _are_latents(parts: Parts, pictures: Tensor) -> bool:
    return pictures.shape[1] == parts.channels != parts.vae.config["in_channels"]


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
    long_prompt: LongPrompt = "cut",
    **kw: Any,
) -> Tensor:
    """Prompts and what the network is shown -> pictures (B, 3, H, W) in [0, 1]: those of the stock pipeline for the
    same input and generators.

    Args:
        pictures, mask, noise_level, noise: of ``start``, a picture for each prompt.
        kw: of ``sample_latents``: ``steps``, ``guidance_scale``, … Guidance leads away from the empty text and not from
            the picture, unless ``image_guidance_scale`` is above 1; an inpainting network draws with ``strength=1``.
    Raises:
        ValueError: the network is shown nothing, or a mask is missing.
    """
    if kind_of(parts.net) is None:
        raise ValueError("the network takes no channels beside the latents: it draws from text alone")
    begin = start(
        parts, len(prompts), (None, None), pictures, mask, noise_level=noise_level, generator=generator, noise=noise
    )
    conds = begin.told(*told(parts.text, prompts, kw.get("guidance_scale", 1.0) > 1, long_prompt))
    return decode(parts.vae, sample_latents(parts, *conds, begin.noise, generator=generator, **kw), parts.text.family)


def beside(uncond: Cond, cond: Cond) -> Cond:
    """``uncond``, one row or as many, shown what ``cond`` is shown: guidance is away from the text alone."""
    if len(uncond) != len(cond) and (cond.extra is not None or cond.class_labels is not None):
        uncond = uncond.map(lambda x: x.expand(len(cond), *x.shape[1:]))
    return replace(uncond, extra=cond.extra, class_labels=cond.class_labels)
