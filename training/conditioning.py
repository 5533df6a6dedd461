"""What a denoiser is shown beside the latents while it trains: masks and masked pictures, small pictures, hints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm import rng
from ldm.latents import LatentScale
from ldm.models.base import Network
from ldm.models.grow import grow_input, grow_labels, latent_channels
from ldm.models.unet import UNet
from ldm.models.vae import Moments
from pipelines.conditions import NOISE_LEVELS, draw, inpainting, masked, noised, small
from pipelines.core import Parts
from pipelines.kinds import extra_channels, kind_of
from pipelines.stock import FORMS

from .batches import Stream
from .fit import ConfigError
from .hints import Hints
from .loop import Batch
from .random_masks import random_masks
from .schema import AdaptConfig
from .schema.adapt import Conditioning, Hint, Inpaint, LowResolution
from .sources import Split

if TYPE_CHECKING:
    from .base import Base

Encode = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) in [-1, 1] -> raw moments (B, 2C, h, w)


class Conditioner:
    """Makes ``Cond.extra`` and ``Cond.class_labels`` of a batch, by each image's own random numbers.

    Args:
        section: the config's ``conditioning``.
        net: which is shown it, ``grown``.
        seed: of the run.
        factor: pixels per latent.
        scale: of the latents.
        caption_dropout: the config's; of the same images as captions are dropped from, half are shown no hint.

    Attributes:
        needs: keys that a batch must have, besides ``index``: as ``LatentBatches`` gives them with ``batches``.
    """

    def __init__(
        self,
        section: Conditioning,
        net: Network,
        seed: int,
        factor: int,
        scale: LatentScale,
        caption_dropout: float = 0.0,
    ):
        self.section, self.seed, self.factor, self.scale = section, seed, factor, scale
        self.caption_dropout = caption_dropout
        self.labels = net.config.get("num_class_embeds") is not None  # of the noise's level
        self._hints: dict[int, Hints] = {}
        self.needs: tuple[str, ...] = ("hint",) if isinstance(section, Hint) else ("pictures",)
        if isinstance(section, Inpaint) and section.masks == "given":
            self.needs += ("pixel_mask",)

    @property
    def kind(self) -> str:
        return self.section.name

    @property
    def needs_pictures(self) -> bool:
        """At each step: latents alone, from the cache, do not do."""
        return "pictures" in self.needs

    def batches(self, rows: Any, split: Split = "train") -> dict[str, Any]:
        """Arguments of ``LatentBatches`` by which its batches of these rows have what is needed.

        Raises:
            DataError: a row has no second picture, or one of another shape.
        """
        told: dict[str, Any] = {"pictures": self.needs_pictures, "pixel_masks": "pixel_mask" in self.needs}
        if isinstance(self.section, Hint):
            known = self._hints.get(id(rows))  # looked through once
            told["hints"] = known or Hints(rows, rows.data.hint_column, rows.data.hint_suffix, split=split)
            self._hints[id(rows)] = told["hints"]
        return told

    @torch.no_grad()
    def extra(self, batch: Batch, encode: Encode, *, train: bool = True) -> Tensor:
        """(B, C', h, w) in float32.

        Args:
            batch: with ``index`` (B,), and what ``needs`` names: ``pictures`` and ``hint`` (B, 3, H, W) in [-1, 1],
                ``pixel_mask`` (B, 1, H, W) in [0, 1].
            encode: the autoencoder's raw moments, (B, 2C, h, w).
            train: False shows every hint, where in training some are dropped.
        """
        section, index = self.section, batch["index"]
        if isinstance(section, Hint):
            latents = encode(batch["hint"]).float().chunk(2, dim=1)[0]  # raw and without noise, as stock's
            return latents.masked_fill(self._hidden(index)[:, None, None, None], 0) if train else latents
        pictures = batch["pictures"]
        if isinstance(section, LowResolution):
            low = small(pictures.float(), self.factor)
            return noised(low, self._levels(index), rng.normal(self.seed, index, low.shape[1:], Stream.SHOWN))
        mask = self.mask(batch)
        mean, log_var = encode(masked(pictures, mask)).float().chunk(2, dim=1)
        eps = rng.normal(self.seed, index, mean.shape[1:], Stream.SHOWN)
        return inpainting(mask, Moments(mean, log_var), eps, self.scale)

    def class_labels(self, batch: Batch) -> Tensor | None:
        """(B,) the level of the noise in ``extra``, where the network is told it."""
        return self._levels(batch["index"]) if self.labels and self.kind == "low_resolution" else None

    def mask(self, batch: Batch) -> Tensor:
        """(B, 1, H, W), 1 where it is to be painted anew: the rows' own masks, cut at 0.5, or random ones."""
        if not isinstance(self.section, Inpaint):
            raise ValueError(f"conditioning {self.kind} has no mask")
        if self.section.masks == "given":
            return (batch["pixel_mask"] >= 0.5).float()
        height, width = batch["pictures"].shape[-2:]
        return random_masks(self.seed, batch["index"], (height, width), self.section.whole)

    def draw(self, parts: Parts, prompts: Sequence[str], batch: Batch, *, noise_level: int = 20, **kw: Any) -> Tensor:
        """``conditions.draw`` of what the network is shown of a (held-out) batch, as the stock pipeline draws it."""
        told = batch["hint" if isinstance(self.section, Hint) else "pictures"]
        mask = self.mask(batch) if isinstance(self.section, Inpaint) else None
        told = small(told, self.factor) if isinstance(self.section, LowResolution) else told
        return draw(parts, prompts, told, mask, noise_level=noise_level, **kw)

    def _levels(self, index: Tensor) -> Tensor:
        assert isinstance(self.section, LowResolution)
        u = rng.uniform(self.seed, index, (), Stream.LEVEL)
        return (u.double() * (self.section.max_noise_level + 1)).long()  # float32 would round up to the end

    def _hidden(self, index: Tensor) -> Tensor:
        """(B,) which images are shown no hint. By the number that decides over the caption: below half of its dropout
        the caption alone is dropped, up to the whole both, from there the hint alone (Brooks et al. 2023, section
        3.2.1: 5% each, with both dropouts at 10%)."""
        assert isinstance(self.section, Hint)
        u = rng.uniform(self.seed, index, (), Stream.CAPTION)
        first = self.caption_dropout / 2
        return (u >= first) & (u < first + self.section.dropout)


def grown(section: Conditioning, net: Network) -> Network:
    """The network with an input for what it is shown and, where that is noisy, a UNet with labels for the level: at
    first the function that it was. One that has them is left as it is.

    Raises:
        ValueError: it was made for another conditioning.
    """
    latents = latent_channels(net)
    grow_input(net, latents + extra_channels(section.name, latents))
    if isinstance(section, LowResolution) and isinstance(net, UNet):
        grow_labels(net, NOISE_LEVELS)
    return net


def check_conditioning(config: AdaptConfig, base: Base) -> None:
    """Raises ConfigError where the base, or what it would become, and the config's ``conditioning`` do not agree."""
    try:
        with torch.device("meta"):
            there = kind_of(base.blank())
    except ValueError as error:
        raise ConfigError(f"base: {base.folder}: {error}") from error
    section = config.conditioning
    if section is None:
        if there is not None:
            raise ConfigError(
                f"conditioning is missing: the base {base.folder} takes {base.net['in_channels']} channels; give "
                f"conditioning: {{name: {there}}}"
            )
        return
    kind = section.name
    if there not in (None, kind):
        raise ConfigError(f"conditioning {kind}: the base {base.folder} was made for {there}")
    kinds = [name for name, form in FORMS.items() if form.kind == kind]
    if not any(FORMS[name].family == base.family for name in kinds):
        raise ConfigError(f"conditioning {kind}: the base's family is {base.family}; what there is: {', '.join(kinds)}")
    usual = 16 if base.family == "sd3" else 4
    if kind == "inpaint" and base.channels != usual:
        raise ConfigError(f"conditioning inpaint: needs {usual} latent channels, the base has {base.channels}")
    given = isinstance(section, Inpaint) and section.masks == "given"
    if given and not config.data.mask_suffix and not all(place.mask_column for place in config.data.places):
        raise ConfigError("conditioning.masks given: set data.mask_column or data.mask_suffix, where the masks are")
    if isinstance(section, Hint) and not (config.data.hint_column or config.data.hint_suffix):
        raise ConfigError("conditioning image: set data.hint_column or data.hint_suffix, where the second pictures are")
    if config.data.streaming and (given or isinstance(section, Hint)):
        what = "given masks" if given else "second pictures"
        raise ConfigError(f"conditioning {kind}: {what} cannot be streamed; leave data.streaming out")
