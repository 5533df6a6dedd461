"""The pipelines whose sampling is timed: stock ones with random weights, which need no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from transformers import CLIPTextModel as Clip
from transformers import CLIPTextModelWithProjection as Projected

from benchmarks.cases import CASES, Case, stock_of, unet
from ldm.models.bpe import train_tokenizer

PROMPTS = ["a red apple", "a green heart", "a grinning face", "a dog's face", "a car", "a zebra", "a house", "a tree"]
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
POOLED = 64  # width of the second text encoder's vector


def case(network: str, size: str) -> Case:
    return next(x for x in CASES if (x.network, x.size) == (network, size))


def vae(size: str, **config: Any) -> AutoencoderKL:
    known = next(x for x in CASES if (x.network, x.size) == ("vae", size))
    torch.manual_seed(1)
    return AutoencoderKL(**{**known.config, "scaling_factor": 0.18215, **config})


@cache
def words(length: int) -> CLIPTokenizer:
    return train_tokenizer(PROMPTS, vocab_size=560, max_length=length)


def clip(kind: type, width: int, length: int) -> dict[str, Any]:
    """A text encoder and its tokenizer."""
    known: Any = words(length)
    config = CLIPTextConfig(
        vocab_size=len(known), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=length, projection_dim=POOLED,
        bos_token_id=known.bos_token_id, eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(2)
    return {"text_encoder": kind(config).eval(), "tokenizer": known}


def second(parts: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_2": part for name, part in parts.items()}


def t5(width: int) -> dict[str, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz'"]
    known = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    torch.manual_seed(2)
    config = T5Config(vocab_size=len(known), d_model=width, d_kv=32, d_ff=width, num_layers=2, num_heads=4)
    return {"text_encoder": T5EncoderModel(config).eval(), "tokenizer": known}


def stable_diffusion(of: Case, autoencoder: str, length: int) -> Any:
    kind: Any = StableDiffusionPipeline
    return kind(
        unet=stock_of(of), vae=vae(autoencoder), **clip(Clip, of.config["cross_attention_dim"], length),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    kind: Any = StableDiffusionXLPipeline
    of = unet("xl", (64, 128, 256), (4, 32, 32), 77, {
        "cross_attention_dim": 256, "attention_head_dim": (2, 4, 8), "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 4), "addition_embed_type": "text_time", "addition_time_embed_dim": 64,
        "projection_class_embeddings_input_dim": 6 * 64 + POOLED,
    })  # fmt: skip
    return kind(
        unet=stock_of(of), vae=vae("small"), **clip(Clip, 128, 77), **second(clip(Projected, 128, 77)),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    )  # fmt: skip


def sd3() -> Any:
    kind: Any = StableDiffusion3Pipeline
    of = case("mmdit", "64")
    of = replace(of, config=of.config | {"pooled_projection_dim": 2 * POOLED})
    return kind(
        transformer=stock_of(of), vae=vae("demo", shift_factor=0.0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **clip(Projected, 128, 77), **second(clip(Projected, 128, 77)), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def pixart() -> Any:
    kind: Any = PixArtAlphaPipeline
    of = case("dit", "64")
    return kind(
        transformer=stock_of(of), vae=vae("demo"), **t5(of.config["caption_channels"]),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", timestep_spacing="linspace"),
    )  # fmt: skip


PIPELINES: dict[str, tuple[str, Callable[[], Any]]] = {
    "demo": ("the demo's network, 64 px", lambda: stable_diffusion(case("unet", "demo"), "demo", 32)),
    "sd": ("Stable Diffusion's form, 32 x 32 latents", lambda: stable_diffusion(case("unet", "small"), "small", 77)),
    "sdxl": ("SDXL's form, 32 x 32 latents", sdxl),
    "dit": ("PixArt's form, 8 layers of 384, 64 px", pixart),
    "mmdit": ("SD 3's form, 8 layers of 384, 64 px", sd3),
    "tiny": ("to try this file out", lambda: stable_diffusion(case("unet", "tiny"), "tiny", 16)),
}  # fmt: skip
