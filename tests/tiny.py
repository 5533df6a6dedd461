"""Tiny parts with random weights (nothing at zero, so that a difference shows), the same at every call."""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from ldm.models.bpe import train_tokenizer
from ldm.models.dit import DiT
from ldm.models.mmdit import MMDiT
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE

Module = TypeVar("Module", bound=nn.Module)
CAPTIONS = [
    "a red apple", "a green apple", "a red heart", "grinning face", "winking face", "a cat's face", "a dog's face",
    "apple tree", "zebra", "hot dog", "green salad", "a red car", "a fire engine", "face with tears of joy",
]  # fmt: skip
WIDTH, POOLED, JOINT, LENGTH = 16, 12, 24, 12


def randomize(module: Module, seed: int = 0, scale: float = 0.15) -> Module:
    """Every weight drawn anew; those of norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return module.eval()


@cache
def _vocabulary(max_length: int) -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS, vocab_size=560, max_length=max_length)


def tokenizer(max_length: int = LENGTH) -> CLIPTokenizer:
    known = _vocabulary(max_length)
    known.model_max_length = max_length
    return known


def text_config(max_length: int = LENGTH) -> CLIPTextConfig:
    known = tokenizer(max_length)
    return CLIPTextConfig(
        vocab_size=len(known),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        projection_dim=POOLED,
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
        pad_token_id=known.pad_token_id,
    )


def clip(max_length: int = LENGTH) -> CLIPModel:
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        text_config=text_config(max_length).to_dict(),
        vision_config=dict(**vision, image_size=16, patch_size=8, projection_dim=POOLED),
        projection_dim=POOLED,
    )
    return randomize(CLIPModel(config), 1)


def text(family: str = "sd", max_length: int = LENGTH, joint_width: int = JOINT) -> TextEncoder:
    if family == "sd":
        return TextEncoder(tokenizer(max_length), randomize(CLIPTextModel(text_config(max_length)), 1))
    model = randomize(CLIPTextModelWithProjection(text_config(max_length)), 1)
    return TextEncoder(tokenizer(max_length), model, "sd3", joint_width)


def vae(latent_channels: int = 4, scaling_factor: float = 0.7, shift_factor: float | None = None, **kw) -> VAE:
    """Halves the picture once."""
    config = dict(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16,
        latent_channels=latent_channels, scaling_factor=scaling_factor, shift_factor=shift_factor,
    )  # fmt: skip
    return randomize(VAE(**(config | kw)), 2)


def unet(sample_size: int = 8, **kw) -> UNet:
    config = dict(
        sample_size=sample_size, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=2,
    )  # fmt: skip
    return randomize(UNet(**(config | kw)), 3)


def mmdit(sample_size: int = 8, **kw) -> MMDiT:
    config = dict(
        sample_size=sample_size, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=3, caption_projection_dim=24, joint_attention_dim=JOINT,
        pooled_projection_dim=POOLED + 2, pos_embed_max_size=12,
    )  # fmt: skip
    return randomize(MMDiT(**(config | kw)), 4, 0.08)  # larger weights make 20 steps of it amplify rounding


def dit(sample_size: int = 8, **kw) -> DiT:
    config = dict(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3,
        cross_attention_dim=24, sample_size=sample_size, caption_channels=WIDTH,
    )  # fmt: skip
    return randomize(DiT(**(config | kw)), 5)
