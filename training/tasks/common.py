"""What the tasks share: players from configs, and where the parts that a run builds on lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from torch import Tensor, nn

from ldm.models.base import Network

from ..ema import EMA
from ..loop import Batch, Player
from ..optim import GuardedAdamW
from ..schema import Optimizer, Run, Train

Net = TypeVar("Net", bound=Network)
Loss = Callable[[Batch, int], tuple[Tensor, dict[str, Tensor]]]


def player(
    name: str,
    module: nn.Module,
    loss: Loss,
    config: Run,
    accelerator: Accelerator,
    *,
    optimizer: Optimizer | None = None,
    ema_decay: float | None = None,
    start: int = 0,
) -> Player:
    """The module prepared for the devices, with an optimizer whose schedule ends with the run."""
    optimizer = optimizer or config.optimizer
    per_step = config.train.batch_size * config.train.gradient_accumulation_steps * accelerator.num_processes
    steps = math.ceil(max(config.train.images - start, 1) / per_step)
    prepared = accelerator.prepare(module)
    adamw = GuardedAdamW(module.parameters(), optimizer, steps, math.ceil(optimizer.lr_warmup_images / per_step))
    ema = EMA(module.parameters(), config.ema_decay if ema_decay is None else ema_decay)
    return Player(name, prepared, loss, adamw, ema, start)


def made(name: str) -> str:
    """The folder to open for a ``pretrained``: what a run exported, a plain folder, or a hub name as it is."""
    exported = Path(name) / "pipeline"
    return str(exported) if exported.is_dir() else name


def tuned(net: Net, how: Train) -> Net:
    """The network with the kernels and the memory that the config asks for.

    Raises:
        ValueError, RuntimeError: the attention backend cannot be had here, and why.
    """
    net.set_attention_backend(how.attention_backend)
    if how.gradient_checkpointing:
        net.enable_gradient_checkpointing(how.gradient_checkpointing)
    return net
