"""Text -> start latents -> sampler -> decode: the one body of every pipeline and of the grids shown while training."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.denoiser import Denoised, Denoiser
from ldm.models.base import Network
from ldm.models.dit import DiT, visible
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE, Moments
from ldm.paths import Path
from ldm.reuse import reuse
from ldm.sampling import SAMPLERS

from .fast import StepCaching, step_cache_of
from .guiding import Guidance, check_options, guide, near
from .kinds import check_shown, image_guided
from .prompts import LongPrompt, one_length
from .prompts import encode as encode_prompts
from .schedulers import Schedule

log = logging.getLogger(__name__)
Module = TypeVar("Module", bound=nn.Module)
Generators = torch.Generator | Sequence[torch.Generator]
OnStep = Callable[[int, Tensor, Tensor, Denoised], Tensor | None]
LENT = ("denoise", "path", "x", "times", "generator", "callback")  # of a sampler's arguments: no options


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
        ValueError: no generators, or their number is not that of rows.
    """
    shape = tuple(shape)
    if isinstance(generator, str) or not isinstance(generator, torch.Generator | Sequence | None):
        raise ValueError(f"generator is {generator!r}; expected torch.Generator().manual_seed(seed), or a list of such")
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
        if not isinstance(side, Integral):
            raise ValueError(f"{name} is {side!r}, expected a whole number of pixels")
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
    guidance: Guidance = "classifier_free",
    one_batch: bool = True,
    step_cache: StepCaching | None = None,
    sampler: str | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    source: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    image_guidance_scale: float = 1.0,
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
        guidance, one_batch: as in ``guiding.guide``.
        step_cache: inner layers are computed at every so many steps only, or a dict of ``StepCache``'s options; faster,
            and not the same picture (``fast.distance``).
        sampler: a name in ``ldm.sampling.SAMPLERS``; the schedule's own by default. ``sampler_options``: what its
            signature takes.
        source: normalized latents (B, C, h, w) to begin with, as noisy as at the time where the walk begins (SDEdit,
            Meng et al. 2022); without them it begins with noise.
        strength: how much of the grid is walked, its end.
        mask: (B, 1, h, w), 1 where ``source`` is drawn anew. Elsewhere it is put back after each step, as noisy as it
            is then (RePaint's known part, Lugmayr et al. 2022, eq. 8a). With strength 1 it begins with noise alone.
        image_guidance_scale: of a network that is shown another picture (``kinds.image_guided``).
        generator: for samplers that add noise.
        on_step: ``on_step(i, t, x, denoised)``, may return a new x.
        options: of the sampler (``eta``).
    Raises:
        ValueError: no such sampler, fewer than one step, guidance without ``uncond``; a network that is shown something
            beside the latents (``kinds``), and no ``cond.extra``; a mask without ``source``, or with a sampler that
            does not walk the grid; what ``guide`` and ``steps_walked`` refuse.
    """
    check_shown(parts.net, parts.channels, cond)
    schedule, name = parts.schedule, sampler or parts.schedule.sampler
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}{near(name, SAMPLERS)}")
    options |= sampler_options or {}
    check_options(f"sampler {name}", SAMPLERS[name], options, LENT)
    walked = steps_walked(steps, strength, parts.text.family)
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale is {guidance_scale}, expected a finite number")
    if mask is not None and name == "rk45":
        raise ValueError("sampler rk45 takes steps of its own: what the mask keeps cannot be put back after each")
    denoiser, net = parts.denoiser(), awake(parts.net)
    if uncond is None or guidance_scale <= 1:
        if guidance_scale > 1:
            raise ValueError(f"guidance_scale {guidance_scale} needs the conditioning to lead away from; give uncond")
        uncond = cond
    h, w = (side * parts.vae.factor for side in noise.shape[-2:])
    cond, uncond = visible(  # here, where a GPU is waited for once, and not in the network, at every step
        *((c if c.size_ids is not None else with_sizes(net, c, h, w)).to(net.device, net.dtype) for c in (cond, uncond))
    )
    if image_guidance_scale != 1 and guidance_scale > 1:
        if guidance != "classifier_free":
            raise ValueError(f"image_guidance_scale goes with guidance classifier_free, not with {guidance!r}")
        scales = guidance_scale, image_guidance_scale
        denoise = image_guided(denoiser, cond, uncond, *scales, rescale=rescale, one_batch=one_batch)
    else:
        denoise = guide(denoiser, cond, uncond, guidance_scale, rescale=rescale, guidance=guidance, one_batch=one_batch)
    noise = noise.to(net.device)
    times = schedule.times(steps)[-walked - 1 :]
    if source is None or (mask is not None and strength == 1):
        x = noise * schedule.spread(times)
    else:
        x = noisy(schedule.path, source, noise, times[0])
    if mask is not None:
        on_step = keeping(schedule.path, source, noise, mask, times, on_step)
    own = schedule.sampler_options if name == schedule.sampler else {}
    with reuse(cond, uncond, cache=step_cache_of(parts.net, step_cache)) as run:
        return SAMPLERS[name](
            denoise,
            schedule.path,
            x,
            times,
            generator=generator,
            callback=run.counting(on_step),
            **{**own, **options},
        )


def steps_walked(steps: int, strength: float, family: str = "sd") -> int:
    """How many of the grid's steps are walked, counted as the stock pipelines of the family do: what is less than a
    step is left out, and in SD3's walked whole.

    Raises:
        ValueError: no steps; strength outside [0, 1], or too little for one step.
    """
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"num_inference_steps is {steps!r}, expected a whole number, 1 or more")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, expected 0 to 1, of which 1 draws all anew")
    walked = steps - int(steps - steps * strength) if family == "sd3" else int(steps * strength)
    if walked < 1:
        raise ValueError(
            f"strength {strength} of num_inference_steps {steps} is less than one step: nothing would be drawn; give "
            "more of either"
        )
    return walked


def noisy(path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x0 (B, C, h, w) with the noise of t, (), in float32 at least."""
    wide = torch.promote_types(x0.dtype, torch.float32)
    return path.alpha(t).item() * x0.to(wide) + path.sigma(t).item() * noise.to(x0.device, wide)


def keeping(
    path: Path, source: Tensor | None, noise: Tensor, mask: Tensor, times: Tensor, on_step: OnStep | None
) -> OnStep:
    """``on_step`` of what is left when ``source`` stands again where the mask (B, 1, h, w) is 0: with the noise of the
    time that was stepped to, and clean after the last step."""
    if source is None:
        raise ValueError("mask: what is around it stays as in source, which is missing")
    mask, source = (x.to(noise.device) for x in (mask, source))

    def kept(i: int, t: Tensor, x: Tensor, denoised: Denoised) -> Tensor | None:
        known = noisy(path, source, noise, times[i + 1]) if i + 2 < len(times) else source.to(x.dtype)
        x = torch.where(mask > 0, x, known)
        changed = None if on_step is None else on_step(i, t, x, denoised)
        return x if changed is None else changed

    return kept


@torch.no_grad()
def encode(vae: VAE, pictures: Tensor, family: str = "sd") -> Moments:
    """Pictures (B, 3, H, W) in [-1, 1] -> moments of raw latents, (B, C, h, w) each. Precision as in ``decode``."""
    return Moments(*_without_overflow(vae, family, _encoded, pictures))


@torch.no_grad()
def decode(vae: VAE, latents: Tensor, family: str = "sd") -> Tensor:
    """Normalized latents (B, C, h, w) -> pictures (B, 3, H, W) in [0, 1].

    Args:
        family: of the text encoder. SDXL's autoencoder overflows in float16: there it works in float32 if its config
            says ``force_upcast``, which the other families' stock pipelines do not look at. One that is seen to
            overflow works in float32 from then on, which is logged.
    """
    (pictures,) = _without_overflow(vae, family, _decoded, vae.latent_scale.denormalize(latents))
    return (pictures / 2 + 0.5).clamp(0, 1)


def _encoded(vae: VAE, pictures: Tensor) -> tuple[Tensor, ...]:
    return tuple(vae.encode(pictures))


def _decoded(vae: VAE, raw: Tensor) -> tuple[Tensor]:
    return (vae.decode(raw),)


def _without_overflow(
    vae: VAE, family: str, run: Callable[[VAE, Tensor], tuple[Tensor, ...]], x: Tensor
) -> tuple[Tensor, ...]:
    """``run(vae, x)``, in float32 where the autoencoder, in float16, is known or found to overflow."""
    vae = awake(vae)
    half = vae.dtype == torch.float16
    known = getattr(vae, "overflows_in_float16", False) or (family == "sdxl" and vae.config["force_upcast"])
    if not (half and known):
        result = run(vae, x.to(vae.device, vae.dtype))
        if not half or all(y.isfinite().all() for y in result) or not x.isfinite().all():
            return result
        log.warning(
            "the autoencoder overflows in float16 and works in float32 from now on; bfloat16 (--dtype bf16) has room"
        )
        vae.overflows_in_float16 = True  # type: ignore[assignment]
    wide = _float32_copy(vae)  # the caller's stays as it is
    return run(wide, x.to(wide.device, wide.dtype))


def _float32_copy(vae: VAE) -> VAE:
    hook = getattr(vae, "_hf_hook", None)  # of offload, which knows the other networks: not copied
    return copy.deepcopy(vae, {id(hook): hook}).float()


def awake(module: Module) -> Module:
    """The module where it runs. Of one that accelerate keeps elsewhere (``enable_model_cpu_offload``) only ``forward``
    brings it there by itself; who asks where it is, or calls ``encode`` and ``decode``, has to wake it."""
    if (hook := getattr(module, "_hf_hook", None)) is not None:
        hook.pre_forward(module)
    return module


def told(
    text: TextEncoder, prompts: Sequence[str], guided: bool, long_prompt: LongPrompt = "cut"
) -> tuple[Cond, Cond | None]:
    """A row for each prompt, and where guidance needs it the null prompt, as long as they are."""
    cond = encode_prompts(text, prompts, long_prompt=long_prompt)
    if not guided:
        return cond, None
    cond, uncond = one_length(cond, text.null())
    return cond, uncond


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
    long_prompt: LongPrompt = "cut",
    **kw: Any,
) -> Tensor:
    """Prompts -> pictures (B, 3, H, W) in [0, 1], one for each; ``kw`` goes to ``sample_latents``."""
    cond, uncond = told(parts.text, prompts, guidance_scale > 1, long_prompt)
    if noise is None:
        shape = latent_shape(parts, len(prompts), height, width)
        noise = start_latents(shape, generator, device=parts.net.device, dtype=parts.net.dtype)
    kw = dict(steps=steps, guidance_scale=guidance_scale, generator=generator) | kw
    return decode(parts.vae, sample_latents(parts, cond, uncond, noise, **kw), parts.text.family)
