"""What every sampler is made of.

A sampler is ``sampler(denoise, path, x, times, *, generator=None, callback=None, **options) -> x at times[-1]``:
``denoise(x_t, t) -> Denoised`` gets t as a float64 scalar on the CPU, where the times and all coefficients live, so
that the loop never waits for the device. ``callback(i, t, x, denoised)`` sees each new x and may return another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..denoiser import Denoised
from ..paths import Path
from .grids import check_times

Denoise = Callable[[Tensor, Tensor], Denoised]
Callback = Callable[[int, Tensor, Tensor, Denoised], Tensor | None]
Generators = torch.Generator | Sequence[torch.Generator] | None


def start(path: Path, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor, list[float], list[float]]:
    """x in float32 at least, the checked grid, and alpha and sigma at its times."""
    times = check_times(times)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x, times, path.alpha(times).tolist(), path.sigma(times).tolist()


def seen(callback: Callback | None, i: int, t: Tensor, x: Tensor, denoised: Denoised) -> Tensor:
    """x, or what the callback gives for it."""
    changed = None if callback is None else callback(i, t, x, denoised)
    return x if changed is None else changed


def noise_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal, drawn on the generator's device.

    Raises:
        ValueError: several generators, but not one for each row.
    """
    if generator is None:
        return torch.randn_like(x)
    if isinstance(generator, torch.Generator):
        drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device)
        # Drawn on the host, it goes without waiting for the device, which has the step before to do still.
        return drawn.to(x.device, non_blocking=drawn.device.type == "cpu")
    if len(generator) != x.shape[0]:
        raise ValueError(f"{len(generator)} generators for {x.shape[0]} rows; expected one for all or one for each")
    return torch.cat([noise_like(row, g) for row, g in zip(x.split(1), generator, strict=True)])
