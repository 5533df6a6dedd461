"""The config's sections: one small model each. Knows no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
AboveZero = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def or_kind(default: str) -> BeforeValidator:
    """Of a section of several kinds, told apart by their ``name``: without one it is the default kind."""
    return BeforeValidator(lambda given: {"name": default, **given} if isinstance(given, dict) else given)


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

    learning_rate: AboveZero = 1e-4
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: AboveZero = 1e-8
    adam_weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: AboveZero = 1.0
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    lr_warmup_images: Annotated[int, Field(ge=0)] = 0


class Train(Section):
    """How long, and how often what. The clock counts images."""

    images: Positive  # how many pictures are seen in all
    batch_size: Positive = 16  # pictures per process and micro-batch
    gradient_accumulation_steps: Positive = 1
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # auto: bf16 where the hardware has units for it
    attention_backend: Literal["auto", "xformers", "flash", "sdpa", "plain"] = "auto"
    gradient_checkpointing: Share = 0.0  # share of the blocks recomputed in the backward pass; true: all
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
    critic_learning_rate: AboveZero = 1e-4


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


class RectifiedFlowPath(Section):
    name: Literal["rectified_flow"] = "rectified_flow"


class CosinePath(Section):
    name: Literal["cosine"]


class LinearPath(Section):
    name: Literal["linear"]
    beta_min: AboveZero = 0.1
    beta_max: AboveZero = 20.0


class SigmoidPath(Section):
    name: Literal["sigmoid"]
    start: float = -3.0
    end: float = 3.0
    tau: AboveZero = 1.0


class VEPath(Section):
    name: Literal["ve"]
    sigma_max: AboveZero = 80.0


class NCSNPath(Section):
    name: Literal["ncsn"]
    sigma_min: AboveZero = 0.01
    sigma_max: AboveZero = 50.0


class DiscretePath(Section):
    """The betas of diffusers' schedulers, under their names."""

    name: Literal["discrete"]
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "scaled_linear"
    beta_start: AboveZero = 0.00085
    beta_end: AboveZero = 0.012
    num_train_timesteps: Positive = 1000
    rescale_betas_zero_snr: bool = False


PathSection = Annotated[
    RectifiedFlowPath | CosinePath | LinearPath | SigmoidPath | VEPath | NCSNPath | DiscretePath,
    Field(discriminator="name"),
    or_kind("rectified_flow"),
]


class Times(Section):
    shift: AboveZero = 1.0  # SD3's, in training and in the exported scheduler
    stratified: bool = False  # one time in each of batch_size equal parts: less noise in a batch's loss


class UniformTimes(Times):
    name: Literal["uniform"]


class LogitNormalTimes(Times):
    name: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: AboveZero = 1.0


class ModeTimes(Times):
    name: Literal["mode"]
    scale: float = 1.29


class LogNormalTimes(Times):
    """EDM's P_mean and P_std, of log(sigma / alpha)."""

    name: Literal["log_normal"]
    mean: float = -1.2
    std: AboveZero = 1.2


Timesteps = Annotated[
    UniformTimes | LogitNormalTimes | ModeTimes | LogNormalTimes,
    Field(discriminator="name"),
    or_kind("logit_normal"),
]


class UnitWeight(Section):
    name: Literal["unit"] = "unit"


class MinSNRWeight(Section):
    name: Literal["min_snr"]
    gamma: AboveZero = 5.0


class P2Weight(Section):
    name: Literal["p2"]
    gamma: Annotated[float, Field(ge=0)] = 1.0
    k: AboveZero = 1.0


class DebiasedWeight(Section):
    name: Literal["debiased"]


class SigmoidWeight(Section):
    name: Literal["sigmoid"]
    bias: float = 0.0


class EDMWeight(Section):
    name: Literal["edm"]
    sigma_data: AboveZero = 0.5


class CosmapWeight(Section):
    name: Literal["cosmap"]


Weighting = Annotated[
    UnitWeight | MinSNRWeight | P2Weight | DebiasedWeight | SigmoidWeight | EDMWeight | CosmapWeight,
    Field(discriminator="name"),
    or_kind("unit"),
]


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
    path: PathSection = RectifiedFlowPath()
    prediction_type: Literal["flow_prediction", "epsilon", "v_prediction", "sample", "score", "karras"] = (
        "flow_prediction"
    )
    sigma_data: AboveZero = 1.0  # of karras: the latents' standard deviation, which scaling brings to 1
    timesteps: Timesteps = LogitNormalTimes()
    weighting: Weighting = UnitWeight()
    caption_dropout: Share = 0.1
    sample: Sample = Sample()


Config = AutoencoderConfig | ClipConfig | DiffusionConfig
