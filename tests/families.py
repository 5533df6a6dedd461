"""Tiny stock pipelines of every family that ours reads, with random weights, and their text encoders."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ldm.models.bpe import train_tokenizer
from tests.tiny import CAPTIONS, randomize

WIDTH, WIDTH_2, POOLED, POOLED_2, T5_WIDTH, LENGTH = 16, 24, 12, 20, 48, 14
BETAS: dict[str, Any] = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
LONG = "a red apple and a green apple and a zebra and a hot dog and a car " * 40
PROMPTS = ["a red apple", "", "Grinning FACE! <b>žluťoučký</b> 苹果 🍎", LONG, "  A Dog's   face "]


@cache
def _clip_words(size: int) -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS, vocab_size=size, max_length=LENGTH)


def clip_tokenizer(second: bool = False) -> CLIPTokenizer:
    """The second pads with another token than the end, as OpenCLIP's does ("!", which has the id 0)."""
    known = copy.deepcopy(_clip_words(540 if second else 560))  # pipelines add words to theirs
    if second:
        known.add_special_tokens({"pad_token": "!"})
    return known


def t5_tokenizer() -> T5Tokenizer:
    return copy.deepcopy(_t5_words())


@cache
def _t5_words() -> T5Tokenizer:
    words = sorted({word for caption in CAPTIONS for word in caption.lower().split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words] + [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz'ABCDEFG"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def clip(kind: type, second: bool = False) -> Any:
    words = clip_tokenizer(second)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH_2 if second else WIDTH, intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=LENGTH,
        projection_dim=POOLED_2 if second else POOLED, hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return randomize(kind(config), 11 + second)


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return randomize(T5EncoderModel(config), 13)


def vae(channels: int = 4, **kw: Any) -> AutoencoderKL:
    config = dict(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16, latent_channels=channels,
        scaling_factor=0.7, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    return randomize(AutoencoderKL(**(config | kw)), 2)


def unet(text: int, **kw: Any) -> UNet2DConditionModel:
    config = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, cross_attention_dim=text, attention_head_dim=2,
    )  # fmt: skip
    return randomize(UNet2DConditionModel(**(config | kw)), 3)


def sd() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(), unet=unet(WIDTH), text_encoder=clip(CLIPTextModel), tokenizer=clip_tokenizer(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # type: ignore[arg-type]  # fmt: skip


def sdxl(first: bool = True, **kw: Any) -> StableDiffusionXLPipeline:
    width = WIDTH * first + WIDTH_2
    net = unet(
        width, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + POOLED_2, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), unet=net, scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        text_encoder=clip(CLIPTextModel) if first else None, tokenizer=clip_tokenizer() if first else None,
        text_encoder_2=clip(CLIPTextModelWithProjection, True), tokenizer_2=clip_tokenizer(True), **kw,
    )  # type: ignore[arg-type]  # fmt: skip


def sd3(with_t5: bool = True) -> StableDiffusion3Pipeline:
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=3, caption_projection_dim=24, joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=POOLED + POOLED_2, pos_embed_max_size=12,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        vae=vae(shift_factor=0.3), transformer=randomize(net, 4, 0.08),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, True), tokenizer_2=clip_tokenizer(True),
        text_encoder_3=t5() if with_t5 else None, tokenizer_3=t5_tokenizer() if with_t5 else None,
    )  # type: ignore[arg-type]  # fmt: skip


def pixart(kind: type = PixArtAlphaPipeline, **kw: Any) -> Any:
    config: dict[str, Any] = dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=3, num_attention_heads=3,
        attention_head_dim=8, cross_attention_dim=24, caption_channels=T5_WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    return kind(
        vae=vae(), transformer=randomize(PixArtTransformer2DModel(**(config | kw)), 5, 0.08),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", timestep_spacing="linspace"),
        text_encoder=t5(), tokenizer=t5_tokenizer(),
    )  # fmt: skip


PIPELINES = {
    "sd": sd,
    "sdxl": sdxl,
    "sdxl second alone": lambda: sdxl(first=False),
    "sdxl no zeros": lambda: sdxl(force_zeros_for_empty_prompt=False),
    "sd3": sd3,
    "sd3 without t5": lambda: sd3(with_t5=False),
    "pixart alpha": pixart,
    "pixart sigma": lambda: pixart(PixArtSigmaPipeline),
}


def quiet(pipe: DiffusionPipeline) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def waves(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))
