"""What a model says of held-out pictures by itself, without drawing: its loss at each level of noise, and its bits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ldm import rng
from pipelines.core import Parts, with_sizes
from pipelines.kinds import check_shown
from pipelines.likelihood import PictureBits, decoder_std, picture_bits

from ..batches import Stream, to_unit
from ..data import Rows
from ..schema.tasks import Validation
from ..tasks.diffusion import FIXED
from .measures_data import Progress

PROBED, LEVELS = Validation().rows, Validation().levels  # a run's, unless its config says otherwise
AT_ONCE = 16  # pictures whose bits are counted in one batch


def levels() -> list[float]:
    """The times t at which the loss is looked at."""
    return [(level + 0.5) / LEVELS for level in range(LEVELS)]


@torch.no_grad()
def held_out_losses(parts: Parts, rows: Rows, seed: int, batch_size: int, progress: Progress) -> Tensor:
    """The loss of the first ``PROBED`` rows at ``LEVELS`` times, (R, LEVELS): the very (row, t, noise) that a run of
    this seed validates at, so that its log's ``held_out_loss_at_…`` are the means.

    Raises:
        ValueError: a network that is shown more than text.
    """
    denoiser, device = parts.denoiser(), parts.net.device
    count, found = min(len(rows), PROBED), []
    for first in range(0, count, batch_size):
        some = list(range(first, min(first + batch_size, count)))
        pictures = to_unit(rows.pictures(some)).to(device, parts.vae.dtype)
        moments = parts.vae.encode(pictures)
        cond = parts.text.encode([rows.captions[i] for i in some])
        check_shown(parts.net, parts.channels, cond)
        height, width = pictures.shape[-2:]
        cond = with_sizes(parts.net, cond, height, width)
        if cond.size_ids is not None and cond.size_ids.shape[1] == 6:  # SDXL's own, of each picture and its crop
            cond = replace(cond, size_ids=rows.size_ids(some).to(device))
        cond = cond.to(device, parts.net.dtype)
        losses = []
        for level, t in enumerate(levels()):
            index = torch.tensor([FIXED + i * LEVELS + level for i in some], device=device)
            shape = moments.mean.shape[1:]
            drawn = rng.normal(seed, index, shape, Stream.POSTERIOR)
            z = moments.mean.float() + torch.exp(0.5 * moments.log_var.float()) * drawn
            eps = rng.normal(seed, index, shape, Stream.NOISE)
            at = torch.full((len(some),), t, device=device)
            losses.append(denoiser.loss(parts.vae.latent_scale.normalize(z), at, cond, eps=eps).float().cpu())
        found.append(torch.stack(losses, 1))
        progress("held-out loss", some[-1] + 1, count)
    return torch.cat(found)


def bits(parts: Parts, rows: Rows, train: Rows, count: int, seed: int, progress: Progress) -> PictureBits:
    """Upper bound of the bits per value of the first ``count`` rows' pictures, told their captions, each (B,). How far
    pictures lie from what the decoder draws is measured on the first ``PROBED`` training pictures."""

    def pictures(of: Rows, some: range) -> Tensor:
        return of.pictures(list(some)).float() / 255

    generator = torch.Generator().manual_seed(seed)
    std = decoder_std(parts, pictures(train, range(min(len(train), PROBED))), generator)
    found = []
    for first in range(0, min(len(rows), count), AT_ONCE):
        some = range(first, min(first + AT_ONCE, len(rows), count))
        told = [rows.captions[i] for i in some]
        found.append(picture_bits(parts, pictures(rows, some), told, decoder_std=std, generator=generator))
        progress("bits per dimension", some[-1] + 1, min(len(rows), count))
    return PictureBits(*(torch.cat(each).cpu() for each in zip(*found, strict=True)))
