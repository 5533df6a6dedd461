"""Tiny stock pipelines as folders, and runs that start from them."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from pipelines.core import generate
from tests import families, killed
from training.config import parse
from training.run import train_all
from training.schema import AdaptConfig

CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}


@cache
def stock(family: str) -> DiffusionPipeline:
    return families.quiet(families.PIPELINES[family]())


def base(family: str, root: Path) -> Path:
    """A folder of it, written once, with pictures beside it."""
    folder = root / family.replace(" ", "_")
    if not folder.exists():
        stock(family).save_pretrained(folder)
    if not (root / "data").exists():
        killed.draw(root / "data")
    return folder


def config(family: str, root: Path, run: str, **sections: Any) -> AdaptConfig:
    """Three steps of two pictures; ``train.images`` and all else can be given."""
    train = {
        "images": 6, "batch_size": 2, "mixed_precision": "no", "report_to": "none", "validate_every": 10**6,
        "sample_every": 10**6, "log_every": 2,
    }  # fmt: skip
    given: dict[str, Any] = {
        "task": "adapt", "base": str(base(family, root)), "output_dir": str(root / run),
        "data": {"path": str(root / "data"), "resolution": 16},
        "optimizer": {"learning_rate": 1e-2},
        "sample": {"prompts": ["a red box", "blue box"], **CALL},
    }  # fmt: skip
    for key, value in sections.items():
        merged = isinstance(value, dict) and isinstance(given.get(key), dict)
        given[key] = {**given[key], **value} if merged else value
    parsed = parse({**given, "train": {**train, **sections.get("train", {})}}, "run.yaml")
    assert isinstance(parsed, AdaptConfig)
    return parsed


def trained(family: str, root: Path, run: str, **sections: Any) -> Path:
    """The folder of a run that has ended."""
    logging.getLogger("training").setLevel(logging.WARNING)
    made = config(family, root, run, **sections)
    train_all([made])
    return Path(made.output_dir)


def drawn(pipe: Any, prompts: list[str], **call: Any) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1], as the trainer's own are drawn: a generator for each."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, generator=generators, output_type="pt", **CALL, **call).images


def spied(monkeypatch: Any) -> dict[str, Any]:
    """What the trainer's own grid is drawn as: ``prompts`` and ``pictures``; a fixture."""
    kept: dict[str, Any] = {}

    def spy(parts: Any, prompts: list[str], **kw: Any) -> torch.Tensor:
        kept["prompts"], kept["pictures"] = prompts, generate(parts, prompts, **kw)
        return kept["pictures"]

    monkeypatch.setattr("training.tasks.diffusion.generate", spy)
    return kept
