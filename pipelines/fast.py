"""Step caching, which draws faster and not the same picture, and how far from the same it is.

    pipe("a red apple", step_cache=3)                            # inner layers at every third step
    pipe("a red apple", step_cache={"every": 3, "depth": 1})     # and one layer more at every step
    print(distance(pipe, {"every": 3}, prompt="a red apple"))    # relative L2 of the latents, PSNR of the pictures

What is exact needs no asking: ``core.sample_latents`` does it (``ldm.reuse``).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.models.base import Network, is_compiled
from ldm.models.unet import UNet
from ldm.reuse import StepCache

if TYPE_CHECKING:
    from .base import LatentPipeline

StepCaching = int | Mapping[str, int] | StepCache


def step_cache_of(net: nn.Module, given: StepCaching | None) -> StepCache | None:
    """What a call's ``step_cache`` means for this network: every n-th step, or the options of ``StepCache``.

    Raises:
        ValueError: an unknown option, a number that is out of bounds for the network, or a network that torch.compile
            runs, in which nothing can be kept.
    """
    if given is None:
        return None
    known = [*StepCache.__dataclass_fields__]
    if not isinstance(given, int | Mapping | StepCache):
        raise ValueError(f"step_cache is {given!r}, expected every how many steps, or a dict of {', '.join(known)}")
    if isinstance(given, int):
        given = {"every": given}
    options = asdict(given) if isinstance(given, StepCache) else dict(given)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"step_cache has no option {key!r}; it takes {near[0] if near else ', '.join(known)}")
    cache = StepCache(**options)
    if is_compiled(net) or not isinstance(net, Network):
        raise ValueError("step_cache: torch.compile runs this network, and what it traces keeps nothing; compile its "
                         "blocks one by one instead")  # fmt: skip
    if cache.depth > (most := deepest(net)):
        raise ValueError(f"step_cache: depth is {cache.depth}; this {type(net).__name__} takes {most} at most")
    return cache


def deepest(net: Network) -> int:
    """The largest depth of a step cache in this network, at which it spares one layer."""
    if isinstance(net, UNet):
        levels: Any = net.down_blocks
        return sum(len(level.resnets) + len(level.downsamplers) for level in levels)
    blocks: Any = net.transformer_blocks
    return len(blocks) - 2


class Distance(NamedTuple):
    """From the exact pictures: |latents - exact| / |exact|, and the peak signal-to-noise ratio in dB; each of a whole
    batch."""

    relative: float
    psnr: float

    def __str__(self) -> str:
        return f"relative L2 of the latents {self.relative:.4f}, PSNR {self.psnr:.1f} dB"


@torch.no_grad()
def distance(pipe: LatentPipeline, step_cache: StepCaching, *, seed: int = 0, **call: Any) -> Distance:
    """Draws twice from the same noise, exactly and with a step cache.

    Args:
        call: of the pipeline, without ``generator`` and ``output_type``.
    """
    from .core import decode

    def drawn(cache: StepCaching | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(**call, generator=generator, output_type="latent", step_cache=cache).images  # type: ignore[operator]

    exact, fast = drawn(None), drawn(step_cache)
    pictures = [decode(pipe.vae, x, pipe.text.family).float() for x in (fast, exact)]
    return apart(fast.float(), exact.float(), *pictures)


def apart(latents: Tensor, exact: Tensor, pictures: Tensor, exact_pictures: Tensor) -> Distance:
    """Of latents (B, C, h, w), and pictures (B, 3, H, W) in [0, 1]."""
    square = float((pictures - exact_pictures).square().mean())
    return Distance(
        float((latents - exact).norm() / exact.norm()), -10 * math.log10(square) if square > 0 else math.inf
    )
