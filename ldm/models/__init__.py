"""The networks, one per file, each a twin of a stock diffusers class; imported on first use."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .dit import DiT
    from .mmdit import MMDiT
    from .text import TextEncoder
    from .unet import UNet
    from .vae import VAE

__getattr__, __dir__ = attach(
    __name__, {"dit": "DiT", "mmdit": "MMDiT", "text": "TextEncoder", "unet": "UNet", "vae": "VAE"}
)
