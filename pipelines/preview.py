"""What latents look like, without decoding them: one 3 × C matrix, fitted to the autoencoder.

Neighbouring latents share a picture's colour nearly linearly, so a linear map of each latent to the mean colour of the
pixels that it stands for is a fair thumbnail at none of the decoder's cost. Known matrices ("latent RGB factors") hold
for one autoencoder; here they are found by least squares, for any.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.vae import VAE

SIDE, ROWS = 8, 8  # latents a side, and pictures: 768 equations for the C + 1 unknowns of a colour


@dataclass(frozen=True)
class LinearPreview:
    """rgb = weight · z + bias, in [0, 1], for normalized latents z.

    Args:
        weight: (3, C). bias: (3,).
        r2: share of the colours' variance that the map explains, on pictures that it was not fitted to.
    """

    weight: Tensor
    bias: Tensor
    r2: float

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h, w) in [0, 1]."""
        weight, bias = self.weight.to(latents), self.bias.to(latents)
        return (torch.einsum("dc,bchw->bdhw", weight, latents) + bias[:, None, None]).clamp(0, 1)


@torch.no_grad()
def fit_preview(vae: VAE, seed: int = 0) -> LinearPreview:
    """Least squares over what the autoencoder itself makes of latents: of colour gradients, and of smooth noise.

    Deterministic: the same autoencoder gives the same map.
    """
    if vae.dtype == torch.float16:  # in which some autoencoders overflow
        vae = copy.deepcopy(vae).float()
    generator = torch.Generator().manual_seed(seed)
    fitted, kept_out = _pairs(vae, generator, noise=True), _pairs(vae, generator, noise=False)
    solution = torch.linalg.lstsq(*fitted, driver="gelsd").solution  # (C + 1, 3); a channel may be constant
    z, rgb = kept_out
    residual, spread = (rgb - z @ solution).square().sum(), (rgb - rgb.mean(0)).square().sum()
    r2 = 1 - float(residual / spread.clamp(min=1e-12))
    return LinearPreview(solution[:-1].T.contiguous().float(), solution[-1].float(), r2)


def _pairs(vae: VAE, generator: torch.Generator, noise: bool) -> tuple[Tensor, Tensor]:
    """Latents with a one beside them (N, C + 1), and the mean colours of what they decode to (N, 3)."""
    factor, dtype = vae.factor, vae.dtype
    pictures = gradients(ROWS, SIDE * factor, generator).to(vae.device, dtype)
    z = vae.latent_scale.normalize(vae.encode(pictures * 2 - 1).mean)  # (B, C, h, w)
    if noise:
        z = torch.cat([z, _smooth((ROWS // 2, z.shape[1], SIDE, SIDE), generator).to(z)])
    rgb = torch.cat([_colours(vae, row) for row in z.split(4)])  # (B, 3, h, w)
    z, rgb = (x.permute(0, 2, 3, 1).flatten(0, 2).double().cpu() for x in (z, rgb))
    return torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1), rgb


def _colours(vae: VAE, z: Tensor) -> Tensor:
    """Normalized latents (B, C, h, w) -> mean colour (B, 3, h, w) of each one's pixels, not cut to [0, 1]."""
    pictures = vae.decode(vae.latent_scale.denormalize(z)) / 2 + 0.5
    return F.avg_pool2d(pictures.float(), vae.factor)


def gradients(rows: int, side: int, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, side, side) in [0, 1] of a few random colours: half of them run into one another."""
    corners = torch.rand(rows, 3, 4, 4, generator=generator)
    soft = F.interpolate(corners[: rows // 2], size=(side, side), mode="bilinear", align_corners=True)
    hard = F.interpolate(corners[rows // 2 :], size=(side, side), mode="nearest")
    return torch.cat([soft, hard])


def _smooth(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise (B, C, h, w) of about unit variance that changes slowly, as latents of pictures do."""
    coarse = torch.randn(*shape[:2], 5, 5, generator=generator)
    return 1.3 * F.interpolate(coarse, size=shape[2:], mode="bilinear", align_corners=True)
