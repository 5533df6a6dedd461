"""The config's sections: one small model each. Knows no torch."""

from .adapt import Adapter, Hint, Inpaint, Lora, LowResolution, NewToken, Prior
from .data import Data
from .models import ClipModel, DiTModel, MMDiTModel, UNetModel, VAEModel
from .optim import Optimizer
from .paths import DiscretePath, Times
from .tasks import (
    AdaptConfig,
    AutoencoderConfig,
    AutoencoderLoss,
    ClipConfig,
    Config,
    DiffusionConfig,
    LatentRun,
    Pretrained,
    Run,
)
from .train import Train

__all__ = [
    "AdaptConfig",
    "Adapter",
    "AutoencoderConfig",
    "AutoencoderLoss",
    "ClipConfig",
    "ClipModel",
    "Config",
    "Data",
    "DiTModel",
    "DiffusionConfig",
    "DiscretePath",
    "Hint",
    "Inpaint",
    "LatentRun",
    "Lora",
    "LowResolution",
    "MMDiTModel",
    "NewToken",
    "Optimizer",
    "Pretrained",
    "Prior",
    "Run",
    "Times",
    "Train",
    "UNetModel",
    "VAEModel",
]
