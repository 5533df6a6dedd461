"""What is done with LoRA layers as numbers: into a weight, one after another, to another rank, out of a difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .layer import Component, Layer


def merged(weight: Tensor, layers: Sequence[tuple[Layer, float]]) -> Tensor:
    """``weight + sum of w * scale * up @ down``, computed in double precision, of the weight's shape and dtype.

    A DoRA (arXiv:2402.09353, eq. 5) gives each output's row its length: ``magnitude * W / |W|`` of what the weight is
    with its change; w counts for the change alone, and layers come one after another, as peft fuses them.

    Raises:
        ValueError: a layer is of another shape, or what comes out is not finite.
    """
    total = weight.double()
    for layer, w in layers:
        if not fits(layer, weight):
            raise ValueError(f"changes a weight of {layer.shape}; the base's is {tuple(weight.shape)}")
        delta = layer.up.double().flatten(1) @ layer.down.double().flatten(1)
        total = total + w * layer.scale * delta.reshape(weight.shape)
        if layer.magnitude is not None:
            length = layer.magnitude.double() / total.flatten(1).norm(dim=1).clamp_min(1e-300)  # nothing stays nothing
            total = total * length.view(-1, *[1] * (weight.ndim - 1))
    _check_finite(total)
    return total.to(weight.dtype)


def fits(layer: Layer, weight: Tensor) -> bool:
    """A 1x1 convolution is a linear layer too."""
    ours, its = layer.shape, tuple(weight.shape)
    return ours == its or (ours[:2] == its[:2] and all(k == 1 for k in ours[2:] + its[2:]))


def joined(layers: Sequence[tuple[Layer, float]]) -> Layer:
    """One layer that does what these do with their weights: of the ranks' sum, exactly (ups and downs side by side).

    Raises:
        ValueError: they change weights of other shapes, or one is a DoRA, whose lengths are of one LoRA alone.
    """
    first = layers[0][0]
    for layer, _ in layers:
        if layer.shape != first.shape:
            raise ValueError(f"one changes a weight of {first.shape}, another one of {layer.shape}")
        if layer.magnitude is not None:
            raise ValueError("a DoRA cannot be merged with others into a LoRA; merge it into a base")
    down = torch.cat([_precise(layer.down) for layer, _ in layers])
    up = torch.cat([_precise(layer.up) * (w * layer.scale) for layer, w in layers], dim=1)
    return Layer(down, up, float(len(down)))


def resized(layer: Layer, *, rank: int | None = None, energy: float | None = None) -> tuple[Layer, float]:
    """The nearest layer of a lower rank, with the same scale, by the SVD of ``up @ down``: of the two factors' QR, so
    that the big matrix is never built. A rank above the true one becomes that.

    Args:
        energy: share of the squared norm to keep, in place of a rank.
    Returns:
        The layer, and the share of the squared norm that it keeps.
    """
    _check_finite(layer.up, layer.down)
    q_up, r_up = torch.linalg.qr(_precise(layer.up).flatten(1))  # (out, r), (r, r)
    q_down, r_down = torch.linalg.qr(_precise(layer.down).flatten(1).T)  # (in, r), (r, r)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    k, kept = _cut(s, rank, energy)
    root = s[:k].sqrt()
    up, down = q_up @ (u[:, :k] * root), (root[:, None] * v[:k]) @ q_down.T
    return _shaped(layer, down, up, layer.scale * k), kept


def extracted(delta: Tensor, *, rank: int | None = None, energy: float | None = None) -> tuple[Layer, float]:
    """The nearest LoRA layer to a weight's change (out, in) or (out, in, k, k), by its SVD; see ``resized``."""
    _check_finite(delta)
    flat = _precise(delta).flatten(1)
    wide = flat.shape[0] < flat.shape[1]  # LAPACK is 5 times faster on the tall one
    u, s, v = torch.linalg.svd(flat.T if wide else flat, full_matrices=False)
    u, v = (v.T, u.T) if wide else (u, v)
    k, kept = _cut(s, rank, energy)
    root = s[:k].sqrt()
    ends = (1, 1) * (delta.ndim == 4)
    down = (root[:, None] * v[:k]).reshape(k, *delta.shape[1:])
    return Layer(down.contiguous(), (u[:, :k] * root).reshape(-1, k, *ends).contiguous(), float(k)), kept


def _cut(s: Tensor, rank: int | None, energy: float | None) -> tuple[int, float]:
    """How many singular values are kept, and their share of the energy; those that are rounding's are not."""
    share = s.double().square().cumsum(0)
    total = float(share[-1])
    if total == 0:
        return 1, 1.0
    share = share / total
    k = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        k = min(k, int((share < energy).sum()) + 1)
    k = min(k, int((s > 4 * torch.finfo(s.dtype).eps * s[0]).sum()))
    return k, float(share[k - 1])


def one_alpha(layers: Component) -> Component:
    """The same changes with one alpha for all, the most common one; the others' difference goes into ``up``."""
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    if alpha == 0:
        return layers
    return {
        name: layer
        if layer.alpha == alpha
        else replace(layer, up=_precise(layer.up) * (layer.alpha / alpha), alpha=alpha)
        for name, layer in layers.items()
    }


def norm(layer: Layer) -> float:
    """Frobenius norm of the change, from the factors' Gram matrices (r, r)."""
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    return abs(layer.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())


def _check_finite(*tensors: Tensor) -> None:
    if not all(bool(x.isfinite().all()) for x in tensors):
        raise ValueError("holds numbers that are not finite (NaN or infinite)")


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _shaped(like: Layer, down: Tensor, up: Tensor, alpha: float) -> Layer:
    k = down.shape[0]
    down = down.reshape(k, *like.down.shape[1:]).contiguous()
    return replace(like, down=down, up=up.reshape(-1, k, *like.up.shape[2:]).contiguous(), alpha=alpha)
