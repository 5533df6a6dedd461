"""The config's sections: one small model each. Knows no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Data(Section):
    """Where the pictures and captions come from, and how they are cut."""

    path: str  # imagefolder, parquet file or folder, or hub:owner/name
    resolution: Positive = 64  # pixels, both sides
    image_column: str = "image"
    caption_column: str = "text"
    center_crop: bool = True  # False: squeeze to a square
    random_crop: Positive | None = None  # autoencoder: train on random crops of this many pixels
    random_flip: bool = False
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05  # share kept for validation where the source has one split


class Optimizer(Section):
    """Fused AdamW (Loshchilov & Hutter 2019) with the usual schedules."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    adam_weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    lr_warmup_images: Annotated[int, Field(ge=0)] = 0


class Train(Section):
    """How long, and how often what. The clock counts images."""

    images: Positive  # how many pictures are seen in all
    batch_size: Positive = 16  # pictures per process and micro-batch
    gradient_accumulation_steps: Positive = 1
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # auto: bf16 where the hardware has units for it
    num_workers: Annotated[int, Field(ge=0)] = 0
    log_every: Positive = 1_000
    validate_every: Positive = 10_000
    sample_every: Positive = 20_000
    checkpoint_every: Positive = 20_000
    keep_last: Positive = 2
    max_skipped_steps: Positive = 20  # this many steps in a row without a finite gradient end the run


class Run(Section):
    """What every task has."""

    output_dir: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    train: Train
    optimizer: Optimizer = Optimizer()
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999  # warmed up as (1 + step) / (10 + step); 0 turns it off


class VAEModel(Section):
    """Fields of diffusers' AutoencoderKL."""

    latent_channels: Positive = 4
    block_out_channels: tuple[Positive, ...] = (32, 64, 64)
    layers_per_block: Positive = 1
    norm_num_groups: Positive = 8
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @property
    def factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderLoss(Section):
    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    perceptual: str | None = None  # "lpips", or "clip:FOLDER" for the vision tower of that CLIP
    perceptual_weight: Annotated[float, Field(ge=0)] = 1.0
    gan_weight: Annotated[float, Field(ge=0)] = 0.0
    gan_start: Annotated[int, Field(ge=0)] = 0  # images seen before the critic joins
    critic_channels: Positive = 64
    critic_layers: Positive = 3
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-4


class AutoencoderConfig(Run):
    task: Literal["autoencoder"]
    model: VAEModel = VAEModel()
    loss: AutoencoderLoss = AutoencoderLoss()
    latent_shift: bool = False  # store the latents' mean too: only SD3's pipeline honours it


class Tower(Section):
    hidden_size: Positive = 192
    num_hidden_layers: Positive = 4
    num_attention_heads: Positive = 4
    intermediate_size: Positive = 768


class VisionTower(Tower):
    patch_size: Positive = 8


class Tokenizer(Section):
    vocab_size: Annotated[int, Field(ge=514)] = 4096  # 512 byte symbols, start and end come first
    max_length: Annotated[int, Field(ge=4, le=512)] = 77


class ClipModel(Section):
    text: Tower = Tower()
    vision: VisionTower = VisionTower()
    projection_dim: Positive = 192
    tokenizer: Tokenizer = Tokenizer()


class ClipConfig(Run):
    task: Literal["clip"]
    model: ClipModel = ClipModel()


class UNetModel(Section):
    """Fields of diffusers' UNet2DConditionModel."""

    name: Literal["unet"]
    block_out_channels: tuple[Positive, ...] = (64, 128, 192)
    layers_per_block: Positive = 2
    attention_levels: tuple[bool, ...] | None = None  # which levels attend to the text; all but the finest if absent
    attention_head_dim: Positive = 4  # the number of heads, as in SD's configs
    norm_num_groups: Positive = 32
    use_linear_projection: bool = True
    transformer_layers_per_block: Positive = 1
    cross_attention_dim: Positive | None = None  # taken from the text encoder


class MMDiTModel(Section):
    """Fields of diffusers' SD3Transformer2DModel."""

    name: Literal["mmdit"]
    patch_size: Positive = 2
    num_layers: Positive = 8
    attention_head_dim: Positive = 64
    num_attention_heads: Positive = 6
    joint_attention_dim: Positive | None = None  # text width + 2, or more: the rest is zeros
    qk_norm: Literal["rms_norm"] | None = "rms_norm"
    pos_embed_max_size: Positive = 32


class PathSection(Section):
    name: Literal["rectified_flow", "discrete"] = "rectified_flow"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"  # discrete only
    num_train_timesteps: Positive = 1000


class Timesteps(Section):
    name: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 1.0  # SD3's, in training and in the exported scheduler


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
    model: Annotated[UNetModel | MMDiTModel, Field(discriminator="name")]
    path: PathSection = PathSection()
    prediction_type: Literal["flow_prediction", "epsilon", "v_prediction", "sample"] = "flow_prediction"
    timesteps: Timesteps = Timesteps()
    caption_dropout: Share = 0.1
    sample: Sample = Sample()


Config = AutoencoderConfig | ClipConfig | DiffusionConfig
