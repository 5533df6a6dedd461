"""Attention alone, forward and backward, at the sizes that the networks have, with each backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.models.attention import attention

from .rows import Settings
from .timing import check_device, finish, median_ms, peak_mb, rounded

__all__ = ["finish", "rows"]
BACKENDS = ("auto", "flash", "xformers", "plain")


class Shape(NamedTuple):
    about: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    bias: bool = False


SHAPES = {
    "unet-4096": Shape("SD 2's self-attention at 64 x 64", 8, 5, 4096, 4096, 64),
    "unet-1024": Shape("SD 2's self-attention at 32 x 32", 32, 10, 1024, 1024, 64),
    "unet-256": Shape("SD 2's self-attention at 16 x 16", 64, 20, 256, 256, 64),
    "unet-cross-77": Shape("SD 2's cross-attention at 64 x 64", 32, 5, 4096, 77, 64),
    "mmdit-4096+78": Shape("SD 3's joint attention, the last token counted 256 times", 2, 24, 4174, 4174, 64, True),
    "dit-256": Shape("DiT-XL/2's self-attention at 32 x 32 latents", 64, 16, 256, 256, 72),
}


def rows(settings: Settings) -> dict[str, Callable[[], dict[str, Any]]]:
    check_device(settings)
    return {f"attention/{name}": partial(measure, shape, settings) for name, shape in SHAPES.items()}


def measure(shape: Shape, settings: Settings) -> dict[str, Any]:
    """By backend: ms of a forward and a backward pass in bf16, the memory that they take, TFLOP/s, and how far output
    and gradients are from those of ``plain`` in float32 (largest difference over the largest value)."""
    device = torch.device(settings.device)
    if settings.tiny:
        shape = shape._replace(batch=2, queries=shape.queries // 64, keys=max(4, shape.keys // 64))
    torch.manual_seed(0)

    def draw(tokens: int) -> Tensor:  # (B, H, N, d), as the networks have it: heads cut out of the width
        x = torch.randn(shape.batch, tokens, shape.heads, shape.width, device=device)
        return x.to(torch.bfloat16).transpose(1, 2)

    q, k, v = draw(shape.queries), draw(shape.keys), draw(shape.keys)
    bias = None
    if shape.bias:
        bias = torch.zeros(shape.batch, shape.keys, device=device)
        bias[:, -1] = math.log(256)

    exact = passes(q[:1].float(), k[:1].float(), v[:1].float(), None if bias is None else bias[:1], "plain")
    values: dict[str, Any] = {}
    # Two products forward and five backward (one of them computed again), 2 operations each.
    flops = 14 * shape.batch * shape.heads * shape.queries * shape.keys * shape.width
    for backend in BACKENDS:
        step = partial(passes, q, k, v, bias, backend)
        try:
            got = [x[:1].float() for x in step()]
            ms = median_ms(step, device, repeats=3 if settings.tiny else 15)
            values[backend] = {
                "ms": ms,
                "peak_mb": peak_mb(step, device),
                "tflops": flops / ms / 1e9,
                "difference": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True)),
            }
        except (ValueError, RuntimeError) as error:  # refused for this shape, or not on this machine
            values[backend] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return rounded({"shape": shape._asdict(), "backends": values})


def passes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, backend: str) -> list[Tensor]:
    """Output, and the gradients of q, k and v for a gradient of ones."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, bias, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]
