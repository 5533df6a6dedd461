"""What a network costs, told without a byte of it: parameters, FLOPs per image, and the memory of a training step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Forward = Callable[[nn.Module, int], Tensor]  # (network, rows in the batch) -> its output, on whatever device it is


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of a training step when most is in use; ``average`` is the EMA's float32 copy."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations

    def shared(self, world: int) -> Memory:
        """Of one of ``world`` processes that share all but the activations out (FSDP2)."""
        parts = {kind: size // world for kind, size in vars(self).items() if kind != "activations"}
        return replace(self, **parts)


def parameters(net: nn.Module) -> tuple[int, int]:
    """How many numbers are trained, and how many stay as they are."""
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in net.parameters()) - trained


def training_flops(build: Callable[[], nn.Module], forward: Forward) -> int:
    """FLOPs of one image's training step, counted as everybody counts them: three forward passes. What is frozen needs
    no gradient of its weights, which is one of the three.

    A multiplication with its addition is two. Blocks that gradient checkpointing computes again do not count: it is
    the model's work that a utilisation is a share of (Chowdhery et al. 2022, appendix B).
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = build()
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        forward(net, 1)
    trained, frozen = parameters(net)
    return round((2 + trained / (trained + frozen)) * counter.get_total_flops())


def training_memory(
    build: Callable[[], nn.Module],
    forward: Forward,
    batch: int,
    *,
    averaged: bool,
    autocast: torch.dtype | None = None,
    state_bytes: float = 8.0,
    frozen_bytes: float = 4.0,
) -> Memory:
    """Of a training step, from one that runs on tensors without data, however large the network.

    Args:
        batch: rows in a micro-batch.
        averaged: a moving average is kept.
        autocast: precision of the forward pass where it is not the weights' own.
        state_bytes: of the optimizer for each trained weight; AdamW's two moments in float32 if not given.
        frozen_bytes: of each weight that does not train.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net = build()
        held = _Held(net)
        with held, torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            forward(net, batch).float().square().mean().backward()
    trained, frozen = parameters(net)
    weights = int(4 * trained + frozen_bytes * frozen) + sum(b.nbytes for b in net.buffers())
    gradients, activations = held.gradients_at_peak, held.peak - held.gradients_at_peak
    # The gradients of the whole network and the most activations are not in use at one moment; what is, is the peak.
    every = 4 * trained  # float32; all gradients are there when the optimizer steps, and no activation is
    if held.peak < every:
        gradients, activations = every, 0
    return Memory(weights, gradients, int(state_bytes * trained), every if averaged else 0, activations)


class _Held(TorchDispatchMode):
    """Bytes of the tensors that operations make, for as long as each is there; of the network's own none."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        own = (*net.parameters(), *net.buffers())
        self.known = {x.untyped_storage()._cdata for x in own}
        for p in (p for p in net.parameters() if p.requires_grad):
            p.register_post_accumulate_grad_hook(self._learned)

    def _learned(self, p: Tensor) -> None:
        self.gradients += p.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.now += size
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
