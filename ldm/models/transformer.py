"""Text-conditioned transformer blocks over pixels (Rombach et al. 2022, §3.3)."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention

SMALL = 2**21  # multiplications below which a call of oneDNN costs more than it saves


class Linear(nn.Linear):
    """``nn.Linear``, by oneDNN where that is the faster library.

    torch multiplies float32 matrices with MKL, which keeps to its AVX2 kernels on other makers' AVX-512 processors:
    oneDNN, which torch has on board for convolutions, takes half the time there. The weights stay as they are.
    """

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if not _by_onednn(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        y = _OneDNNLinear.apply(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*x.shape[:-1], -1)


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of 3 x 3, made faster for few pixels on a CPU.

    A convolution reorders its weights at every call: three quarters of the time for 1280 channels of 8 x 8 pixels.
    One product does without; its patches are kept by nobody, so only where no gradient is needed. And for a single
    small picture torch would leave oneDNN for its own convolution, which is slower.
    """

    def __init__(self, width_in: int, width: int, stride: int = 1):
        super().__init__(width_in, width, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H', W')
        if not _by_onednn(x, self.weight):
            return super().forward(x)
        (b, _, *size), stride = x.shape, self.stride[0]
        h, w = (math.ceil(n / stride) for n in size)
        recorded = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if self.bias is not None and not recorded and 8 * b * h * w <= self.out_channels:
            patches = F.unfold(x, 3, padding=1, stride=stride).transpose(0, 1).flatten(1)  # (9C, B H' W')
            y = _product(self.weight.flatten(1), patches.t()).view(-1, b, h, w).transpose(0, 1)
            return y.add_(self.bias[:, None, None]).contiguous()
        if b > 1:
            return super().forward(x)
        return torch.mkldnn_convolution(x, self.weight, self.bias, (1, 1), self.stride, (1, 1), 1)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (M, K), (N, K), (N,) -> (M, N)
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        product = _differentiable if torch.is_grad_enabled() else _product
        d_x = product(grad, weight.t()) if to_x else None
        d_weight = None
        if to_weight:  # (N, K): the wider of the two sides is the faster one to run over
            wide = grad.shape[1] > x.shape[1]
            d_weight = product(x.t(), grad.t()).t() if wide else product(grad.t(), x.t())
        return d_x, d_weight, grad.sum(0) if to_bias else None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:  # (M, K), (N, K) -> a bᵀ + bias
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _differentiable(a: Tensor, b: Tensor) -> Tensor:  # for a gradient that will itself be differentiated
    return a @ b.t()


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.numel() >= SMALL * weight.shape[1]
        and _onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()  # something counts, fakes or traces the operations
        and torch.autograd.forward_ad._current_level < 0
    )


@cache
def _onednn_is_faster() -> bool:
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    cpu = torch.cpu.get_capabilities() if known else {}
    return bool(cpu.get("avx512_f")) and "Intel" not in cpu.get("cpu_name", "Intel")


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to ``context``."""

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        self.heads = heads
        self.backend = "auto"
        context_width = context_width or width
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context_width, width, bias=False)
        self.to_v = Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        context = x if context is None else context  # (B, M, D')
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(context)), self._split(self.to_v(context))
        out = attention(q, k, v, bias, backend=self.backend)  # (B, heads, N, d)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, N, D)

    def _split(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, heads, N, d)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020)."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.proj = Linear(width_in, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        if torch.is_grad_enabled() and gate.requires_grad:
            return value * F.gelu(gate)
        return F.gelu(gate).mul_(value)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward: each on a normalised copy, each added.

    With ``only_cross``, the first attention goes to the text too (SD's x4 upscaler, on its widest maps).
    """

    def __init__(self, width: int, heads: int, context_width: int, only_cross: bool):
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, context_width if only_cross else None)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:  # (B, N, D)
        x = x + (self.attn1(self.norm1(x), context, bias) if self.only_cross else self.attn1(self.norm1(x)))
        x = x + self.attn2(self.norm2(x), context, bias)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Transformer blocks over the pixels of a feature map, around which the map is added back."""

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        context_width: int,
        groups: int,
        linear: bool,
        only_cross: bool = False,
    ):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, context_width, only_cross) for _ in range(depth)
        )
        self.proj_out = Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:  # (B, C, H, W)
        h = self.norm(x)
        h = self.proj_in(_to_tokens(h)) if self.linear else _to_tokens(self.proj_in(h))  # (B, HW, C)
        for block in self.transformer_blocks:
            h = block(h, context, bias)
        h = _to_map(self.proj_out(h), x) if self.linear else self.proj_out(_to_map(h, x))
        return x + h


def _to_tokens(x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, HW, C), contiguous: one copy, none from channels_last
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _to_map(x: Tensor, like: Tensor) -> Tensor:  # (B, HW, C) -> (B, C, H, W), a view
    return x.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
