"""A config for each task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .adapt import Conditioning, Lora, NewToken, Prior
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


class Validation(Section):
    """The held-out loss: of how many pictures, and at how many times t each, with fixed noise."""

    rows: Positive = 64
    levels: Positive = 8


PredictionType = Literal["flow_prediction", "epsilon", "v_prediction", "sample", "score", "karras"]


class LatentRun(Run):
    """What every training of a denoiser has."""

    weighting: Weighting = UnitWeight()
    noise_offset: Annotated[float, Field(ge=0)] = 0.0  # times one normal number for each channel, added to its noise
    input_perturbation: Annotated[float, Field(ge=0)] = 0.0  # times normal noise, added to what the network sees alone
    caption_dropout: Share = 0.1
    cache: Cache = Cache()
    sample: Sample = Sample()
    validation: Validation = Validation()


class DiffusionConfig(LatentRun):
    """From nothing, in the latents of an autoencoder, told by a text encoder."""

    task: Literal["diffusion"]
    vae: Pretrained
    text: Pretrained
    model: Annotated[UNetModel | MMDiTModel | DiTModel, Field(discriminator="name")]
    path: PathSection = RectifiedFlowPath()
    prediction_type: PredictionType = "flow_prediction"
    sigma_data: AboveZero = 1.0  # of karras: the latents' standard deviation, which scaling brings to 1
    learned_variance: bool = False  # the network tells each step's variance too (Nichol & Dhariwal 2021); dit alone
    timesteps: Timesteps = LogitNormalTimes()


class AdaptConfig(LatentRun):
    """From a finished pipeline: all of its denoiser, or a LoRA, or new tokens."""

    task: Literal["adapt"]
    base: str  # pipeline folder, output_dir of another config, hub name, or a single .safetensors file
    base_config: str | None = None  # of a single file: a pipeline folder of its family, for tokenizers and configs
    variant: str | None = None  # of the base's files, as fp16
    base_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of frozen weights; auto: half where a GPU trains

    # What the base says of itself; a key that is given must agree with it.
    prediction_type: PredictionType | None = None
    path: PathSection | None = None
    rescale_betas_zero_snr: bool = False  # teach a chain to start from pure noise (Lin et al. 2024, algorithm 1)

    train_denoiser: bool = True  # false: new_tokens or the text encoders alone
    train_text_encoder: bool = False  # with lora: by one of its own
    lora: Lora | None = None
    new_tokens: tuple[NewToken, ...] = ()
    prior: Prior | None = None
    conditioning: Conditioning | None = None
    timesteps: Timesteps | None = None  # None: uniform on a chain, SD3's logit-normal on a flow, with the base's shift
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def reads_prompts(self) -> bool:
        """The text encoders are part of what trains."""
        return self.train_text_encoder or bool(self.new_tokens)

    @property
    def whole(self) -> bool:
        """What the run makes is a pipeline, and not a small file that goes with the base."""
        return self.lora is None and (self.train_denoiser or self.train_text_encoder)

    @model_validator(mode="before")
    @classmethod
    def _live(cls, given: Any) -> Any:
        """Captions are not cached where the text encoders train, unless the config says so (and is refused)."""
        if not isinstance(given, dict) or not isinstance(given.get("cache", {}), dict):
            return given
        live = given.get("train_text_encoder") or given.get("new_tokens")
        return {**given, "cache": {"text": False, **given.get("cache", {})}} if live else given


Config = AutoencoderConfig | ClipConfig | DiffusionConfig | AdaptConfig
