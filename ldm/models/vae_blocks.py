"""The blocks of the autoencoder, and the order of memory in which a CPU is fastest at them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .linear import Conv1x1, Linear, is_recorded

Run = Callable[..., Tensor]  # run(block, *x): block(*x), or the same with its activations recomputed later
Act = Callable[[nn.GroupNorm, Tensor], Tensor]  # what stands before a convolution: silu(norm(x))
WIDE = 256  # channels above which they do not stand together


def laid_out(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """x (B, C, H, W) in the order of memory in which a CPU has ``conv`` and what is around it done fastest and in the
    least memory: channels last, but not for a backward pass, nor for so few pixels that it is the weights that count;
    nor for many channels, where the gain is gone and oneDNN's sums, which are longer there, round more.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or is_recorded(x, conv.weight, conv.bias):
        return x
    together = max(conv.in_channels, conv.out_channels) <= WIDE and _many_pixels(x, conv)
    together = together or _channels_last(conv.weight)
    return x.contiguous(memory_format=torch.channels_last if together else torch.contiguous_format)


def _many_pixels(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a copy of the weights is small beside what else a network needs at such a size."""
    return x.shape[0] * x.shape[2] * x.shape[3] >= 2 * max(conv.in_channels, conv.out_channels)


def layout_of(x: Tensor, conv: nn.Conv2d) -> torch.memory_format:
    """The order of memory in which torch convolves these."""
    return torch.channels_last if _channels_last(x) or _channels_last(conv.weight) else torch.contiguous_format


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)), in place where no gradient will ask for norm(x)."""
    h = norm(x)
    return F.silu(h, inplace=not h.requires_grad)


class Level(nn.Module):
    """The residual blocks of one resolution, then half or twice of it: (B, c_in, H, W) -> (B, c_out, H', W')."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, *, down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out, groups) for j in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(c_out)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample(c_out)]) if up else None

    def forward(self, x: Tensor, run: Run, act: Act = norm_silu) -> Tensor:
        return self.resample(self.residual(x, run, act))

    def residual(self, x: Tensor, run: Run, act: Act = norm_silu) -> Tensor:
        for block in self.resnets:
            x = run(block, x, act)
        return x

    def resample(self, x: Tensor) -> Tensor:
        for block in [*(self.downsamplers or ()), *(self.upsamplers or ())]:
            x = block(x)
        return x


class Middle(nn.Module):
    """Residual block, attention if asked for, residual block: (B, C, h, w) -> the same."""

    def __init__(self, channels: int, groups: int, with_attention: bool):
        super().__init__()
        self.attentions = nn.ModuleList([SelfAttention(channels, groups)] if with_attention else [])
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups) for _ in range(2))

    def chain(self) -> list[nn.Module]:
        return [self.resnets[0], *self.attentions, self.resnets[1]]


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv1x1(c_in, c_out) if c_in != c_out else None

    def forward(self, x: Tensor, act: Act = norm_silu) -> Tensor:
        x = laid_out(x, self.conv1)
        h = self.conv2(act(self.norm2, self.conv1(act(self.norm1, x))))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)  # a convolution does not keep its output
        return h


class SelfAttention(nn.Module):
    """One head over all positions, added to its input: (B, C, h, w) -> the same."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.backend = "auto"
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).permute(0, 2, 3, 1).contiguous().flatten(1, 2)  # (B, hw, C), one copy for three
        q, k, v = (f(tokens).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))  # (B, 1, hw, C)
        del tokens
        out = attention(q, k, v, backend=self.backend).squeeze(1)  # (B, hw, C)
        del q, k, v  # the most memory that is alive at once where a large picture is encoded in tiles
        out = self.to_out[0](out)
        return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Half the resolution. The border is added at the right and the bottom only, as every stock VAE has it."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution, nearest neighbour, then a 3x3 convolution.

    The two are one transposed convolution, whose 4x4 kernel is the 3x3 one added to itself at the four places
    of a 2x2 square: 4 products per output in place of 9. It is folded anew at each call, so that it cannot be
    older than the weight; that costs a hundredth of the convolution, and memory, which is short where there are few
    pixels and no backward pass.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if is_recorded(x, self.conv.weight, self.conv.bias):
            w = self.conv.weight.transpose(0, 1)  # (I, O, 3, 3)
            for dim in (2, 3):
                a, b, c = w.unbind(dim)
                w = torch.stack((c, b + c, a + b, a), dim)  # (I, O, 4, 3), then (I, O, 4, 4)
            return F.conv_transpose2d(x, w, self.conv.bias, stride=2, padding=1)
        if not _many_pixels(x, self.conv):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.conv_transpose2d(x, self._folded(x), self.conv.bias, stride=2, padding=1)

    def _folded(self, x: Tensor) -> Tensor:
        """The same kernel (I, O, 4, 4) without copies on the way, in the order of memory that x asks for."""
        w = self.conv.weight.transpose(0, 1).flip(2, 3)  # (I, O, 3, 3)
        folded = torch.empty(*w.shape[:2], 4, 4, dtype=w.dtype, device=w.device, memory_format=layout_of(x, self.conv))
        folded.zero_()
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            folded[..., i : i + 3, j : j + 3] += w
        return folded
