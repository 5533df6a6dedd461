"""Text -> start latents -> sampler -> decode: the one body of every pipeline and of the grids shown while training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoised, Denoiser
from ldm.guidance import classifier_free
from ldm.models.base import Network
from ldm.models.dit import DiT, visible
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.sampling import SAMPLERS

from .kinds import check_shown
from .schedulers import Schedule

Generators = torch.Generator | Sequence[torch.Generator]
OnStep = Callable[[int, Tensor, Tensor, Denoised], Tensor | None]


@dataclass(frozen=True)
class Parts:
    """All that it takes to draw: the denoiser network, the autoencoder, the text encoder, and how to sample."""

    net: Network
    vae: VAE
    text: TextEncoder
    schedule: Schedule

    def denoiser(self) -> Denoiser:
        s, out = self.schedule, self.net.config.get("out_channels")
        return Denoiser(self.net, s.path, s.prediction, s.time_input, learned_variance=out == 2 * self.channels)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.vae.config["latent_channels"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels that the network was made for. Raises ValueError where its config has none."""
        sample = self.net.config.get("sample_size")
        if sample is None:
            raise ValueError("the network's config has no sample_size: give height and width")
        h, w = (sample, sample) if isinstance(sample, int) else sample
        return h * self.vae.factor, w * self.vae.factor


def start_latents(
    shape: Sequence[int],
    generator: Generators | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise (B, C, h, w), drawn where the generator lives, then brought to ``device``.

    Args:
        generator: one for the whole batch, or a list of one per row, so that a row is the same in any batch.
    Raises:
        ValueError: the number of generators is not that of rows.
    """
    shape = tuple(shape)
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=where, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator: a list of {len(generator)} for {shape[0]} pictures; expected one for each")
    return torch.cat([start_latents((1, *shape[1:]), g, device=device, dtype=dtype) for g in generator])


def latent_shape(parts: Parts, rows: int, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
    """(rows, C, h, w) for pictures of so many pixels, the network's own size by default.

    Raises:
        ValueError: the autoencoder's factor does not divide a side.
    """
    own = parts.size if height is None or width is None else (height, width)
    h, w = own[0] if height is None else height, own[1] if width is None else width
    f = parts.vae.factor
    for name, side in (("height", h), ("width", w)):
        if side <= 0 or side % f:
            nearest = max(f, (side + f // 2) // f * f)
            raise ValueError(
                f"{name} is {side}, expected a multiple of {f}, the autoencoder's pixels per latent; the nearest is "
                f"{nearest}"
            )
    return rows, parts.channels, h // f, w // f


def with_sizes(
    net: Network,
    cond: Cond,
    height: int,
    width: int,
    original_size: tuple[int, int] | None = None,
    crops_coords_top_left: tuple[int, int] = (0, 0),
    target_size: tuple[int, int] | None = None,
) -> Cond:
    """``cond`` with the sizes that the network is told, where it is one that is told any: (height, width) in pixels.

    SDXL (Podell et al. 2023, section 2.2): the original size, the corner of the crop, the size aimed at, (B, 6).
    PixArt-alpha of 1024 pixels: height, width and height / width of the picture, (B, 3).
    """
    if isinstance(net, UNet) and net.config["addition_embed_type"] == "text_time":
        size = (height, width)
        row = [*(original_size or size), *crops_coords_top_left, *(target_size or size)]
    elif isinstance(net, DiT) and net.sized:
        row = [height, width, height / width]
    else:
        return cond
    ids = torch.tensor([row], device=cond.tokens.device, dtype=torch.float32)
    return replace(cond, size_ids=ids.expand(len(cond), -1))


@torch.no_grad()
def sample_latents(
    parts: Parts,
    cond: Cond,
    uncond: Cond | None,
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    rescale: float = 0.0,
    sampler: str | None = None,
    generator: Generators | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Tensor:
    """From noise (B, C, h, w) at t = 1 to normalized latents at t = 0.

    Args:
        cond, uncond: B rows each, or one for all. ``uncond`` is needed where ``guidance_scale`` is above 1. Where
            they lack the sizes that the network is told, these are the picture's own. Padding that both hide at the
            end is cut off.
        noise: of unit variance; brought here to that from which the schedule starts.
        steps: of the sampler; the grid is the schedule's own.
        rescale: classifier-free guidance's rescaling of the standard deviation, 0 to 1.
        sampler: a name in ``ldm.sampling.SAMPLERS``; the schedule's own by default.
        generator: for samplers that add noise.
        on_step: ``on_step(i, t, x, denoised)``, may return a new x.
        options: of the sampler (``eta``).
    Raises:
        ValueError: no such sampler, fewer than one step, guidance without ``uncond``; a network that is shown something
            beside the latents (``kinds``), and no ``cond.extra``.
    """
    check_shown(parts.net, parts.channels, cond)
    schedule, name = parts.schedule, sampler or parts.schedule.sampler
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
    if steps < 1:
        raise ValueError(f"num_inference_steps is {steps}, expected 1 or more")
    denoiser, net = parts.denoiser(), parts.net
    if uncond is None or guidance_scale <= 1:
        if guidance_scale > 1:
            raise ValueError(f"guidance_scale {guidance_scale} needs the conditioning to lead away from; give uncond")
        uncond = cond
    h, w = (side * parts.vae.factor for side in noise.shape[-2:])
    cond, uncond = visible(  # here, where a GPU is waited for once, and not in the network, at every step
        *((c if c.size_ids is not None else with_sizes(net, c, h, w)).to(net.device, net.dtype) for c in (cond, uncond))
    )
    denoise = classifier_free(denoiser, cond, uncond, guidance_scale, rescale=rescale)
    times = schedule.times(steps)
    own = schedule.sampler_options if name == schedule.sampler else {}
    return SAMPLERS[name](
        denoise,
        schedule.path,
        noise * schedule.spread(times),
        times,
        generator=generator,
        callback=on_step,
        **{**own, **options},
    )


@torch.no_grad()
def decode(vae: VAE, latents: Tensor, family: str = "sd") -> Tensor:
    """Normalized latents (B, C, h, w) -> pictures (B, 3, H, W) in [0, 1].

    Args:
        family: of the text encoder. SDXL's autoencoder overflows in float16: there it decodes in float32 if its
            config says ``force_upcast``, which the other families' stock pipelines do not look at.
    """
    if family == "sdxl" and vae.dtype == torch.float16 and vae.config["force_upcast"]:
        vae = copy.deepcopy(vae).float()  # the caller's stays as it is
    raw = vae.latent_scale.denormalize(latents).to(vae.device, vae.dtype)
    return (vae.decode(raw) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def generate(
    parts: Parts,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    guidance_scale: float = 5.0,
    generator: Generators | None = None,
    noise: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    **kw: Any,
) -> Tensor:
    """Prompts -> pictures (B, 3, H, W) in [0, 1], one for each; ``kw`` goes to ``sample_latents``."""
    cond = parts.text.encode(prompts)
    uncond = parts.text.null() if guidance_scale > 1 else None
    if noise is None:
        shape = latent_shape(parts, len(prompts), height, width)
        noise = start_latents(shape, generator, device=parts.net.device, dtype=parts.net.dtype)
    kw = dict(steps=steps, guidance_scale=guidance_scale, generator=generator) | kw
    return decode(parts.vae, sample_latents(parts, cond, uncond, noise, **kw), parts.text.family)
