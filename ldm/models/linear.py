"""Products and convolutions by the faster of the libraries that torch brings along."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reuse import current, once

Size = int | tuple[int, int]
SMALL = 2**21  # multiplications below which a call of oneDNN costs more than it saves; twice that with a backward pass
TORCHS_OWN = 20480  # numbers in a single picture up to which torch convolves it without oneDNN
COPY = 2**18  # weights that may be copied where no backward pass needs more memory anyway
FEW = 512  # pixels up to which a convolution is faster by what it gains from weights that are in order already


class Linear(nn.Linear):
    """``nn.Linear``, by oneDNN where that is the faster library.

    torch multiplies float32 matrices with MKL, which keeps to its AVX2 kernels on other makers' AVX-512 processors:
    oneDNN, which torch has on board for convolutions, takes half the time there. The weights stay as they are.
    """

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return linear(x, self.weight, self.bias)


class Conv1x1(nn.Conv2d):
    """``nn.Conv2d`` of 1 x 1: a ``Linear`` over the pixels where their channels stand together (channels last)."""

    def __init__(self, width_in: int, width: int, kernel_size: Size = 1, *args: Any, **kw: Any):
        super().__init__(width_in, width, kernel_size, *args, **kw)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H, W)
        pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if not pixels.is_contiguous():
            return super().forward(x)
        return linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of 3 x 3, made faster for few pixels on a CPU.

    A convolution reorders its weights at every call: three quarters of the time for 1280 channels of 8 x 8 pixels.
    One product does without; its patches are kept by nobody, so only where no gradient is needed. In a sampling run
    (``reuse``) the reordered weights are kept, of maps of few pixels. And for a single small picture torch would leave
    oneDNN for its own convolution, which is slower; but oneDNN's copy of the weights must not be what sets the peak of
    memory.
    """

    def __init__(
        self, width_in: int, width: int, kernel_size: Size = 3, stride: Size = 1, padding: Size | None = None, **kw: Any
    ):
        # nn.Conv2d's arguments: peft makes both layers of a LoRA of this class, and the second is 1 x 1.
        same = int(kernel_size in (3, (3, 3))) if padding is None else padding
        super().__init__(width_in, width, kernel_size, stride, same, **kw)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H', W')
        recorded = is_recorded(x, self.weight, self.bias)
        (b, _, *size), stride = x.shape, self.stride[0]
        h, w = (math.ceil(n / stride) for n in size)
        if self.out_channels < 8 * b * h * w <= 8 * FEW and current() and self._takes(x):
            args = x, once(self._reordered, tuple(x.shape)), self.bias, [1, 1], [stride, stride], [1, 1], 1
            return torch.ops.mkldnn._convolution_pointwise(*args, "none", [], "")
        if self.kernel_size != (3, 3) or not _by_onednn(x, self.weight, recorded):
            return super().forward(x)
        if self.bias is not None and not recorded and 8 * b * h * w <= self.out_channels:
            patches = F.unfold(x, 3, padding=1, stride=stride).transpose(0, 1).flatten(1)  # (9C, B H' W')
            y = _product(self.weight.flatten(1), patches.t()).view(-1, b, h, w).transpose(0, 1)
            return y.add_(self.bias[:, None, None]).contiguous()
        if b > 1 or stride > 1 or x.numel() > TORCHS_OWN or self.out_channels > 2 * h * w:
            return super().forward(x)
        if recorded:
            return _OneDNNConv.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]
        if self.weight.numel() > COPY:
            return super().forward(x)
        return torch.mkldnn_convolution(x, self.weight, self.bias, (1, 1), (1, 1), (1, 1), 1)

    def _takes(self, x: Tensor) -> bool:
        return self.kernel_size == (3, 3) and _is_plain(x, self.weight)

    def _reordered(self, size: tuple[int, ...]) -> Tensor:
        """The weights as oneDNN wants them for inputs of this size."""
        order: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # type: ignore[attr-defined]
        return order(self.weight.detach().to_mkldnn(), (1, 1), self.stride, (1, 1), 1, size)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (..., K), (N, K), (N,) -> (..., N)
    """``F.linear``, by oneDNN where that is the faster library."""
    recorded = is_recorded(x, weight, bias)
    if not _by_onednn(x, weight, recorded):
        return F.linear(x, weight, bias)
    product = _OneDNNLinear.apply if recorded else _product
    return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
    """gelu(layer(x)), the GELU in its tanh form (Hendrycks & Gimpel 2016).

    Where no gradient is needed it is in the layer's own product (a plain ``Linear``), or in place.
    """
    alone = type(layer) is Linear and not layer._forward_hooks and not layer._forward_pre_hooks  # no LoRA around it
    if (
        alone
        and isinstance(layer, Linear)
        and not is_recorded(x, layer.weight, layer.bias)
        and _by_onednn(x, layer.weight, False)
    ):
        y = _product(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, gelu=True)
        return y.view(*x.shape[:-1], layer.out_features)
    y = layer(x)
    if torch.is_grad_enabled() and y.requires_grad:
        return F.gelu(y, approximate="tanh")
    return torch.ops.aten.gelu_(y, approximate="tanh")  # the widest tensor of all: not two of them


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
        # The weight's gradient comes out row by row, as the weight is stored: anything else would be copied.
        return (
            product(grad, weight.t()) if to_x else None,  # (M, K)
            product(grad.t(), x.t()) if to_weight else None,  # (N, K)
            grad.sum(0) if to_bias else None,  # (N,)
        )


class _OneDNNConv(torch.autograd.Function):
    """3 x 3, stride 1, of a single picture."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mkldnn_convolution(x, weight, bias, (1, 1), (1, 1), (1, 1), 1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight), needed = grads, ctx.saved_tensors, list(ctx.needs_input_grad)
        if not torch.is_grad_enabled():  # a gradient that will itself be differentiated is torch's own
            x = x.to_mkldnn()  # torch chooses the library by it
        one, biases = [1, 1], [len(weight)] if needed[2] else None
        args = (grad, x, weight, biases, one, one, one, False, [0, 0], 1, needed)
        return torch.ops.aten.convolution_backward(*args)  # type: ignore[no-any-return]


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """(M, K), (N, K), (N,) -> a bᵀ + bias, or its GELU."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")


def _differentiable(a: Tensor, b: Tensor) -> Tensor:  # for a gradient that will itself be differentiated
    return a @ b.t()


def is_recorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd will want to know of an operation on these."""
    needed = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return needed and torch.is_grad_enabled()


def _by_onednn(x: Tensor, weight: Tensor, recorded: bool) -> bool:
    if torch.compiler.is_compiling():  # which would break its graph at what is asked below
        return False
    large = x.numel() * weight.numel() >= (SMALL << recorded) * weight.shape[1]
    return large and _onednn_is_faster() and _is_plain(x, weight)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """float32 on a CPU, which nothing but an autograd graph looks at."""
    return (
        not torch.compiler.is_compiling()  # first: the others break its graph
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and _has_onednn()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()  # something counts, fakes or traces the operations
        and torch.autograd.forward_ad._current_level < 0
    )


@cache
def _onednn_is_faster() -> bool:
    cpu = torch.cpu.get_capabilities() if _has_onednn() else {}
    return bool(cpu.get("avx512_f")) and "Intel" not in cpu.get("cpu_name", "Intel")


@cache
def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(getattr(torch._C, "_nn", None), "mkldnn_reorder_conv2d_weight")
        and hasattr(torch.cpu, "get_capabilities")
        and hasattr(torch._C, "_are_functorch_transforms_active")  # no promise of torch's: without them, F.linear
        and hasattr(torch._C, "_len_torch_dispatch_stack")
        and hasattr(torch.autograd.forward_ad, "_current_level")
    )
