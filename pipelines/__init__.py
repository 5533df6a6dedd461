"""Text to picture with a trained model, and folders that stock diffusers opens; imported on first use."""

from typing import TYPE_CHECKING

from ldm.lazy import attach

if TYPE_CHECKING:
    from .folder import export, load_parts
    from .text_to_image import TextToImagePipeline

__getattr__, __dir__ = attach(__name__, {"folder": "export load_parts", "text_to_image": "TextToImagePipeline"})
