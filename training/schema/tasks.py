"""A config for each task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import AboveZero, Positive, Section, Share
from .cache import Cache
from .data import Data
from .models import ClipModel, DiTModel, MMDiTModel, UNetModel, VAEModel
from .optim import EMA, AdamW, OptimizerSection
from .paths import LogitNormalTimes, PathSection, RectifiedFlowPath, Timesteps, UnitWeight, Weighting
from .train import Train


class Run(Section):
    """What every task has."""

    output_dir: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    train: Train
    optimizer: OptimizerSection = AdamW()
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999  # warmed up as (1 + step) / (10 + step); 0 turns it off
    ema: EMA = EMA()


class AutoencoderLoss(Section):
    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    perceptual: str | None = None  # "lpips", or "clip:FOLDER" for the vision tower of that CLIP
    perceptual_weight: Annotated[float, Field(ge=0)] = 1.0
    gan_weight: Annotated[float, Field(ge=0)] = 0.0
    gan_start: Annotated[int, Field(ge=0)] = 0  # images seen before the critic joins
    critic_channels: Positive = 64
    critic_layers: Positive = 3
    critic_learning_rate: AboveZero = 1e-4


class AutoencoderConfig(Run):
    task: Literal["autoencoder"]
    model: VAEModel = VAEModel()
    loss: AutoencoderLoss = AutoencoderLoss()
    latent_shift: bool = False  # store the latents' mean too: only SD3's pipeline honours it


class ClipConfig(Run):
    task: Literal["clip"]
    model: ClipModel = ClipModel()


class Pretrained(Section):
    pretrained: str  # a folder, the output_dir of another config, or a hub name


class Sample(Section):
    prompts: tuple[str, ...] = ()
    num_inference_steps: Positive = 20
    guidance_scale: Annotated[float, Field(ge=0)] = 3.0
    seed: int = 0


class DiffusionConfig(Run):
    task: Literal["diffusion"]
    vae: Pretrained
    text: Pretrained
    model: Annotated[UNetModel | MMDiTModel | DiTModel, Field(discriminator="name")]
    path: PathSection = RectifiedFlowPath()
    prediction_type: Literal["flow_prediction", "epsilon", "v_prediction", "sample", "score", "karras"] = (
        "flow_prediction"
    )
    sigma_data: AboveZero = 1.0  # of karras: the latents' standard deviation, which scaling brings to 1
    learned_variance: bool = False  # the network tells each step's variance too (Nichol & Dhariwal 2021); dit alone
    timesteps: Timesteps = LogitNormalTimes()
    weighting: Weighting = UnitWeight()
    caption_dropout: Share = 0.1
    cache: Cache = Cache()
    sample: Sample = Sample()


Config = AutoencoderConfig | ClipConfig | DiffusionConfig
