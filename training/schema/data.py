"""Where pictures and captions come from, and how they are cut."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import Positive, Section


class Data(Section):
    """Where the pictures and captions come from, and how they are cut."""

    path: str  # imagefolder, parquet file or folder, or hub:owner/name
    resolution: Positive = 64  # pixels, both sides
    image_column: str = "image"
    caption_column: str = "text"
    center_crop: bool = True  # False: squeeze to a square
    random_crop: Positive | None = None  # autoencoder: train on random crops of this many pixels
    random_flip: bool = False
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05  # share kept for validation where the source has one split
