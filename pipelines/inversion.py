"""From a real picture to the noise that the model would draw it from, and from there to other pictures.

    noise = invert(pipe, picture, "a red apple")
    pipe("a red apple", latents=noise, sampler="ddim", guidance_scale=1.0)  # the picture, as the autoencoder has it
    edit(pipe, picture, "a green apple", source_prompt="a red apple")

``pipe`` is any of our pipelines, or its ``Parts``, of a model that is told text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ldm.cond import Cond
from ldm.models.dit import visible
from ldm.reuse import reuse
from ldm.sampling import ddim_inversion, noise_like

from . import core
from .core import Generators, Parts, awake, decode, sample_latents, steps_walked, with_sizes
from .guiding import Guidance, guide
from .kinds import check_shown
from .pictures import Pictures, to_pictures
from .prompts import one_length

Prompts = str | Sequence[str] | None


@torch.no_grad()
def invert(
    pipe: Any,
    pictures: Pictures,
    prompt: Prompts = None,
    *,
    negative_prompt: Prompts = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    guidance: Guidance = "classifier_free",
    iterations: int = 5,
) -> Tensor:
    """The ``latents`` (B, C, h, w), in units of the noise that sampling starts from, of which ``pipe`` draws these
    pictures with ``sampler="ddim"`` and the same prompt, steps and guidance: DDIM's steps walked back up.

    How well the walk down repeats the latents depends on ``iterations``, how well these are the picture on the
    autoencoder. With ``guidance_scale`` above 1 a step changes more than it does with 1, and both are harder: invert
    with 1, and see ``edit``.

    Args:
        pictures: one or several of one size (``pictures.to_pictures``), whose sides the autoencoder's factor divides.
        prompt: what they show, one for all or one for each; None is the model without a prompt.
        iterations: calls of the network a step (``ldm.sampling.ddim_inversion``); 1 is plain DDIM inversion.
    Raises:
        ValueError: pictures or prompts that do not fit, fewer than one step or iteration; a model that is shown
            something beside the latents.
    """
    parts = parts_of(pipe)
    z, walked = encode(parts, pictures), steps_walked(num_inference_steps, 1.0, parts.text.family)
    cond, uncond = conds_of(parts, z, prompt, negative_prompt)
    times = parts.schedule.times(walked)
    with reuse(cond, uncond):
        denoise = guide(parts.denoiser(), cond, uncond, guidance_scale, guidance=guidance)
        x = ddim_inversion(denoise, parts.schedule.path, z, times, iterations=iterations)
    return x / parts.schedule.spread(times)


@torch.no_grad()
def edit(
    pipe: Any,
    pictures: Pictures,
    prompt: Prompts,
    *,
    source_prompt: Prompts = None,
    strength: float = 0.7,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.5,
    guidance: Guidance = "classifier_free",
    iterations: int = 5,
    output_type: str = "pil",
) -> Any:
    """The pictures as ``prompt`` would have them: up to some noise with the prompt of what they show, and down with
    this one. Guidance leads away from the source prompt (negative-prompt inversion, Miyake et al. 2023): with the two
    prompts alike the pictures stay as they are, whatever the scale.

    Args:
        pictures, iterations: as in ``invert``.
        prompt, source_prompt: one for all or one for each; None is no prompt.
        strength: the share of the steps that is walked, which is how much of a picture may change.
        guidance_scale: how far to go; 1 is the new prompt alone.
        output_type: ``pil``, ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W) in [0, 1], or ``latent``.
    Raises:
        ValueError: as ``invert``; strength outside [0, 1], or less than a step; an unknown output_type.
    """
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type {output_type!r} is not one of pil, np, pt, latent")
    parts, steps = parts_of(pipe), num_inference_steps
    walked, path = steps_walked(steps, strength, parts.text.family), parts.schedule.path
    z = encode(parts, pictures)
    cond, source = conds_of(parts, z, prompt, source_prompt)
    times = parts.schedule.times(steps)[-walked - 1 :]
    with reuse(source):
        denoise = guide(parts.denoiser(), source, None, 1.0)
        x = ddim_inversion(denoise, path, z, times, iterations=iterations)
    noise = (x - path.alpha(times[0]).item() * z) / path.sigma(times[0]).item()  # of which the sampler makes x again
    x = sample_latents(
        parts, cond, source, noise, source=z, strength=strength, steps=steps, sampler="ddim",
        guidance_scale=guidance_scale, guidance=guidance,
    )  # fmt: skip
    if output_type == "latent":
        return x
    return VaeImageProcessor(do_normalize=False).postprocess(decode(parts.vae, x, parts.text.family), output_type)


def encode(pipe: Any, pictures: Pictures, generator: Generators | None = None) -> Tensor:
    """Normalized latents (B, C, h, w): the autoencoder's mean, or with a generator a draw from its Gaussian, as it is
    trained on."""
    parts = parts_of(pipe)
    moments = core.encode(parts.vae, to_pictures(pictures), parts.text.family)
    raw = moments.mean if generator is None else moments.sample(noise_like(moments.mean, generator))
    return parts.vae.latent_scale.normalize(raw.to(torch.promote_types(raw.dtype, torch.float32)))


def conds_of(parts: Parts, latents: Tensor, *prompts: Prompts) -> tuple[Cond, ...]:
    """What the network is told of each prompt for latents (B, C, h, w), one row for all or one for each.

    Raises:
        ValueError: another number of prompts; a model that is shown something beside the latents.
    """
    conds = []
    for prompt in prompts:
        given = [prompt] if isinstance(prompt, str) else prompt
        if given is not None and len(given) not in (1, len(latents)):
            raise ValueError(f"prompt: {len(given)} for {len(latents)} pictures; expected 1, or one for each")
        conds.append(parts.text.null() if given is None else parts.text.encode(given))
        check_shown(parts.net, parts.channels, conds[-1])
    h, w = (side * parts.vae.factor for side in latents.shape[-2:])
    net = awake(parts.net)
    conds = [with_sizes(net, cond, h, w).to(net.device, net.dtype) for cond in conds]
    return visible(*one_length(*conds))


def parts_of(pipe: Any) -> Parts:
    parts = getattr(pipe, "parts", pipe)
    if not isinstance(parts, Parts):
        raise ValueError(f"pipe is {type(pipe).__name__}; expected one of our pipelines, or Parts")
    return parts
