"""Five small runs whose memory and time are told beforehand and then seen: for the test and for the benchmark."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from tests import tiny
from tests.stand_in import forked
from training import measure
from training.config import parse
from training.preflight import report
from training.run import train_all
from training.schema import Config

TOWER = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384}
TASKS: dict[str, dict[str, Any]] = {
    "clip": {"task": "clip", "model": {"text": TOWER, "vision": {**TOWER, "patch_size": 8}}},
    "autoencoder": {
        "task": "autoencoder", "model": {"block_out_channels": [32, 64]},
        "loss": {"gan_weight": 0.5, "gan_start": 32, "critic_channels": 32},
    },
    "unet": {"model": {"name": "unet", "block_out_channels": [32, 64], "layers_per_block": 1}},
    "mmdit": {"model": {"name": "mmdit", "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 6}},
    "dit": {"model": {"name": "dit", "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 6}},
}  # fmt: skip


def pictures(root: Path, count: int, side: int = 64) -> Path:
    """An imagefolder of noise, two thirds of it with captions of their own."""
    root.mkdir()
    lines = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": tiny.CAPTIONS[0] if i % 3 == 0 else f"picture {i}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def parts(root: Path) -> Path:
    """A tiny autoencoder of factor 2, and a tiny CLIP."""
    tiny.vae().to_diffusers().save_pretrained(root / "vae")
    tiny.clip().save_pretrained(root / "clip")
    tiny.tokenizer().save_pretrained(root / "clip")
    return root


def config_of(
    name: str, run: Path, data: Path, made: Path, images: int, batch: int = 16, side: int = 32, /, **sections: Any
) -> Config:
    """Of one of ``TASKS``. ``sections`` are joined to those of the config."""
    raw: dict[str, Any] = {
        "task": "diffusion", "output_dir": str(run), **TASKS[name],
        "data": {"path": str(data), "resolution": side, "held_out": 0.1},
        "train": {
            "images": images, "batch_size": batch, "log_every": images // 2, "validate_every": images,
            "sample_every": images, "checkpoint_every": images // 2,
        },
    }  # fmt: skip
    if raw["task"] == "diffusion":
        raw |= {"vae": {"pretrained": str(made / "vae")}, "text": {"pretrained": str(made / "clip")}}
        raw |= {"sample": {"num_inference_steps": 6, "prompts": ["a red apple", "zebra"]}}
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    return parse(raw, name)


def told(config: Config) -> dict[str, float]:
    """Seconds and bytes, as ``ldm check`` tells them."""
    (found,) = report([config], console=Console(quiet=True))
    assert found is not None
    return {"seconds": sum(found.spent.values()), "bytes": found.memory}


def seen(config: Config) -> dict[str, float]:
    """Seconds and bytes of the run."""
    measure.reset_peak(torch.device("cpu"))
    began = time.perf_counter()
    train_all([config])
    return {"seconds": time.perf_counter() - began, "bytes": measure.peak(torch.device("cpu"))}


def apart(work: Callable[[Config], dict[str, float]], config: Config) -> dict[str, float]:
    """In a process of its own, which starts from what this one has; ``before``: bytes that it starts with."""

    def run(pipe: Any) -> None:
        torch.set_num_threads(1)
        measure.reset_peak(torch.device("cpu"))
        before = measure.peak(torch.device("cpu"))
        pipe.send({**work(config), "before": before})

    child, pipe = forked(run)
    try:
        return pipe.recv()
    finally:
        child.join()
