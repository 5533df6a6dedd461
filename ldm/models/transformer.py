"""Text-conditioned transformer blocks over pixels (Rombach et al. 2022, §3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reuse import once
from .attention import attention
from .linear import Conv1x1, Linear


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
        q = self._split(self.to_q(x))  # first: the order decides in which gradients are summed up
        k, v = once(self._keys_values, x if context is None else context)
        out = attention(q, k, v, bias, backend=self.backend)  # (B, heads, N, d)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, N, D)

    def _keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:  # (B, M, D') -> (B, heads, M, d)
        return self._split(self.to_k(context)), self._split(self.to_v(context))

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
        self.proj_in = Linear(width, width) if linear else Conv1x1(width, width)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, context_width, only_cross) for _ in range(depth)
        )
        self.proj_out = Linear(width, width) if linear else Conv1x1(width, width)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:  # (B, C, H, W)
        h = _to_tokens(self.norm(x))  # (B, HW, C)
        h = self.proj_in(h) if self.linear else _to_tokens(self.proj_in(_to_map(h, x)))
        for block in self.transformer_blocks:
            h = block(h, context, bias)
        h = _to_map(self.proj_out(h), x) if self.linear else self.proj_out(_to_map(h, x))
        return x + h


def _to_tokens(x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, HW, C), contiguous: one copy, none from channels_last
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _to_map(x: Tensor, like: Tensor) -> Tensor:  # (B, HW, C) -> (B, C, H, W), a view
    return x.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
