"""The one place that decides which attention kernel runs."""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)
SMALL = 256**2  # logits per head
BACKENDS = ("auto", "xformers", "flash", "sdpa", "plain")


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ / √d + bias) v (Vaswani et al. 2017, eq. 1).

    Args:
        q: (B, H, N, d).
        k, v: (B, H, M, d).
        bias: (B, M) added to the logits of these keys, the same for every head and query: -inf hides a key,
            log n makes it count as n equal keys.
        backend: ``auto`` (SDPA, but ``plain`` when training on a CPU with few tokens), ``sdpa``, ``flash``,
            ``xformers`` or ``plain``.
    Returns:
        (B, H, N, d).
    Raises:
        ValueError: unknown backend, or one that cannot do this (flash takes no bias).
        RuntimeError: the backend cannot run here, and why.
    """
    if backend == "auto" and q.device.type == "cpu" and q.requires_grad and q.shape[2] * k.shape[2] <= SMALL:
        backend = "plain"  # SDPA's backward pass on a CPU takes longer than two small products
    if backend in ("auto", "sdpa"):
        return F.scaled_dot_product_attention(q, k, v, _expand(bias, q))
    if backend == "plain":
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, N, M)
        if bias is not None:
            logits = logits + bias[:, None, None, :].to(q.dtype)
        return logits.softmax(-1) @ v
    check_backend(backend)
    if backend == "flash":
        if bias is not None:
            raise ValueError("attention backend 'flash' takes no mask; use 'auto' or 'sdpa' for this model")
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # xformers: (B, N, H, d)
    if bias is not None:
        bias = bias[:, None, None, :].to(q.dtype).expand(-1, q.shape[2], q.shape[1], -1)  # (B, H, N, M)
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


@cache
def check_backend(name: str) -> None:
    """Refuse a backend that is not known or cannot run on this machine, and say why."""
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "xformers":
        try:
            import xformers.ops  # type: ignore[import-not-found]  # noqa: F401
        except ImportError as error:
            raise RuntimeError(f"attention backend 'xformers': the package cannot be imported ({error})") from error
        if not torch.cuda.is_available():
            raise RuntimeError("attention backend 'xformers': its kernels need a CUDA device, none is visible")
    if name == "auto":
        log.info("attention backend: auto takes torch's SDPA, and plain products for few tokens on a CPU")


def _expand(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias[:, None, None, :].to(q.dtype).expand(-1, 1, q.shape[2], -1)
