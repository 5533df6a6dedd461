"""What is computed once and kept: latents and text embeddings."""

from __future__ import annotations

from typing import Literal

from .base import Section


class Cache(Section):
    """Latents and text embeddings, computed once and read from disk at each step."""

    dir: str | None = None  # RUN/cache if not given; runs may share one, and what equal encoders made in it
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"  # on disk; the two halves take half the room
    latents: bool = True  # false: pictures go through the autoencoder at each step
    text: bool = True  # false: captions go through the text encoder at each step
    prune: bool = False  # drop what this run does not use; else it stays. Not while another run reads the folder
