"""The optimizer, its schedule and the moving average."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import AboveZero, Section, Share


class Optimizer(Section):
    """Fused AdamW (Loshchilov & Hutter 2019) with the usual schedules."""

    learning_rate: AboveZero = 1e-4
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: AboveZero = 1e-8
    adam_weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: AboveZero = 1.0
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    lr_warmup_images: Annotated[int, Field(ge=0)] = 0
