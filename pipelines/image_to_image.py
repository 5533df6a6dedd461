"""Image to image, called as the stock pipelines are; with a network that edits pictures, InstructPix2Pix."""

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

STRENGTHS = {"sd": 0.8, "sdxl": 0.3, "sd3": 0.6, "pixart": 0.6}
EDITING = {"sd": (100, 7.5), "sdxl": (100, 5.0)}  # steps and guidance of the InstructPix2Pix pipelines


class ImageToImagePipeline(LatentPipeline):
    """Draws pictures from prompts and pictures: these are the beginning (SDEdit, Meng et al. 2022), or with a network
    of the kind ``image`` what is edited (InstructPix2Pix, Brooks et al. 2023)."""

    defaults: ClassVar = {"sd": (50, 7.5), "sdxl": (50, 5.0), "sd3": (50, 7.0), "pixart": (20, 4.5)}

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts | None = None,
        image: Pictures | None = None,
        strength: float | None = None,
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
        *,
        height: int | None = None,
        width: int | None = None,
        image_guidance_scale: float | None = None,
        **more: Unpack[More],
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw. What is not said here is as in ``TextToImagePipeline``.

        Args:
            image: one, or one for each prompt, as ``pictures.to_pictures`` takes them; or normalized latents, as
                ``output_type="latent"`` gives them.
            strength: 0 to 1, how much of the steps is walked: 1 draws nearly all anew. By default SD 0.8, SDXL 0.3, SD3
                0.6. A network that edits walks all.
            num_inference_steps, guidance_scale: of the whole grid. By default SD 50 and 7.5, SDXL 50 and 5.0, SD3 50
                and 7.0, PixArt 20 and 4.5; InstructPix2Pix 100 and 7.5, or 5.0 in SDXL.
            generator: one for all pictures, or a list of one for each; it draws the picture's latents, then the noise.
            latents: (B, C, h, w) the noise, instead of the generator's.
            height, width: to bring the pictures to; by default they stay as they are.
            image_guidance_scale: of a network that edits, how much it keeps to the picture; 1.5 by default, 1 is none.
        Raises:
            ValueError, TypeError: naming the argument and what was expected.
        """
        kind = kind_of(self.net)
        if kind not in (None, "image"):
            name = "InpaintPipeline" if kind == "inpaint" else "UpscalePipeline"
            raise ValueError(f"the network is of the kind {kind!r}: call pipelines.{name}.from_pipe(pipe)")
        edits = kind == "image"
        if edits and strength not in (None, 1, 1.0):
            raise ValueError(f"strength is {strength}, but this network edits from pure noise; leave it out")
        if not edits and image_guidance_scale is not None:
            raise ValueError("image_guidance_scale is for networks that edit, which this one does not; leave it out")
        pictures = to_pictures(image, (height, width), self.vae.config["latent_channels"])
        steps, scale = EDITING.get(self.text.family, (None, None)) if edits else (None, None)
        call = Call(
            Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds),
            steps if num_inference_steps is None else num_inference_steps,
            scale if guidance_scale is None else guidance_scale, num_images_per_prompt, eta, generator, latents,
            output_type, return_dict, guidance_rescale, callback_on_step_end, callback_on_step_end_tensor_inputs, more,
        )  # fmt: skip
        if edits:
            closeness = 1.5 if image_guidance_scale is None else image_guidance_scale
            return self._draw(call, pictures, image_guidance_scale=closeness)
        return self._draw(call, pictures, strength=STRENGTHS[self.text.family] if strength is None else strength)
