"""Gradients of the mean loss over micro-batches; what does not fit into memory is named, or computed in halves."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .journal import Window
from .loader import Batch
from .schema import Train
from .schema.optim import Adafactor, AdamW8bit

if TYPE_CHECKING:
    from .loop import Player

log = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """A step does not fit; the message names batch and size, and what would fit."""


def gradients(
    player: Player, pieces: list[Batch], images: int, accelerator: Accelerator, config: Train, window: Window
) -> tuple[Tensor, list[Batch]]:
    """Backward passes of the mean loss over all pieces; after a lack of memory in smaller pieces, if asked for.

    Returns:
        the mean loss here, and the pieces as they were computed.
    """
    while True:
        try:
            return _accumulated(player, pieces, images, accelerator, window), pieces
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).splitlines()[0]
        # The frames that hold the step's tensors are gone with the exception.
        _forget(player)
        biggest = max(pieces, key=lambda piece: len(piece["index"]))
        if config.on_out_of_memory == "stop" or len(biggest["index"]) == 1:
            text = f"out of memory at image {images} with {sizes(biggest)} (train.batch_size {config.batch_size})"
            what = _halved if accelerator.num_processes > 1 else _what_fits
            raise OutOfMemory(f"{text}: {said}; {what(player, biggest, images, accelerator, config)}")
        pieces = [half for piece in pieces for half in halves(piece)]
        log.warning("out of memory at image %d with %s: going on in halves of that", images, sizes(biggest))


def _accumulated(
    player: Player, pieces: list[Batch], images: int, accelerator: Accelerator, window: Window | None
) -> Tensor:
    total, mean, said = sum(len(piece["index"]) for piece in pieces), None, []
    for i, piece in enumerate(pieces):
        share = len(piece["index"]) / total
        last = window is not None and i + 1 == len(pieces)
        with nullcontext() if last else accelerator.no_sync(player.module):
            loss, named = player.loss(piece, images)
            player.optimizer.backward(accelerator, loss * share, last)
        mean = loss.detach() * share if mean is None else mean + loss.detach() * share
        said.append(named)
    for named in said if window is not None else ():
        window.add(named)  # type: ignore[union-attr]
    assert mean is not None
    return mean


def _forget(player: Player) -> None:
    for parameter in player.module.parameters():
        parameter.grad = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _what_fits(player: Player, batch: Batch, images: int, accelerator: Accelerator, config: Train) -> str:
    """The end of the message: found out by trying halves of what did not fit."""
    smaller, fits = batch, 0
    while not fits and len(smaller["index"]) > 1:
        smaller = halves(smaller)[0]
        try:
            _accumulated(player, [smaller], images, accelerator, None)
            fits = len(smaller["index"])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        _forget(player)
    if not fits:
        return "not even one fits: lower data.resolution, or set train.gradient_checkpointing: 1"
    steps = config.gradient_accumulation_steps * math.ceil(config.batch_size / fits)
    return (
        f"{fits} at once fit: set train.batch_size: {fits} and train.gradient_accumulation_steps: {steps}, or "
        "train.on_out_of_memory: halve, or train.gradient_checkpointing: 1"
    )


def _halved(_player: Player, _batch: Batch, _images: int, accelerator: Accelerator, config: Train) -> str:
    """The end of the message where several processes train: nothing can be tried, since the others wait in a collective
    of this step (DDP's reduction, FSDP2's and ZeRO's weights, CLIP's batch), which a smaller batch would not match."""
    half = config.batch_size // 2
    if not half:
        return "set train.gradient_checkpointing: 1, or lower data.resolution"
    steps = config.gradient_accumulation_steps * math.ceil(config.batch_size / half)
    return (
        f"try half, train.batch_size: {half} with train.gradient_accumulation_steps: {steps} "
        "(as many images in a step), or set train.gradient_checkpointing: 1"
    )


def parted(batch: Batch, pieces: int) -> list[Batch]:
    """A micro-batch in a power of two of parts."""
    parts = [dict(batch)]
    while len(parts) < pieces:
        parts = [half for part in parts for half in halves(part)]
    return parts


# --- memory ---------------------------------------------------------------------------------------------------------


# What libraries say beside torch's own class of error: CUDA ("CUDA error: out of memory"), HIP,
# MPS, Triton and NCCL ("Cuda failure 2 'out of memory'"), the CPU's allocator, the statuses of
# cuBLAS, cuDNN and cuSOLVER, and what cuDNN says where the workspace of every algorithm is too large.
NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can(no|')t allocate memory|_ALLOC(ATION)?_FAILED|Failed to CUDA [cm]alloc"
    r"|CUDNN_STATUS_NOT_SUPPORTED|[Uu]nable to find (a valid cuDNN algorithm|an engine to execute)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory: by torch's class, or by what the error says."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


@contextmanager
def naming_memory(what: str, remedy: Callable[[], str]) -> Iterator[None]:
    """A lack of memory within this context becomes an ``OutOfMemory``.

    Args:
        what: was being done.
        remedy: end of the message.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {what}: {str(error).splitlines()[0]}; {remedy()}") from error


def smaller_state(player: Player) -> str:
    """The end of the message where the optimizer's step does not fit, which the batch has no part in. The step may have
    changed some of the weights (fused AdamW allocates all of its state before it changes any), so the run must end."""
    config, count = player.optimizer.config, sum(p.numel() for p in player.optimizer.parameters)
    others = {"adamw_8bit": AdamW8bit.state_bytes, "adafactor": Adafactor.state_bytes}
    names = [f"{name} ({size:g})" for name, size in others.items() if size < config.state_bytes]
    changes = [f"set optimizer.name: {' or '.join(names)}"] if names else []
    changes += ["set ema.device: cpu"] if player.ema.average else []
    return (
        f"a smaller batch does not help: {config.name} keeps {config.state_bytes:g} bytes for each of "
        f"the {count:,} weights that train ({config.state_bytes * count / 2**30:.2f} GiB); "
        f"{', '.join([*changes, 'train fewer weights (a LoRA)'])}. Nothing of this step is saved"
    )


def halves(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A micro-batch in two; one picture stays one."""
    n = len(batch["index"])
    cuts = [slice(0, n // 2), slice(n // 2, n)] if n > 1 else [slice(0, n)]
    return [{k: v[cut] for k, v in batch.items()} for cut in cuts]


def sizes(batch: dict[str, Any]) -> str:
    """As people say it: 16 pictures of 3×512×512."""
    for key, name in (("pictures", "pictures"), ("moments", "latents' moments")):
        if key in batch:
            return f"{len(batch[key])} {name} of {'×'.join(map(str, batch[key].shape[1:]))}"
    return f"{len(batch['index'])} images"
