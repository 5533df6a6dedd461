"""What of a finished model trains, and what it trains on beside the pictures: LoRA, new tokens, DreamBooth's prior."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import AboveZero, Positive, Section, Share
from .optim import Pattern

Presets = Literal["attention", "attention+ff", "all-linear", "conv"]


class Adapter(Section):
    """A LoRA that is there while another one trains; it does not change."""

    path: str  # a file, a folder that holds one, or the output_dir of a LoRA run
    weight: float = 1.0


class Lora(Section):
    """Low-rank changes of some layers (Hu et al. 2021), by peft and under its names."""

    rank: Positive = 16
    lora_alpha: AboveZero | None = None  # the change counts alpha / rank; None: the rank, so that it counts once
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False  # alpha / sqrt(rank) instead (Kalajdzievski 2023)
    use_dora: bool = False  # each output's length learns by itself (Liu et al. 2024)
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    target_modules: Presets | tuple[Pattern, ...] = "attention"  # or patterns of module names, as "to_[qkv]$"
    # other ranks and alphas where the pattern is found in a module's name
    rank_pattern: dict[Pattern, Positive] = Field(default_factory=dict)
    alpha_pattern: dict[Pattern, AboveZero] = Field(default_factory=dict)
    text_encoder_rank: Positive | None = None  # with train_text_encoder; None: the same
    start: str | None = None  # go on training this one; its ranks, alphas and layers are taken over
    adapters: tuple[Adapter, ...] = ()
    quantization: Literal["nf4", "int8"] | None = None  # of the frozen base, by bitsandbytes


class NewToken(Section):
    """A word that the text encoders do not know yet (Gal et al. 2022)."""

    token: Annotated[str, Field(min_length=1)]  # as <toy>; captions and prompts use it like a word
    initializer_token: str | None = None  # starts as this word's embedding; None: as a random one of their size
    num_vectors: Positive = 1  # how many tokens it stands for


class Prior(Section):
    """Pictures of the class, drawn by the base before it trains, that keep it from forgetting (DreamBooth, Ruiz et al.
    2022, eq. 2). Keys as in diffusers' script. Each step sees as many of them as of one's own."""

    class_prompt: Annotated[str, Field(min_length=1)]
    class_data_dir: str | None = None  # pictures that are there are used; what is missing is drawn. None: in the run
    num_class_images: Positive = 100
    prior_loss_weight: Annotated[float, Field(ge=0)] = 1.0
    num_inference_steps: Positive = 25
    guidance_scale: Annotated[float, Field(ge=0)] = 7.5


class Inpaint(Section):
    """Mask and masked picture beside the latents: one channel and as many as theirs, in the order of Stable Diffusion's
    inpainting (latents, mask, masked picture)."""

    name: Literal["inpaint"]
    masks: Literal["random", "given"] = "random"  # given: data.mask_column or mask_suffix; white is to be painted anew
    whole: Share = 0.25  # of random ones, the share that is the whole picture


class LowResolution(Section):
    """The picture itself, small, at the latents' resolution: 3 channels, as the x4 upscaler has them, with noise of a
    level that the network is told (Ho et al. 2021, cascaded diffusion)."""

    name: Literal["low_resolution"]
    max_noise_level: Annotated[int, Field(ge=0, lt=1000)] = 350  # each image's is drawn from 0 to this


class Hint(Section):
    """A second picture of each row (a sketch, a depth map, an edge map), through the autoencoder: as many channels as
    the latents, in the order of InstructPix2Pix. ``data.hint_column`` or ``hint_suffix`` says where it is."""

    name: Literal["image"]
    dropout: Share = 0.1  # of images that are shown none; half of them have no caption either


Conditioning = Annotated[Inpaint | LowResolution | Hint, Field(discriminator="name")]
