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


def clip(kind: type, width: int, length: int, **config: Any) -> dict[str, Any]:
    """A text encoder and its tokenizer; a small one unless ``config`` says otherwise."""
    known: Any = words(length)
    sizes: dict[str, Any] = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 4,
        "projection_dim": POOLED, **config,
    }  # fmt: skip
    whole = CLIPTextConfig(
        vocab_size=len(known), max_position_embeddings=length, bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id, **sizes,
    )  # fmt: skip
    torch.manual_seed(2)
    return {"text_encoder": kind(whole).eval(), "tokenizer": known}


def second(parts: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_2": part for name, part in parts.items()}


def t5(width: int) -> dict[str, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz'"]
    known = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    torch.manual_seed(2)
    config = T5Config(vocab_size=len(known), d_model=width, d_kv=32, d_ff=width, num_layers=2, num_heads=4)
    return {"text_encoder": T5EncoderModel(config).eval(), "tokenizer": known}


def stable_diffusion(of: Case, autoencoder: str, length: int, **text: Any) -> Any:
    """``text``: of the text encoder's config."""
    kind: Any = StableDiffusionPipeline
    return kind(
        unet=stock_of(of), vae=vae(autoencoder), **clip(Clip, of.config["cross_attention_dim"], length, **text),
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


def sd3(size: str = "64", autoencoder: str = "demo", length: int = 77, **unlike: Any) -> Any:
    """``unlike``: of the network's config."""
    of = case("mmdit", size)
    of = replace(of, config=of.config | {"pooled_projection_dim": 2 * POOLED, **unlike})
    return _sd3(of, vae(autoencoder, shift_factor=0.0), *(clip(Projected, 128, length) for _ in range(2)))


def _sd3(of: Case, autoencoder: AutoencoderKL, first: dict[str, Any], other: dict[str, Any]) -> Any:
    kind: Any = StableDiffusion3Pipeline
    return kind(
        transformer=stock_of(of), vae=autoencoder, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **first, **second(other), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def tiny_sd3() -> Any:
    return sd3("tiny", "tiny", 16, joint_attention_dim=256)


# Text towers of CLIP ViT-L/14 and OpenCLIP bigG/14.
CLIP_L = {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {
    "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280,
    "hidden_act": "gelu",
}  # fmt: skip


def stable_diffusion_15() -> Any:
    """Stable Diffusion 1.5 at its size; the vocabulary alone is small."""
    return stable_diffusion(case("unet", "sd15"), "sd", 77, **CLIP_L)


def stable_diffusion_3() -> Any:
    """Stable Diffusion 3 medium at its size, 512 px, without T5, which it may do without."""
    towers = clip(Projected, 768, 77, **CLIP_L), clip(Projected, 1280, 77, **CLIP_G)
    return _sd3(case("mmdit", "sd3"), vae("sd", latent_channels=16, shift_factor=0.0), *towers)


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
