"""Text to image, called as the stock pipelines are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoised
from ldm.models.attention import check_backend
from ldm.models.base import Network
from ldm.models.text import TextEncoder
from ldm.models.text_files import check_hub_options
from ldm.models.vae import VAE

from .core import Generators, Parts, decode, latent_shape, sample_latents, start_latents, with_sizes
from .folder import load_parts, save_parts
from .lora.mixin import LoraMixin
from .schedulers import Schedule
from .stock import from_stock_pipeline

Texts = str | Sequence[str]
OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
# steps and guidance of the stock pipeline of each text family
DEFAULTS = {"sd": (50, 7.5), "sdxl": (50, 5.0), "sd3": (28, 7.0), "pixart": (20, 4.5)}
OUTPUTS = ("pil", "np", "pt", "latent")


class TextToImagePipeline(LoraMixin, DiffusionPipeline):
    """Draws pictures from prompts with our networks; reads and writes folders of the stock form.

    Args:
        net: the denoiser, ``UNet``, ``MMDiT`` or ``DiT``.
        vae: the autoencoder.
        text: the text encoders, of the family that the network was trained with.
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
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        t5: bool | None = True,
        load_in_8bit: bool = False,
        **hub: Any,
    ) -> Self:
        """Open a pipeline folder, or fetch one from the hub by its name. Only safetensors are read, no code is run.

        Args:
            dtype: of all weights, whatever the files have.
            variant: of the files, such as ``fp16``.
            t5: None or False leaves the T5 of an SD3 out.
            load_in_8bit: T5 in 8 bits; needs bitsandbytes.
            hub: for a hub name: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.
        Raises:
            ValueError, OSError: naming the file that is missing, does not open or is not of a kind that is read here.
        """
        check_hub_options(hub)
        folder, name = Path(source).expanduser(), str(source)
        if not folder.exists() and name.count("/") == 1 and not name.startswith((".", "~", "/")):
            try:
                folder = Path(DiffusionPipeline.download(name, use_safetensors=True, variant=variant, **hub))
            except (OSError, ValueError) as error:
                raise ValueError(f"{name}: no such folder, and not opened as a name on the hub ({error})") from error
        return cls.from_parts(load_parts(folder, dtype, variant=variant, t5=t5, load_in_8bit=load_in_8bit))

    @classmethod
    def from_diffusers(cls, source: DiffusionPipeline | str | Path, **kw: Any) -> Self:
        """Take over a stock pipeline (its weights are shared, not copied), or open a folder as ``from_pretrained``.

        Raises:
            ValueError: a pipeline, network or scheduler that has no counterpart here.
        """
        if isinstance(source, DiffusionPipeline):
            if kw:
                raise ValueError(f"from_diffusers: {', '.join(kw)} is for folders and hub names, not for pipelines")
            return cls.from_parts(from_stock_pipeline(source))
        return cls.from_pretrained(source, **kw)

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """Write the stock form, which ``DiffusionPipeline.from_pretrained`` opens without this package.

        Raises:
            ValueError: the folder holds anything but a pipeline, the schedule has no stock form, or a LoRA acts that is
                not fused.
        """
        with self._without_lora("save_pretrained"):
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
        """The attention kernel of network and autoencoder: ``auto``, ``xformers``, ``flash``, ``sdpa``, ``plain``.

        Raises:
            ValueError, RuntimeError: one of the two cannot have it, and why. Neither has changed then.
        """
        check_backend(name)
        networks = {"net": self.net, "vae": self.vae}
        for part, network in networks.items():
            try:
                network.check_attention_backend(name)
            except ValueError as error:
                raise ValueError(f"the pipeline's {part}: {error}; pipe.net and pipe.vae can have one each") from error
        for network in networks.values():
            network.set_attention_backend(name)

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable | None = None) -> None:
        if attention_op is not None:
            raise ValueError("attention_op: xFormers chooses the operator by itself here; leave it out")
        self.set_attention_backend("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        self.set_attention_backend("auto")

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """Stock's, but first shown after a step: what is logged in the first one stands above it, not in it."""
        config = self._progress_bar_config = getattr(self, "_progress_bar_config", {})
        config.setdefault("delay", 1e-9)  # tqdm's own; time is counted from now on all the same
        bar: Any = super().progress_bar
        return bar(iterable, total)

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
        *,
        prompt_2: Texts | None = None,
        prompt_3: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        negative_prompt_3: Texts | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
        clean_caption: bool = True,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw.

        Args:
            prompt: one text or several.
            height, width: in pixels; by default what the network was made for. A size that is not one of PixArt's own
                is drawn as it is asked for, as by stock with ``use_resolution_binning=False``.
            num_inference_steps, guidance_scale: by default the stock pipeline's own (SD 50 and 7.5, SDXL 50 and 5.0,
                SD3 28 and 7.0, PixArt 20 and 4.5). No guidance at 1 and below.
            negative_prompt: what to lead away from; the empty text by default, in SDXL zeros; one for all prompts, or
                one for each.
            num_images_per_prompt: pictures of prompt 0 first, then those of prompt 1, …
            eta: noise that the sampler ``ddim`` adds, 0 to 1.
            generator: one for all pictures, or a list of one for each, which makes a batch equal to single calls.
            latents: (B, C, h, w) the noise to start from, instead of the generator's.
            prompt_embeds, negative_prompt_embeds: (B, L, D) in place of the texts. With them, in SDXL and SD3,
                ``pooled_prompt_embeds``, ``negative_pooled_prompt_embeds`` (B, P); in PixArt
                ``prompt_attention_mask``, ``negative_prompt_attention_mask`` (B, L), 0 at the padding.
            output_type: ``pil``, ``np`` (B, H, W, 3) in [0, 1], ``pt`` (B, 3, H, W) in [0, 1], or ``latent``:
                normalized, as the stock pipelines return them.
            return_dict: an object with ``.images``; else the tuple ``(images,)``.
            guidance_rescale: 0 to 1, Lin et al. 2024.
            sampler: a name in ``ldm.sampling.SAMPLERS``; by default the one that the folder's scheduler stands for.
            callback_on_step_end: called as ``f(pipe, step, timestep, {"latents": x})``; may return such a dict.
            prompt_2, prompt_3, negative_prompt_2, negative_prompt_3: what the second and third text encoder read, where
                it is not the same.
            max_sequence_length: T5's tokens, in SD3 and PixArt.
            clean_caption: in PixArt, take what is no text of a picture out of the prompts; needs bs4 and ftfy, and
                does nothing without them, as in stock.
            original_size, crops_coords_top_left, target_size: SDXL's (height, width) or corner (top, left) in pixels;
                by default those of the picture. ``negative_…``: of what is led away from, if both sizes are given.
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
        text = partial(self._conditioning, max_length=max_sequence_length, clean=clean_caption)
        given = prompt_embeds, pooled_prompt_embeds, prompt_attention_mask
        cond = text("prompt", (prompt, prompt_2, prompt_3), given)
        uncond = None
        if scale > 1:
            away = negative_prompt, negative_prompt_2, negative_prompt_3
            given = negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_attention_mask
            if self._is_null(away, negative_prompt_embeds):
                uncond = self._null(cond, max_sequence_length)
            else:
                away = (
                    "" if negative_prompt is None and negative_prompt_embeds is None else negative_prompt,
                    *away[1:],
                )
                uncond = text("negative_prompt", away, given)
            if len(uncond) not in (1, len(cond)):
                raise ValueError(f"negative_prompt: {len(uncond)} for {len(cond)} prompts; expected 1, or one for each")
            uncond = uncond.repeat_interleave(num_images_per_prompt if len(uncond) > 1 else 1)
        cond = cond.repeat_interleave(num_images_per_prompt)
        if latents is None:
            shape = latent_shape(parts, len(cond), height, width)
            latents = start_latents(shape, generator, device=device, dtype=self.net.dtype)
        elif latents.ndim != 4 or latents.shape[:2] != (len(cond), parts.channels):
            raise ValueError(f"latents: {tuple(latents.shape)}, expected ({len(cond)}, {parts.channels}, h, w)")

        h, w = (side * self.vae.factor for side in latents.shape[-2:])
        sizes = original_size, crops_coords_top_left, target_size
        cond = with_sizes(self.net, cond, height or h, width or w, *sizes)
        if uncond is not None:
            if negative_original_size is not None and negative_target_size is not None:
                sizes = negative_original_size, negative_crops_coords_top_left, negative_target_size
            uncond = with_sizes(self.net, uncond, height or h, width or w, *sizes)

        with self.progress_bar(total=steps) as bar:

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
            images = decode(self.vae, x, self.text.family)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _is_null(self, texts: Sequence[Texts | None], embeds: Tensor | None) -> bool:
        """Is nothing given to lead away from? SDXL's stock pipeline looks at the first negative prompt alone."""
        given = texts[:1] if self.text.family == "sdxl" and self.text.zeros_for_empty else texts
        return embeds is None and all(text is None for text in given)

    def _null(self, cond: Cond, length: int | None) -> Cond:
        if self.text.family == "sdxl" and self.text.zeros_for_empty:
            return cond.map(torch.zeros_like)  # as long as the embeddings that were given
        return self.text.null(length)

    def _conditioning(
        self,
        name: str,
        texts: Sequence[Texts | None],
        embeds: Sequence[Tensor | None],
        *,
        max_length: int | None,
        clean: bool,
    ) -> Cond:
        """A Cond of the texts for each encoder, or of embeddings (B, L, D), pooled ones (B, P) and mask (B, L)."""
        family, (tokens, pooled, mask) = self.text.family, embeds
        if (texts[0] is None) == (tokens is None):
            raise ValueError(f"give either {name} or {name}_embeds")
        if tokens is None:
            lists = [_listed(text, clean and family == "pixart") for text in texts]
            rows = max(len(text) for text in lists if text is not None)
            lists = [text * rows if text is not None and len(text) == 1 else text for text in lists]
            return self.text.encode(lists[0] or [], *lists[1:], max_sequence_length=max_length)
        wanted = {"sdxl": "pooled", "sd3": "pooled", "pixart": "mask"}.get(family)
        for what, value, full in (
            ("pooled", pooled, name.replace("prompt", "pooled_prompt_embeds")),
            ("mask", mask, f"{name}_attention_mask"),
        ):
            if (value is not None) != (what == wanted):
                raise ValueError(f"{full}: {'needed' if what == wanted else 'not taken'} with {name}_embeds here")
        if tokens.ndim != 3 or tokens.shape[-1] != self.text.width:
            raise ValueError(f"{name}_embeds: {tuple(tokens.shape)}, expected (B, L, {self.text.width})")
        rows, length = tokens.shape[:2]
        if pooled is not None and pooled.shape != (rows, self.text.pooled_width):
            full, wanted = name.replace("prompt", "pooled_prompt_embeds"), (rows, self.text.pooled_width)
            raise ValueError(f"{full}: {tuple(pooled.shape)}, expected {wanted}, one for each of {name}_embeds")
        if mask is not None and mask.shape != (rows, length):
            raise ValueError(f"{name}_attention_mask: {tuple(mask.shape)}, expected {rows, length}, as {name}_embeds")
        bias = None if mask is None else torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(mask == 0, -torch.inf)
        return Cond(tokens, bias, pooled).to(self.net.device, self.net.dtype)


def _listed(texts: Texts | None, clean: bool) -> list[str] | None:
    if texts is None:
        return None
    texts = [texts] if isinstance(texts, str) else list(texts)
    if clean and is_bs4_available() and is_ftfy_available():
        texts = object.__new__(PixArtAlphaPipeline)._text_preprocessing(texts, clean_caption=True)
    return texts


class _Interrupted(Exception):
    def __init__(self, latents: Tensor):
        super().__init__("sampling was interrupted by a callback")
        self.latents = latents
