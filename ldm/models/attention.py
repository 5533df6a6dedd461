"""The one place that decides which attention kernel runs."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..extras import pip_install

log = logging.getLogger(__name__)
FLASH_DIM = 256  # the widest head that the flash kernels on CUDA take
HALF = (torch.float16, torch.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ / √d + bias) v (Vaswani et al. 2017, eq. 1).

    Args:
        q: (B, H, N, d).
        k, v: (B, H, M, d).
        bias: (B, M) added to the logits of these keys, the same for every head and query: -inf hides a key,
            log n makes it count as n equal keys (rounded to q's dtype: log 256 counts as 252.5 in bfloat16 and as
            256.4 in float16). Where every key of a row of the batch is hidden, its output and gradients are zero.
            It bears no gradient itself.
        backend:
            ``auto``: ``sdpa``; says once per case which of its kernels that will be.
            ``sdpa``: torch's choice of kernel; with a bias on CUDA the memory-efficient one, since flash takes none.
            ``flash``: the flash kernel and nothing else: no bias; on CUDA float16 or bfloat16.
            ``xformers``: xFormers' ``memory_efficient_attention``, on CUDA.
            ``plain``: two products and a softmax.
    Returns:
        (B, H, N, d).
    Raises:
        ValueError: unknown backend, or one that does not take these tensors, and which one does.
        RuntimeError: the backend cannot run on this machine, and why.
    """
    if bias is not None and bias.shape != (q.shape[0], k.shape[2]):
        expected = (q.shape[0], k.shape[2])
        raise ValueError(f"attention bias: shape {tuple(bias.shape)}, expected {expected}: one number per row and key")
    if backend == "auto":
        backend = _auto(q.device.type, q.dtype, bias is not None)
    if backend not in KERNELS:
        raise ValueError(_unknown(backend))
    return KERNELS[backend](q, k, v, bias)


def check_backend(name: str, head_dim: int | None = None, dtype: torch.dtype | None = None) -> None:
    """Refuse a backend that no call can use on this machine, and say why.

    Args:
        head_dim: width of a head; None: any.
        dtype: of q, k and v (under autocast, autocast's); None: any.
    """
    if name not in BACKENDS:
        raise ValueError(_unknown(name))
    if name == "xformers":
        _xformers_op()
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"attention backend 'xformers': its kernels need a CUDA device, none is visible; {OTHER}"
            )
        multiple = 8 if dtype in HALF else 4
        if head_dim is not None and head_dim % multiple:
            raise ValueError(
                f"attention backend 'xformers': heads {head_dim} wide, it takes multiples of 8 (4 in float32)"
            )
    if name == "flash" and torch.cuda.is_available():
        if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            raise RuntimeError(
                f"attention backend 'flash': needs compute capability 8.0 (Ampere), {torch.cuda.get_device_name()} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability()))}; {OTHER}"
            )
        if head_dim is not None and head_dim > FLASH_DIM:
            raise ValueError(f"attention backend 'flash': heads {head_dim} wide, it takes {FLASH_DIM} at most; {OTHER}")
        if dtype is not None and dtype not in HALF:
            raise ValueError(_not_half(dtype))


OTHER = "take 'auto' or 'sdpa'"
_said: set[tuple] = set()


@torch.compiler.assume_constant_result  # torch.compile calls it while tracing: the choice is logged there too
def _auto(device: str, dtype: torch.dtype, biased: bool) -> str:
    """What ``auto`` takes; logged the first time that this is asked."""
    if device != "meta" and (device, dtype, biased) not in _said:  # on meta nothing is computed, only counted
        _said.add((device, dtype, biased))
        name = str(dtype).removeprefix("torch.")
        why = "torch's SDPA"
        if device == "cuda" and biased:
            why = "SDPA's memory-efficient kernel: flash takes no bias (padded or folded text)"
        elif device == "cuda":
            why = "SDPA, with a flash kernel" if dtype in HALF else f"SDPA: the flash kernels take no {name}"
        log.debug("attention on %s, %s, %s bias: auto takes %s", device, name, "with" if biased else "no", why)
    return "sdpa"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v)
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, bias[:, None, None, :].to(q.dtype))
    # Not cuDNN's kernel, which torch 2.11 to 2.13 prefers on Hopper: with a mask its gradients can be NaN
    # (pytorch#196678).
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, _aligned(bias, q.dtype))


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, N, M); q scaled: smaller, and no overflow in half
    if bias is not None:
        bias, v = _without_empty_rows(bias, v)
        logits = logits + bias[:, None, None, :].to(q.dtype)
    return logits.softmax(-1) @ v


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        raise ValueError(
            "attention backend 'flash' takes no bias (padded or folded text); take 'auto', which uses SDPA's "
            "memory-efficient kernel then, or 'xformers'"
        )
    if q.device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"attention backend 'flash': tensors on {q.device.type}, it takes CUDA's and the CPU's; {OTHER}"
        )
    if q.device.type == "cuda" and q.dtype not in HALF:
        raise ValueError(_not_half(q.dtype))
    if q.device.type == "cuda" and q.shape[-1] > FLASH_DIM:
        raise ValueError(f"attention backend 'flash': heads {q.shape[-1]} wide, it takes {FLASH_DIM} at most; {OTHER}")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _not_half(dtype: torch.dtype) -> str:
    return f"attention backend 'flash' takes float16 and bfloat16 on CUDA, not {dtype}; {OTHER}"


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    memory_efficient_attention = _xformers_op()
    if bias is not None:
        bias, v = _without_empty_rows(bias, v)
        bias = _aligned(bias, q.dtype).expand(-1, q.shape[1], q.shape[2], -1)  # (B, H, N, M), which it insists on
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, H, d), views: only the last stride has to be 1
    try:
        return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)
    except (NotImplementedError, ValueError) as error:
        what = f"q {tuple(q.shape)} (batch, tokens, heads, width), {q.dtype}, {q.device}"
        raise ValueError(
            f"attention backend 'xformers' does not take {what}; {OTHER}. xFormers says: {error}"
        ) from error


def _xformers_op():
    try:
        from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]
    except ImportError as error:  # also where the package is there, but not the one that holds its kernels
        raise RuntimeError(
            f"attention backend 'xformers' cannot be imported ({error}): {pip_install('xformers')}; or {OTHER}"
        ) from error
    return memory_efficient_attention


def _aligned(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, M) -> (B, 1, 1, M), a slice of storage whose rows are multiples of 8 long: the kernels read 16 bytes at a
    time, and SDPA would otherwise copy the whole (B, 1, N, M) to get there."""
    length = bias.shape[-1]
    return F.pad(bias.to(dtype), (0, -length % 8))[:, None, None, :length]


def _without_empty_rows(bias: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose keys are all hidden get zero values instead of a softmax over nothing, which is NaN."""
    empty = bias.amax(-1) == -torch.inf  # (B,)
    return bias.masked_fill(empty[:, None], 0.0), v.masked_fill(empty[:, None, None, None], 0.0)


def _unknown(name: str) -> str:
    return f"attention backend {name!r} is not one of {', '.join(BACKENDS)}"


KERNELS = {"xformers": _xformers, "flash": _flash, "sdpa": _sdpa, "plain": _plain}
BACKENDS = ("auto", *KERNELS)
