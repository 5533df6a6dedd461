"""The config's sections: one small model each. Knows no torch."""

from .data import Data
from .models import ClipModel, DiTModel, MMDiTModel, UNetModel, VAEModel
from .optim import Optimizer
from .paths import DiscretePath, Times
from .tasks import AutoencoderConfig, AutoencoderLoss, ClipConfig, Config, DiffusionConfig, Pretrained, Run
from .train import Train

__all__ = [
    "AutoencoderConfig",
    "AutoencoderLoss",
    "ClipConfig",
    "ClipModel",
    "Config",
    "Data",
    "DiTModel",
    "DiffusionConfig",
    "DiscretePath",
    "MMDiTModel",
    "Optimizer",
    "Pretrained",
    "Run",
    "Times",
    "Train",
    "UNetModel",
    "VAEModel",
]
