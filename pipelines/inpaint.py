"""Inpainting, called as the stock pipelines are: with a network that is shown the mask, or with any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Unpack

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from .base import Call, LatentPipeline
from .call import More, OnStepEnd, Prompts, Texts
from .core import Generators
from .kinds import kind_of
from .pictures import Pictures, cut_out, size_of, to_masks, to_pictures

STRENGTHS = {"sd": 1.0, "sdxl": 0.9999, "sd3": 0.6, "pixart": 1.0}


class InpaintPipeline(LatentPipeline):
    """Draws what a mask covers anew. A network of the kind ``inpaint`` is shown mask and masked picture; any other that
    draws from text has what is around put back after each step."""

    defaults: ClassVar = {"sd": (50, 7.5), "sdxl": (50, 7.5), "sd3": (50, 7.0), "pixart": (20, 4.5)}

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts | None = None,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
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
        **more: Unpack[More],
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw. What is not said here is as in ``TextToImagePipeline``.

        Args:
            image: one, or one for each prompt, as ``pictures.to_pictures`` takes them.
            mask_image: one, or one for each picture, of the same size; white (1) is drawn anew, cut at 0.5.
            height, width: to bring both to; by default they stay as they are.
            padding_mask_crop: draw only what lies so many pixels around the mask, at ``height`` and ``width`` (by
                default what the network was made for), and put it back into the whole; for one picture of Pillow.
            strength: 0 to 1, how much of the steps is walked. Below 1 what is drawn anew begins with the picture. By
                default SD 1, SDXL 0.9999, SD3 0.6.
            num_inference_steps, guidance_scale: of the whole grid. By default 50 and 7.5, SD3 50 and 7.0, PixArt 20 and
                4.5.
            latents: (B, C, h, w) the noise, instead of the generator's.
        Raises:
            ValueError, TypeError: naming the argument and what was expected.
        """
        kind = kind_of(self.net)
        if kind not in (None, "inpaint"):
            name = "ImageToImagePipeline" if kind == "image" else "UpscalePipeline"
            raise ValueError(f"the network is of the kind {kind!r}: call pipelines.{name}.from_pipe(pipe)")
        back: Callable[[Any], Any] | None = None
        if padding_mask_crop is not None:
            if output_type != "pil":
                raise ValueError(f"padding_mask_crop: output_type is {output_type!r}, expected 'pil'")
            size = self.parts.size if height is None or width is None else (height, width)
            height, width = height or size[0], width or size[1]
            image, mask_image, back = cut_out(image, mask_image, padding_mask_crop, (height, width))
        pictures = to_pictures(image, (height, width), self.vae.config["latent_channels"] if kind is None else None)
        in_latents = pictures.shape[1] != 3
        h, w = (side * (self.vae.factor if in_latents else 1) for side in pictures.shape[-2:])
        of_mask = size_of(mask_image, "mask_image")
        if of_mask != (h, w) and (in_latents or of_mask != size_of(image)):
            raise ValueError(
                f"mask_image: {of_mask[0]} by {of_mask[1]} pixels (height, width), the picture {h} by {w}; expected "
                "one size"
            )
        masks = to_masks(mask_image, (h, w))
        if len(pictures) == 1:
            pictures = pictures.expand(len(masks), -1, -1, -1)
        if len(masks) not in (1, len(pictures)):
            raise ValueError(f"mask_image: {len(masks)} for {len(pictures)} pictures; expected 1, or one for each")
        call = Call(
            Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds),
            num_inference_steps, guidance_scale, num_images_per_prompt, eta, generator, latents, output_type,
            return_dict, guidance_rescale, callback_on_step_end, callback_on_step_end_tensor_inputs, more,
        )  # fmt: skip
        strength = STRENGTHS[self.text.family] if strength is None else strength
        images: list[Any] = self._draw(call._replace(return_dict=False), pictures, masks, strength=strength)[0]
        images = images if back is None else [back(drawn) for drawn in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)
