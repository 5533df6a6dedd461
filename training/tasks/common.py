"""What the tasks share: players from configs, and where the parts that a run builds on lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch._dynamo
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.models.base import Network
from ldm.models.unet import UNet
from ldm.models.vae import VAE

from .. import zero
from ..ema import EMA
from ..fit import ConfigError
from ..loop import Batch, Player
from ..optim import Guarded, check_optimizer
from ..processes import prepare
from ..schema import Run, Train
from ..schema.optim import EMA as EMAConfig
from ..schema.optim import AnyOptimizer

Net = TypeVar("Net", bound=Network)
BACKEND = "inductor"  # of torch.compile
Loss = Callable[[Batch, int], tuple[Tensor, dict[str, Tensor]]]


def player(
    name: str,
    module: nn.Module,
    loss: Loss,
    config: Run,
    accelerator: Accelerator,
    *,
    optimizer: AnyOptimizer | None = None,
    ema_decay: float | None = None,
    start: int = 0,
) -> Player:
    """The module prepared for the devices, with an optimizer whose schedule ends with the run, and its averages.

    Args:
        optimizer, ema_decay: other than the config's; with an ``ema_decay`` of its own no snapshots are kept.
        start: images seen before it joins.
    Raises:
        ConfigError: the optimizer's package is missing, or one of its groups matches nothing.
    """
    optimizer = optimizer or config.optimizer
    check_optimizer(optimizer, module)
    end = config.train.images
    per_step = config.train.batch_size * config.train.gradient_accumulation_steps * accelerator.num_processes
    prepared = prepare(accelerator, module)
    fp16 = accelerator.mixed_precision == "fp16"
    if zero.asked():
        batch, length = config.train.batch_size, max(end - start, 1)
        guarded = zero.Zero(accelerator, module, optimizer, length, batch=batch, per_step=per_step, fp16=fp16)
        prepared = guarded.engine
    else:
        guarded = Guarded(module.named_parameters(), optimizer, max(end - start, 1), per_step=per_step, fp16=fp16)
    how = config.ema if ema_decay is None else EMAConfig()
    decay = config.ema_decay if ema_decay is None else ema_decay
    ema = EMA(module.named_parameters(), decay, how, start=start, end=end)
    return Player(name, prepared, loss, guarded, ema, start)


def made(name: str) -> str:
    """The folder to open for a ``pretrained``: what a run exported, a plain folder, or a hub name as it is."""
    exported = Path(name) / "pipeline"
    return str(exported) if exported.is_dir() else name


def tuned(net: Net, how: Train) -> Net:
    """The network with the kernels and the memory that the config asks for.

    Raises:
        ValueError, RuntimeError: the attention backend cannot be had here, and why.
        ConfigError: a network without convolutions in another order of memory.
    """
    if how.channels_last is True:
        if not isinstance(net, UNet | VAE):
            raise ConfigError(f"train.channels_last: {type(net).__name__} has no convolutions to gain by it")
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.set_attention_backend(how.attention_backend)
    if how.gradient_checkpointing:
        net.enable_gradient_checkpointing(how.gradient_checkpointing)
    if how.compile:
        compile_blocks(net)
    return net


def check_attention(net: Network, how: Train, accelerator: Accelerator) -> None:
    """Raises ConfigError where the attention backend does not take the precision of the training step."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    try:
        net.check_attention_backend(how.attention_backend, dtype)
    except ValueError as error:
        raise ConfigError(f"train.attention_backend: {error}") from error


def compile_blocks(net: Network, backend: str | Callable | None = None, dynamic: bool | None = False) -> int:
    """``compile_modules`` of the network's blocks.

    Returns:
        how many blocks there are.
    Raises:
        ConfigError: there are none.
    """
    blocks = net.blocks()
    if not blocks:
        raise ConfigError(f"train.compile: {type(net).__name__} has no blocks that repeat; leave it off")
    compile_modules(blocks, backend, dynamic)
    return len(blocks)


def compile_modules(
    modules: Sequence[nn.Module], backend: str | Callable | None = None, dynamic: bool | None = False
) -> None:
    """Compile each module by itself (regional compilation): those of one class and the same sizes share their code, so
    that it is made once and quickly. Parameters keep their names.

    Only the training step runs it: validation, samples and exports, whose batches have other sizes, run as they are
    (``loop.Player.averaged``).

    Args:
        backend: ``BACKEND`` by default.
        dynamic: torch's: False makes code for each size of a block and each shape of picture, the fastest; None makes
            one for all once a second is seen.
    """
    limits: Any = torch._dynamo.config  # at its 8 versions of a function, torch goes on uncompiled: a UNet has more
    limits.recompile_limit = max(limits.recompile_limit, 16 * len(modules))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 16 * len(modules))
    for module in modules:
        module.compile(backend=backend or BACKEND, dynamic=dynamic)
