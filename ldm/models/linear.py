"""Products and 3 x 3 convolutions by the faster of the libraries that torch brings along."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
