"""Upscaling, called as the stock pipeline is: a small picture and a prompt -> a large one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from .base import Call, LatentPipeline
from .call import More, OnStepEnd, Prompts, Texts
from .core import Generators
from .kinds import kind_of
from .pictures import Pictures, to_pictures


class UpscalePipeline(LatentPipeline):
    """Draws pictures as many times larger as the autoencoder has pixels per latent, 4 in Stable Diffusion's x4
    upscaler, with a network of the kind ``low_resolution``."""

    defaults: ClassVar = dict.fromkeys(("sd", "sdxl", "sd3", "pixart"), (75, 9.0))

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts | None = None,
        image: Pictures | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        noise_level: int = 20,
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
        """Draw. What is not said here is as in ``TextToImagePipeline``.

        Args:
            image: small ones, one or one for each prompt, as ``pictures.to_pictures`` takes them.
            num_inference_steps, guidance_scale: 75 and 9.0 by default.
            noise_level: 0 to 999, how much noise the small picture is given, and the network told of; more than it was
                trained with (350 in Stable Diffusion's) is strange to it. The more, the freer the drawing.
            generator: one for all pictures, or a list of one for each; it draws the small picture's noise first.
        Raises:
            ValueError, TypeError: naming the argument and what was expected.
        """
        if (kind := kind_of(self.net)) != "low_resolution":
            raise ValueError(
                f"the network is of the kind {kind!r}, expected 'low_resolution', which is shown a small picture"
            )
        call = Call(
            Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds),
            num_inference_steps, guidance_scale, num_images_per_prompt, eta, generator, latents, output_type,
            return_dict, guidance_rescale, callback_on_step_end, callback_on_step_end_tensor_inputs, more,
        )  # fmt: skip
        return self._draw(call, to_pictures(image), noise_level=noise_level)
