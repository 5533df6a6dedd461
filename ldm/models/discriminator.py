"""The autoencoder's critic: real or reconstructed, judged patch by patch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """One logit for each overlapping patch of a picture, high where it looks real (Isola et al. 2017, §3.2.2, in
    the form of Esser et al. 2021, VQGAN). Three layers see patches of 70 pixels.

    Args:
        in_channels: of the picture.
        channels: width of the first layer (``ndf``); it doubles with each further one, up to eight times.
        layers: convolutions that halve the resolution (``n_layers``).
        norm: ``group`` or ``none``. Both judge each picture by itself; batch statistics of a few pictures would
            let the critic tell real from made by the batch that it stands in.
    Raises:
        ValueError: unknown norm, no layer.
    """

    def __init__(
        self, in_channels: int = 3, channels: int = 64, layers: int = 3, norm: Literal["group", "none"] = "group"
    ):
        super().__init__()
        if norm not in ("group", "none"):
            raise ValueError(f"critic norm={norm!r}: expected 'group' or 'none'")
        if layers < 1 or channels < 1:
            raise ValueError(f"critic with {layers} layers of {channels} channels: expected at least 1 of each")
        self.layers = layers
        widths = [in_channels, *(channels * min(2**i, 8) for i in range(layers + 1))]
        body: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            normed = norm == "group" and i > 0
            # Where a norm follows, its shift is the bias.
            body.append(nn.Conv2d(c_in, c_out, 4, stride=2 if i < layers else 1, padding=1, bias=not normed))
            if normed:
                body.append(nn.GroupNorm(math.gcd(8, c_out), c_out))
            body.append(nn.LeakyReLU(0.2, inplace=True))
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from N(0, 0.02²), biases 0, norms 1 and 0 (Radford et al. 2016)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def smallest(self) -> int:
        """The least side of a picture, in pixels, that leaves one logit."""
        return 3 * 2**self.layers

    def forward(self, x: Tensor) -> Tensor:
        """Picture (B, in_channels, H, W) in [-1, 1] -> logits (B, 1, h, w), h = H / 2^layers - 2 where that divides.

        Raises:
            ValueError: a side is shorter than ``smallest``.
        """
        if min(x.shape[-2:]) < self.smallest:
            raise ValueError(
                f"critic with {self.layers} layers: a picture of {x.shape[-2]} by {x.shape[-1]} pixels is smaller than "
                f"{self.smallest} by {self.smallest}; use larger crops or fewer layers"
            )
        return self.body(x)
