"""Text to image, called as the stock pipelines are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from .base import Call, LatentPipeline
from .call import More, OnStepEnd, Prompts, Texts
from .core import Generators

# steps and guidance of the stock pipeline of each text family
DEFAULTS = {"sd": (50, 7.5), "sdxl": (50, 5.0), "sd3": (28, 7.0), "pixart": (20, 4.5)}


class TextToImagePipeline(LatentPipeline):
    """Draws pictures from prompts."""

    defaults: ClassVar = DEFAULTS

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Texts | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **more: Unpack[More],
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
            eta: noise that the sampler adds, 0 to 1, of those that take it (``ddim``); 0 is none with any.
            generator: one for all pictures, or a list of one for each, which makes a batch equal to single calls.
            latents: (B, C, h, w) the noise to start from, instead of the generator's.
            prompt_embeds, negative_prompt_embeds: (B, L, D) in place of the texts, with what ``More`` says beside them.
            output_type: ``pil``, ``np`` (B, H, W, 3) in [0, 1], ``pt`` (B, 3, H, W) in [0, 1], or ``latent``:
                normalized, as the stock pipelines return them.
            return_dict: an object with ``.images``; else the tuple ``(images,)``.
            guidance_rescale: 0 to 1, Lin et al. 2024.
            callback_on_step_end: called as ``f(pipe, step, timestep, {"latents": x})``; may return such a dict.
            callback_on_step_end_tensor_inputs: what it is shown: ``latents``, ``denoised`` (the model's x0).
            more: rarer ones, see ``call.More``.
        Raises:
            ValueError, TypeError: naming the argument and what was expected.
        """
        call = Call(
            Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds),
            num_inference_steps, guidance_scale, num_images_per_prompt, eta, generator, latents, output_type,
            return_dict, guidance_rescale, callback_on_step_end, callback_on_step_end_tensor_inputs, more,
        )  # fmt: skip
        return self._draw(call, size=(height, width))
