"""Guidance: a Denoiser and several Conds in, a function ``denoise(x_t, t) -> Denoised`` out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .cond import Cond
from .denoiser import Denoised, Denoiser

Denoise = Callable[[Tensor, Tensor], Denoised]


def classifier_free(
    denoiser: Denoiser,
    cond: Cond,
    uncond: Cond,
    guidance_scale: float,
    *,
    rescale: float = 0.0,
    one_batch: bool = True,
) -> Denoise:
    """uncond + w (cond - uncond) on the network's output (Ho & Salimans 2022, with their 1 + w as w: diffusers').

    Args:
        guidance_scale: w; at 1 and below the network is asked for ``cond`` alone, as diffusers does.
        rescale: φ in [0, 1] of Lin et al. 2024, section 3.4: how far the guided output is brought back to the
            standard deviation of the conditional one.
        one_batch: both halves in one call of the network; False needs half the memory.
    Raises:
        ValueError: rescale outside [0, 1].
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}; expected a number in [0, 1]")
    if guidance_scale <= 1:
        return lambda x_t, t: denoiser(x_t, t, cond)

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        without, with_ = denoiser(x_t, t, [uncond, cond], one_batch=one_batch)
        output = without.output + guidance_scale * (with_.output - without.output)
        if rescale:
            output = (1 - rescale) * output + rescale * output * (_std(with_.output) / _std(output))
        return denoiser.interpret(x_t, t, output)

    return denoise


def _std(x: Tensor) -> Tensor:
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)  # (B, 1, …, 1)


GUIDANCE: dict[str, Callable[..., Denoise]] = {"classifier_free": classifier_free}
