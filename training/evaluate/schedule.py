"""A path as a picture: its curves, and what it makes of a picture on the way to noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from torch import Tensor

import ldm.paths
from ldm.paths import DiscreteVP
from ldm.process import diffusion

SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)


def draw_path(path: ldm.paths.Path, picture: Tensor, file: Path, *, seed: int = 0) -> Path:
    """Write alpha and sigma, log-SNR and the rate of noise over t, and below them the picture at t = 0, 1/4, … 1.

    Args:
        picture: (3, H, W) in [-1, 1]. Shown divided by hypot(alpha, sigma), so that it keeps its contrast where
            variance is not preserved.
        file: a picture file of any kind that matplotlib writes.
    Raises:
        ValueError: the file's name ends otherwise.
    """
    if file.suffix[1:].lower() not in FigureCanvasBase.filetypes:
        raise ValueError(f"{file}: expected the name of a picture file, for example {file.with_suffix('.png')}")
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    inner = t[1:-1]  # where alpha and sigma are not 0
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(3, 2.4))
    curves, strip = halves
    left, middle, right = curves.subplots(1, 3)
    left.plot(t, path.alpha(t), label="alpha")
    left.plot(t, path.sigma(t), label="sigma")
    left.set_title("x_t = alpha x0 + sigma eps")
    left.legend()
    middle.plot(inner, path.log_snr(inner))
    middle.axhline(0, color="0.8", zorder=0)
    middle.set_title("log SNR = log(alpha² / sigma²)")
    if isinstance(path, DiscreteVP):
        right.plot((torch.arange(path.num_train_timesteps) + 1) / path.num_train_timesteps, path.betas)
        right.set_title("beta of each step")
    else:
        right.semilogy(inner, diffusion(path.coeffs(inner, 1)))
        right.set_title("g²: beta, or d sigma² / dt")
    for axes in (left, middle, right):
        axes.set_xlabel("t")
    eps = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    for axes, moment in zip(strip.subplots(1, len(SHOWN)), SHOWN, strict=True):
        at = torch.tensor(moment, dtype=torch.float64)
        x = path.mix(picture[None], eps[None], at)[0] / math.hypot(path.alpha(at).item(), path.sigma(at).item())
        axes.imshow((x.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0))
        axes.set_axis_off()
        step = f"step {round(moment * path.num_train_timesteps)}, " if isinstance(path, DiscreteVP) else ""
        axes.set_title(f"{step}t = {moment:g}", fontsize=10)
    figure.suptitle(repr(path))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    return file


def chart(size: int = 128) -> Tensor:
    """Something with edges, a ramp and three colours to look at, (3, size, size) in [-1, 1]."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    drawn = torch.stack([0.8 - 0.3 * y, 0.85 - 0.2 * y, torch.full_like(x, 0.95)])
    for radius, centre, colour in ((0.55, (0.25, 0.2), (0.8, -0.5, -0.6)), (0.35, (-0.4, -0.35), (-0.7, 0.3, 0.7))):
        inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        drawn = torch.where(inside, torch.tensor(colour)[:, None, None], drawn)
    return drawn.clamp(-1, 1)
