"""How long a run is, and how often it does what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Positive, Section, Share


class Train(Section):
    """How long, and how often what. The clock counts images."""

    images: Positive  # how many pictures are seen in all
    batch_size: Positive = 16  # pictures per process and micro-batch
    gradient_accumulation_steps: Positive = 1
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # auto: bf16 where the hardware has units for it
    attention_backend: Literal["auto", "xformers", "flash", "sdpa", "plain"] = "auto"
    gradient_checkpointing: Share = 0.0  # share of the blocks recomputed in the backward pass; true: all
    num_workers: Annotated[int, Field(ge=0)] = 0
    log_every: Positive = 1_000
    validate_every: Positive = 10_000
    sample_every: Positive = 20_000
    checkpoint_every: Positive = 20_000
    keep_last: Positive = 2
    max_skipped_steps: Positive = 20  # this many steps in a row without a finite gradient end the run
