"""Gradients of the mean loss over micro-batches; what does not fit into memory is named, or computed in halves."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .journal import Window
from .loader import Batch
from .schema import Train

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
            raise OutOfMemory(_what_fits(player, biggest, images, accelerator, config, said))
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


def _what_fits(player: Player, batch: Batch, images: int, accelerator: Accelerator, config: Train, said: str) -> str:
    """The message: found out by trying halves of what did not fit."""
    text = f"out of memory at image {images} with {sizes(batch)} (train.batch_size {config.batch_size}): {said}"
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
        return f"{text}; not even one fits: lower data.resolution, or set train.gradient_checkpointing: 1"
    steps = config.gradient_accumulation_steps * math.ceil(config.batch_size / fits)
    return (
        f"{text}; {fits} at once fit: set train.batch_size: {fits} and train.gradient_accumulation_steps: {steps}, or "
        "train.on_out_of_memory: halve, or train.gradient_checkpointing: 1"
    )


def parted(batch: Batch, pieces: int) -> list[Batch]:
    """A micro-batch in a power of two of parts."""
    parts = [dict(batch)]
    while len(parts) < pieces:
        parts = [half for part in parts for half in halves(part)]
    return parts


# --- memory ---------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU's allocator, which has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("not enough memory" in str(error) or "can't allocate memory" in str(error))
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
