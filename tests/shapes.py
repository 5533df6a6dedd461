"""A set of coloured shapes, and a chain of tiny runs on it: CLIP, autoencoder and the denoisers."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw

from training.config import parse
from training.run import train_all
from training.schema import Config

COLOURS = ("red", "green", "blue", "yellow", "black", "orange")
SHAPES = ("circle", "square", "triangle", "cross")
SIDE = 32


def draw(shape: str, colour: str, room: int) -> Image.Image:
    """``room`` pixels from the edge."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen, a, b, m = ImageDraw.Draw(picture), room, SIDE - 1 - room, SIDE // 2
    if shape == "circle":
        pen.ellipse((a, a, b, b), fill=colour)
    elif shape == "square":
        pen.rectangle((a, a, b, b), fill=colour)
    elif shape == "triangle":
        pen.polygon(((m, a), (a, b), (b, b)), fill=colour)
    else:
        pen.line((a, m, b, m), fill=colour, width=6)
        pen.line((m, a, m, b), fill=colour, width=6)
    return picture


def write_shapes(root: Path) -> Path:
    """An imagefolder: 24 captioned pictures to train on, the six circles in another size held out."""
    for split, shapes, room in (("train", SHAPES, 4), ("test", SHAPES[:1], 7)):
        (root / split).mkdir(parents=True)
        lines = []
        for colour in COLOURS:
            for shape in shapes:
                name = f"{colour}_{shape}.png"
                draw(shape, colour, room).save(root / split / name)
                lines.append(json.dumps({"file_name": name, "text": f"a {colour} {shape}"}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


PROMPTS = ["a red circle", "a blue square", "a green cross", "a black triangle"]
CLIP = {
    "task": "clip",
    "model": {
        "text": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        "vision": {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "patch_size": 8,
        },
        "projection_dim": 12,
        "tokenizer": {"vocab_size": 560, "max_length": 12},
    },
    "ema_decay": 0.8,
    "optimizer": {"learning_rate": 3e-3},
    "train": {"images": 240, "batch_size": 24, "log_every": 24, "validate_every": 120, "checkpoint_every": 240},
}  # fmt: skip
VAE_ = {
    "task": "autoencoder",
    "model": {"block_out_channels": [8, 8, 16], "norm_num_groups": 4, "mid_block_add_attention": False},
    "loss": {
        "perceptual_weight": 0.1, "gan_weight": 0.1, "gan_start": 48, "critic_channels": 8, "critic_layers": 1,
    },
    "ema_decay": 0.8,
    "optimizer": {"learning_rate": 3e-3},
    "train": {
        "images": 96, "batch_size": 8, "log_every": 8, "validate_every": 48, "sample_every": 96,
        "checkpoint_every": 96,
    },
}  # fmt: skip
UNET = {
    "task": "diffusion",
    "model": {
        "name": "unet", "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8,
        "attention_head_dim": 2,
    },
    "ema_decay": 0.9,
    "optimizer": {"learning_rate": 3e-3},
    "train": {
        "images": 1440, "batch_size": 24, "log_every": 48, "validate_every": 240, "sample_every": 720,
        "checkpoint_every": 120, "mixed_precision": "no",
    },
    "sample": {"prompts": PROMPTS, "num_inference_steps": 5, "guidance_scale": 2.0, "seed": 3},
}  # fmt: skip
MMDIT = UNET | {
    "model": {"name": "mmdit", "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2},
    "train": UNET["train"] | {"images": 240, "checkpoint_every": 240, "sample_every": 240},
}
DIT = MMDIT | {"model": {"name": "dit", "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}}


@dataclass
class Made:
    """A trained chain of runs."""

    root: Path
    raw: dict[str, dict[str, Any]]
    configs: dict[str, Config]

    def run(self, name: str) -> Path:
        return self.root / name

    def pipeline(self, name: str) -> Path:
        return self.root / name / "pipeline"

    def metrics(self, name: str, key: str) -> list[tuple[int, float]]:
        lines = (self.run(name) / "log/metrics.jsonl").read_text().splitlines()
        return [(row["images"], row[key]) for row in map(json.loads, lines) if key in row]

    def variant(self, name: str, output_dir: Path, **changes: Any) -> dict[str, Any]:
        """The plain config of a run, with dotted changes, in another folder."""
        raw = copy.deepcopy(self.raw[name])
        for key, value in {**changes, "output_dir": str(output_dir)}.items():
            *parents, last = key.split("__")
            section = raw
            for part in parents:
                section = section.setdefault(part, {})
            section[last] = value
        return raw


def chain(root: Path, wanted: Collection[str] = ("clip", "vae", "unet", "mmdit", "dit")) -> Made:
    """The configs of all, and the runs of those that are wanted."""
    data = {"path": str(write_shapes(root / "data")), "resolution": SIDE}
    given = {"vae": {"pretrained": str(root / "vae")}, "text": {"pretrained": str(root / "clip")}}
    raw = {
        "clip": CLIP,
        "vae": VAE_ | {"loss": VAE_["loss"] | {"perceptual": f"clip:{root / 'clip'}"}},
        "unet": UNET | given,
        "mmdit": MMDIT | given,
        "dit": DIT | given,
    }
    raw = {name: {**r, "output_dir": str(root / name), "data": data} for name, r in raw.items()}
    configs = {name: parse(r, name) for name, r in raw.items()}
    train_all([configs[name] for name in wanted])
    return Made(root, raw, configs)


def accelerator() -> Accelerator:
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="no")
