"""The networks: fields of the stock classes, under their names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Positive, Section


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


class UNetModel(Section):
    """Fields of diffusers' UNet2DConditionModel."""

    name: Literal["unet"]
    block_out_channels: tuple[Positive, ...] = (64, 128, 192)
    layers_per_block: Positive = 2
    attention_levels: tuple[bool, ...] | None = None  # which levels attend to the text; all but the finest if absent
    attention_head_dim: Positive | tuple[Positive, ...] = 4  # the number of heads, as in SD's configs; or per level
    norm_num_groups: Positive = 32
    use_linear_projection: bool = True
    transformer_layers_per_block: Positive | tuple[Positive, ...] = 1  # or per level
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


class DiTModel(Section):
    """Fields of diffusers' PixArtTransformer2DModel."""

    name: Literal["dit"]
    patch_size: Positive = 2
    num_layers: Positive = 8
    attention_head_dim: Positive = 64
    num_attention_heads: Positive = 6
    interpolation_scale: Annotated[float, Field(gt=0)] | None = None  # of the positions; by the latents' side if absent
