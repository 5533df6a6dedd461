"""Pictures from text with a trained model, and folders that stock diffusers opens; imported on first use."""

from typing import TYPE_CHECKING

from ldm.lazy import attach

if TYPE_CHECKING:
    from .folder import export, load_parts
    from .image_to_image import ImageToImagePipeline
    from .inpaint import InpaintPipeline
    from .text_to_image import TextToImagePipeline
    from .upscale import UpscalePipeline

__getattr__, __dir__ = attach(
    __name__,
    {
        "folder": "export load_parts",
        "image_to_image": "ImageToImagePipeline",
        "inpaint": "InpaintPipeline",
        "text_to_image": "TextToImagePipeline",
        "upscale": "UpscalePipeline",
    },
)
