"""What MMDiT and DiT share: transformers over patches, whose layer norms are modulated by the time (adaLN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cond import Cond
from ..reuse import once
from .attention import attention
from .base import Network
from .embeddings import TimestepMLP
from .linear import Linear, linear_gelu

TIME_WIDTH = 256  # sinusoids that the time, and each number of a size, is turned into


def checked_width(net: Network, projected: str) -> int:
    """heads × width of a head, the network's width, which its config field ``projected`` must repeat.

    Raises:
        ValueError: it does not, or a number of the config is not above 0.
    """
    name, config = type(net).__name__, net.config
    small = {k: v for k, v in config.items() if isinstance(v, int | float) and not isinstance(v, bool) and v <= 0}
    if small:
        raise ValueError(f"{name} with {', '.join(f'{k}={v}' for k, v in small.items())}: expected above 0")
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    if config[projected] != heads * head:
        raise ValueError(
            f"{projected}={config[projected]}: expected the network's width, {heads} heads × {head} = {heads * head}"
        )
    return heads * head


def check_inputs(net: Network, x: Tensor, time: Tensor, cond: Cond, **fields: str) -> None:
    """What the network was given fits it and each other.

    Args:
        x: (B, C, H, W) latents, with the channels of ``cond.extra``. time: (B,).
        fields: for ``tokens`` and ``pooled``, where the network takes them, the config field that says their width.
    Raises:
        ValueError: naming what does not fit, and what was expected.
    """
    name, channels, rows = type(net).__name__, net.config["in_channels"], len(x)
    if x.ndim != 4 or x.shape[1] != channels:
        given = "" if cond.extra is None else f" (cond.extra is given, {cond.extra.shape[1]} of its channels)"
        raise ValueError(f"{name}: x is {tuple(x.shape)}{given}; expected (B, in_channels={channels}, H, W)")
    if time.shape != (rows,):
        raise ValueError(f"{name}: time is {tuple(time.shape)}; expected ({rows},), one for each picture")
    for what, field in fields.items():
        value, width, length = getattr(cond, what), net.config[field], "L, " if what == "tokens" else ""
        if value is None or value.ndim != (3 if length else 2) or (len(value), value.shape[-1]) != (rows, width):
            given = "missing" if value is None else tuple(value.shape)
            raise ValueError(f"{name}: cond.{what} is {given}; expected ({rows}, {length}{field}={width})")
    if cond.bias is not None and cond.bias.shape != cond.tokens.shape[:2]:
        given, wanted = tuple(cond.bias.shape), tuple(cond.tokens.shape[:2])
        raise ValueError(f"{name}: cond.bias is {given}; expected one number per token, {wanted}")


def init_weights(net: nn.Module) -> None:
    """DiT's start (Peebles & Xie 2023, §3.2) but for the modulations: Xavier's weights, no biases, embeddings of time
    drawn from N(0, 0.02²), and a last layer of zeros."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: a patch is projected as by a linear layer
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    for module in net.modules():
        if isinstance(module, TimestepMLP):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
    nn.init.zeros_(net.proj_out.weight)  # type: ignore[arg-type]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A normalised copy of x (B, N, D), scaled by 1 + scale and shifted, (B, 1, D) each."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def unpatchify(x: Tensor, height: int, width: int, p: int) -> Tensor:
    """Tokens (B, N, p · p · C), row by row, each a patch with its channels last -> (B, C, height, width)."""
    x = x.view(len(x), height // p, width // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to ``text``; unlike the UNet's, with a bias in every layer.

    Args:
        qk_norm: RMS norms on queries and keys (SD 3.5).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.backend = "auto"
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.Sequential(Linear(width, width))
        self.norm_q = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, text: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x (B, N, D), text (B, L, D), bias (B, L), or (B, N) without a text -> (B, N, D)."""
        q = self.norm_q(self.split(self.to_q(x)))  # first: the order decides in which gradients are summed up
        k, v = once(self._keys_values, x if text is None else text)
        return self.to_out(self.attend(q, k, v, bias))

    def _keys_values(self, seen: Tensor) -> tuple[Tensor, Tensor]:  # (B, M, D) -> (B, M, H, d)
        return self.norm_k(self.split(self.to_k(seen))), self.split(self.to_v(seen))

    def split(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, H, d)
        return x.unflatten(-1, (self.heads, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:  # (B, N, H, d) -> (B, N, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, N, d)
        return attention(q, k, v, bias, backend=self.backend).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / rms(x), scaled (Zhang & Sennrich 2019); the mean square is taken in float32, as in diffusers' class."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (y.to(self.weight.dtype) * self.weight).to(x.dtype)


class FeedForward(nn.Module):
    """Two layers, four times as wide in between; names are those of diffusers' ``FeedForward``."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GELU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        return self.net(x)


class GELU(nn.Module):
    """A linear layer and GELU in its tanh form (Hendrycks & Gimpel 2016)."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.proj = Linear(width_in, width)

    def forward(self, x: Tensor) -> Tensor:
        return linear_gelu(self.proj, x)
