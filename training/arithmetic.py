"""What a network costs, told without a byte of it: parameters, FLOPs per image, and the memory of a training step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .schema import LatentRun

Forward = Callable[[nn.Module, int], Tensor]  # (network, rows in the batch) -> its output, on whatever device it is
HALF = (torch.float16, torch.bfloat16)
# What autocast does on CUDA and not on a CPU, from ATen/autocast_mode.h: operations that run in
# float32 (AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE and `norm`), and those that run in the widest
# precision of their inputs (AT_FORALL_PROMOTE). Where the lists differ otherwise, the result is the
# same: CUDA's `cat` and `stack` promote without autocast.
CUDA_FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "dist",
    "pdist", "renorm", "logsumexp", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d",
    "_upsample_nearest_exact2d", "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d",
    "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList", "norm.Scalar", "norm.ScalarOpt_dim",
)  # fmt: skip
CUDA_PROMOTE = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "index_put", "scatter_add", "tensordot", "vdot",
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of a training step when most is in use.

    Attributes:
        average: the EMA's float32 copy.
        buckets: DDP's, a second copy of all gradients, since ``gradient_as_bucket_view`` is off.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    buckets: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + self.buckets

    def shared(self, world: int) -> Memory:
        """Of one of ``world`` processes that share all but the activations out (FSDP2)."""
        parts = {kind: size // world for kind, size in vars(self).items() if kind != "activations"}
        return replace(self, **parts)


@dataclass(frozen=True)
class Work:
    """Seconds that one picture takes on a device, by arithmetic.

    Args:
        flops: of its training step.
        trained: share of the parameters that train.
        speed: FLOP/s that networks reach on the device.
    """

    flops: int
    trained: float
    speed: float

    @property
    def training(self) -> float:
        return self.flops / self.speed

    @property
    def forward(self) -> float:
        return self.training / (2 + self.trained)  # as ``training_flops`` counts

    def call(self, config: LatentRun) -> float:
        """Of one step of the sampler, with classifier-free guidance where the samples have it."""
        return calls_at_once(config) * self.forward


def calls_at_once(config: LatentRun) -> int:
    """Rows of the network's batch for one picture that is drawn: guidance adds the null prompt's."""
    return 2 if config.sample.guidance_scale > 1 else 1


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
    accumulated: bool = False,
    replicated: bool = False,
    device_type: str = "cpu",
    autocast: torch.dtype | None = None,
    state_bytes: float = 8.0,
    frozen_bytes: float = 4.0,
) -> Memory:
    """Of a training step, from one that runs on tensors without data, however large the network.

    Attention is taken to be a fused kernel. Flash, memory-efficient and xFormers save the same for
    the backward pass: q, k, v, the output and a float32 number for each query.

    Args:
        batch: rows in a micro-batch.
        averaged: a moving average is kept.
        accumulated: a step has several micro-batches: from the second on, all gradients are in
            memory from its beginning.
        replicated: several processes train the network under DDP.
        device_type: ``cuda`` or ``cpu``: the device that the step is planned for, whose autocast
            rules hold; the machine that counts needs none.
        autocast: precision of the forward pass where it is not the weights' own.
        state_bytes: of the optimizer for each trained weight; AdamW's two moments in float32 if not given.
        frozen_bytes: of each weight that does not train; below 4 they have the dtype ``autocast``.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net = build()
        if autocast is not None and frozen_bytes < 4:
            _frozen_in(net, autocast)
        held = _Held(net)
        with held, autocast_of(device_type, autocast):
            forward(net, batch).float().square().mean().backward()
    trained, frozen = parameters(net)
    weights = int(4 * trained + frozen_bytes * frozen) + sum(b.nbytes for b in net.buffers())
    gradients, activations = held.gradients_at_peak, held.peak - held.gradients_at_peak
    # The gradients of the whole network and the most activations are not in use at one moment; what is, is the peak.
    every = 4 * trained  # float32; all gradients are there when the optimizer steps, and no activation is
    if accumulated:
        gradients, activations = every, held.peak_alone
    elif held.peak < every:
        gradients, activations = every, 0
    average, buckets = every if averaged else 0, every if replicated else 0
    return Memory(weights, gradients, int(state_bytes * trained), average, activations, buckets)


def _frozen_in(net: nn.Module, dtype: torch.dtype) -> None:
    """Weights that do not train become half precision ones, which autocast has no need to copy."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None and not p.requires_grad and p.is_floating_point():
                module._parameters[name] = nn.Parameter(p.to(dtype), requires_grad=False)


@contextmanager
def autocast_of(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast for CPU tensors by the rules of another device: a machine without a GPU can count
    what a GPU would hold. The kernels are registered for this block alone.

    Args:
        device_type: ``cuda`` or ``cpu``.
        dtype: None: no autocast.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        if device_type == "cuda" and dtype is not None:
            for name in (*CUDA_FLOAT32, *CUDA_PROMOTE):
                library.impl(name, _autocast_kernel(name), "AutocastCPU")
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            yield


def _autocast_kernel(name: str) -> Callable[..., Any]:
    """Operations that take a dtype get float32 inputs by it, without a copy, as on CUDA."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    arguments = [argument.name for argument in op._schema.arguments]
    dtype = arguments.index("dtype") if "dtype" in arguments else None
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        kinds = {x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        with torch._C._ExcludeDispatchKeyGuard(below):
            if not kinds.intersection(HALF) or (name in CUDA_PROMOTE and torch.float32 not in kinds):
                return op(*args, **kwargs)
            if dtype is not None:
                asked = {} if len(args) > dtype else {"dtype": kwargs.get("dtype") or torch.float32}
                return op(*args, **{**kwargs, **asked})
            return op(*tree_map(_widened, args), **tree_map(_widened, kwargs))

    return kernel


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x


class _Held(TorchDispatchMode):
    """Bytes of the tensors that operations make, for as long as each is there; of the network's own none."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.now = self.peak = self.peak_alone = self.gradients = self.gradients_at_peak = 0  # alone: no gradients
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
        self.peak_alone = max(self.peak_alone, self.now - self.gradients)
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
