"""What ``train_step.py`` trains: networks and encoders at some sizes, and pictures that need no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "grey": (128, 128, 128)}
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Setting:
    """A network and the encoders that it is trained with.

    Args:
        about: for the report.
        pixels: side of the pictures.
        pictures: how many there are to train on.
        vae: of diffusers' AutoencoderKL.
        text: of transformers' CLIPTextConfig.
        tokens: of a caption.
        unet: of the config's section ``model``.
        ratio: ours / stock, at most.
        tail: optimizer, clipping and average as a share of our step, at most; None: not looked at.
        loop: the loop's own time as a share of our step, at most.
    """

    name: str
    about: str
    pixels: int
    batch: int
    pictures: int
    vae: dict[str, Any]
    text: dict[str, Any]
    tokens: int
    unet: dict[str, Any]
    ratio: float
    tail: float | None = None
    loop: float = 0.03


def vae(widths: tuple[int, ...], **rest: Any) -> dict[str, Any]:
    levels = len(widths)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"block_out_channels": widths, "latent_channels": 4, **blocks, **rest}


def text(width: int, layers: int, heads: int, inside: int) -> dict[str, int]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inside,
    }  # fmt: skip


SETTINGS = {
    x.name: x
    for x in (
        Setting(
            "small", "the demo's autoencoder, text tower and network", 64, 16, 64,
            vae((32, 64, 64), layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False),
            text(192, 3, 4, 512), 32,
            {"block_out_channels": (64, 128, 192), "layers_per_block": 1},
            ratio=0.70,
        ),
        Setting(
            "sd", "Stable Diffusion's autoencoder and CLIP-L's text tower", 128, 16, 32,
            vae((128, 256, 512, 512), layers_per_block=2), text(768, 12, 12, 3072), 77,
            {"block_out_channels": (128, 256, 384), "layers_per_block": 2, "attention_head_dim": 8,
             "attention_levels": (True, True, False)},  # text at every level but the coarsest, as in SD 1.5
            ratio=0.25, tail=0.05,
        ),
        Setting(
            "tiny", "to try this file out", 16, 4, 8,
            vae((8, 8), layers_per_block=1, norm_num_groups=4), text(16, 1, 2, 32), 12,
            {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2},
            ratio=2.0, tail=0.9, loop=0.9,
        ),
    )
}  # fmt: skip


def write_pictures(root: Path, count: int, side: int) -> list[str]:
    """An imagefolder of discs on noise, of which the last is held out.

    Returns:
        The captions.
    """
    generator, captions = np.random.default_rng(0), []
    y, x = np.mgrid[:side, :side] / side
    for i in range(count + 1):
        ground = generator.normal(128, 40, (side, side, 3))
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        cx, cy = generator.uniform(0.3, 0.7, 2)
        ground[(x - cx) ** 2 + (y - cy) ** 2 < 0.06] = colour
        folder = root / ("train" if i < count else "test")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ground.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04d}.png")
        captions.append(f"a {name} disc, number {i}")
        (folder / f"{i:04d}.txt").write_text(captions[-1], encoding="utf-8")
    return captions


def write_encoders(place: Path, setting: Setting, captions: list[str]) -> tuple[Path, Path]:
    """Folders of the stock classes with random weights: the autoencoder, and the text tower with its tokenizer.

    The vocabulary is the captions' own: its size decides the file's, and no step's time.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm.models.bpe import train_tokenizer

    torch.manual_seed(0)
    pictures, words = place / "vae", place / "text"
    AutoencoderKL(**setting.vae, sample_size=setting.pixels).save_pretrained(pictures)
    tokenizer = train_tokenizer(captions, vocab_size=560, max_length=setting.tokens)
    rest: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": setting.tokens,
    }
    config = CLIPTextConfig(**setting.text, **rest)
    CLIPTextModel(config).save_pretrained(words / "text_encoder")
    tokenizer.save_pretrained(words / "tokenizer")
    return pictures, words


def config_of(setting: Setting, place: Path, data: Path, vae: Path, text: Path) -> dict[str, Any]:
    """What the script trains, as a config of ours: DDPM's noise prediction. No caption is dropped: the script drops
    none. The log gets a line at each step, as the script's tracker does."""
    never = {f"{name}_every": 10**12 for name in ("validate", "sample", "checkpoint")}
    return {
        "task": "diffusion",
        "output_dir": str(place / "run"),
        "data": {"path": str(data), "resolution": setting.pixels, "buckets": False},
        "vae": {"pretrained": str(vae)},
        "text": {"pretrained": str(text)},
        "model": {"name": "unet", **setting.unet},
        "path": {"name": "discrete"},
        "prediction_type": "epsilon",
        "timesteps": {"name": "uniform"},
        "caption_dropout": 0.0,
        "ema_decay": 0.9999,
        "optimizer": {"learning_rate": LEARNING_RATE},
        "train": {
            "images": 10**9, "batch_size": setting.batch, "mixed_precision": "no", "log_every": setting.batch, **never,
        },
    }  # fmt: skip
