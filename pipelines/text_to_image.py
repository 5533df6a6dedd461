"""Text to image, called as the stock pipelines are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoised
from ldm.models.base import Network
from ldm.models.text import TextEncoder
from ldm.models.vae import VAE

from .core import Generators, Parts, decode, latent_shape, sample_latents, start_latents
from .folder import load_parts, save_parts
from .schedulers import Schedule
from .stock import from_stock_pipeline

OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
DEFAULTS = {"sd": (50, 7.5), "sd3": (28, 7.0)}  # steps and guidance of the stock pipeline of each text family
OUTPUTS = ("pil", "np", "pt", "latent")


class TextToImagePipeline(DiffusionPipeline):
    """Draws pictures from prompts with our networks; reads and writes folders of the stock form.

    Args:
        net: the denoiser, ``UNet`` or ``MMDiT``.
        vae: the autoencoder.
        text: the text encoder, of the family that the network was trained with.
        schedule: path, prediction, sampler and grid: the meaning of the folder's scheduler.
    """

    def __init__(self, net: Network, vae: VAE, text: TextEncoder, schedule: Schedule):
        super().__init__()
        self.register_modules(net=net, vae=vae, text=text, schedule=schedule)
        self._interrupt = False
        self._guidance_scale = DEFAULTS[text.family][1]
        self._num_timesteps = 0

    # --- in and out ----------------------------------------------------------------------------------------------

    @classmethod
    def from_parts(cls, parts: Parts) -> Self:
        return cls(parts.net, parts.vae, parts.text, parts.schedule)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, source: str | Path, *, dtype: torch.dtype = torch.float32, **hub: Any
    ) -> Self:
        """Open a pipeline folder, or fetch one from the hub by its name. Only safetensors are read, no code is run.

        Args:
            dtype: of all weights, whatever the files have.
            hub: for a hub name: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.
        Raises:
            ValueError: naming the file that is missing or not of a kind that is read here.
        """
        folder, name = Path(source).expanduser(), str(source)
        if not folder.exists() and name.count("/") == 1 and not name.startswith((".", "~", "/")):
            try:
                folder = Path(DiffusionPipeline.download(name, use_safetensors=True, **hub))
            except (OSError, ValueError) as error:
                raise ValueError(f"{name}: no such folder, and not opened as a name on the hub ({error})") from error
        return cls.from_parts(load_parts(folder, dtype))

    @classmethod
    def from_diffusers(cls, source: DiffusionPipeline | str | Path, **kw: Any) -> Self:
        """Take over a stock pipeline (its weights are shared, not copied), or open a folder as ``from_pretrained``.

        Raises:
            ValueError: a pipeline, network or scheduler that has no counterpart here.
        """
        if isinstance(source, DiffusionPipeline):
            return cls.from_parts(from_stock_pipeline(source))
        return cls.from_pretrained(source, **kw)

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """Write the stock form, which ``DiffusionPipeline.from_pretrained`` opens without this package.

        Raises:
            ValueError: the folder holds anything but a pipeline, or the schedule has no stock form.
        """
        save_parts(save_directory, self.parts)

    @property
    def parts(self) -> Parts:
        return Parts(self.net, self.vae, self.text, self.schedule)

    # --- what users of stock pipelines look for ------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop sampling; what there is will be decoded."""
        return self._interrupt

    def set_attention_backend(self, name: str) -> None:
        """The attention kernel of network and autoencoder: ``auto``, ``xformers``, ``flash``, ``sdpa``, ``plain``."""
        for network in (self.net, self.vae):
            network.set_attention_backend(name)

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable | None = None) -> None:
        if attention_op is not None:
            raise ValueError("attention_op: xFormers chooses the operator by itself here; leave it out")
        self.set_attention_backend("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        self.set_attention_backend("auto")

    # --- the call ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw.

        Args:
            prompt: one text or several.
            height, width: in pixels; by default what the network was made for.
            num_inference_steps, guidance_scale: by default the stock pipeline's own (50 and 7.5 in the Stable
                Diffusion form, 28 and 7.0 in the SD3 form). No guidance at 1 and below.
            negative_prompt: what to lead away from; the empty text by default; one for all prompts, or one for each.
            num_images_per_prompt: pictures of prompt 0 first, then those of prompt 1, …
            eta: noise that the sampler ``ddim`` adds, 0 to 1.
            generator: one for all pictures, or a list of one for each, which makes a batch equal to single calls.
            latents: (B, C, h, w) the noise to start from, instead of the generator's.
            prompt_embeds, negative_prompt_embeds: (B, L, D) in place of the texts, in the Stable Diffusion form.
            output_type: ``pil``, ``np`` (B, H, W, 3) in [0, 1], ``pt`` (B, 3, H, W) in [0, 1], or ``latent``:
                normalized, as the stock pipelines return them.
            return_dict: an object with ``.images``; else the tuple ``(images,)``.
            guidance_rescale: 0 to 1, Lin et al. 2024.
            sampler: a name in ``ldm.sampling.SAMPLERS``; by default the one that the folder's scheduler stands for.
            callback_on_step_end: called as ``f(pipe, step, timestep, {"latents": x})``; may return such a dict.
        Raises:
            ValueError: naming the argument and what was expected.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type {output_type!r} is not one of {', '.join(OUTPUTS)}")
        if list(callback_on_step_end_tensor_inputs) != ["latents"]:
            wanted = list(callback_on_step_end_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs is {wanted}; only ['latents'] can be had")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}, expected 1 or more")
        default_steps, default_scale = DEFAULTS[self.text.family]
        steps = default_steps if num_inference_steps is None else num_inference_steps
        scale = default_scale if guidance_scale is None else guidance_scale
        self._interrupt, self._guidance_scale, self._num_timesteps = False, scale, steps

        parts, device = self.parts, self.net.device
        cond = self._conditioning("prompt", prompt, prompt_embeds)
        uncond = None
        if scale > 1:
            nothing = "" if negative_prompt is None and negative_prompt_embeds is None else negative_prompt
            uncond = self._conditioning("negative_prompt", nothing, negative_prompt_embeds)
            if len(uncond) not in (1, len(cond)):
                raise ValueError(f"negative_prompt: {len(uncond)} for {len(cond)} prompts; expected 1, or one for each")
            uncond = uncond.repeat_interleave(num_images_per_prompt if len(uncond) > 1 else 1)
        cond = cond.repeat_interleave(num_images_per_prompt)
        if latents is None:
            shape = latent_shape(parts, len(cond), height, width)
            latents = start_latents(shape, generator, device=device, dtype=self.net.dtype)
        elif latents.ndim != 4 or latents.shape[:2] != (len(cond), parts.channels):
            raise ValueError(f"latents: {tuple(latents.shape)}, expected ({len(cond)}, {parts.channels}, h, w)")

        progress_bar: Any = self.progress_bar
        with progress_bar(total=steps) as bar:

            def on_step(i: int, t: Tensor, x: Tensor, denoised: Denoised) -> Tensor | None:
                bar.update()
                if callback_on_step_end is not None:
                    time = self.schedule.time_input(t, self.schedule.path)
                    x = (callback_on_step_end(self, i, time, {"latents": x}) or {}).get("latents", x)
                if self._interrupt:
                    raise _Interrupted(x)
                return x

            try:
                x = sample_latents(
                    parts, cond, uncond, latents.to(device), steps=steps, guidance_scale=scale,
                    rescale=guidance_rescale, sampler=sampler, generator=generator, on_step=on_step,
                    **({} if eta is None else {"eta": eta}),
                )  # fmt: skip
            except _Interrupted as stopped:
                x = stopped.latents

        images: Any = x
        if output_type != "latent":
            images = decode(self.vae, x)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _conditioning(self, name: str, texts: str | Sequence[str] | None, embeds: Tensor | None) -> Cond:
        if (texts is None) == (embeds is None):
            raise ValueError(f"give either {name} or {name}_embeds")
        if embeds is None:
            return self.text.encode([texts] if isinstance(texts, str) else list(texts or ()))
        if self.text.family != "sd":
            raise ValueError(f"{name}_embeds: this network also takes a pooled vector; give {name} as text")
        if embeds.ndim != 3 or embeds.shape[-1] != self.text.width:
            raise ValueError(f"{name}_embeds: {tuple(embeds.shape)}, expected (B, L, {self.text.width})")
        return Cond(tokens=embeds.to(self.net.device, self.net.dtype))


class _Interrupted(Exception):
    def __init__(self, latents: Tensor):
        super().__init__("sampling was interrupted by a callback")
        self.latents = latents
