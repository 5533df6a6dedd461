"""Weights that are shared out among processes (FSDP2's DTensors): saved by each, read by any number of processes.

torch's distributed checkpoint writes them, in safetensors; its usual format keeps a pickle, which is never read here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

_TWINS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def is_main() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def is_split(flat: Mapping[str, Tensor]) -> bool:
    """Some of these tensors are shared out among processes."""
    return any(isinstance(x, DTensor) for x in flat.values())


def save(folder: Path, flat: Mapping[str, Tensor]) -> None:
    """Every process writes its own shards into ``folder``; all must call this."""
    writer = dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    dcp.save({k: v.detach() for k, v in flat.items()}, storage_writer=writer)


def load(folder: Path) -> dict[str, Tensor]:
    """The whole tensors, in this process, whoever wrote them."""
    reader = dcp.HuggingFaceStorageReader(path=str(folder))
    told = reader.read_metadata().state_dict_metadata
    flat: dict[str, Tensor] = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in told.items()
        if isinstance(m, TensorStorageMetadata)
    }
    dcp.load(flat, storage_reader=reader, no_dist=True)
    return flat


def like(whole: Tensor, given: Tensor) -> Tensor:
    """``whole`` shared out as ``given`` is; a plain tensor stays as it is. No process asks another."""
    if not isinstance(given, DTensor):
        return whole
    return distribute_tensor(whole.to(given.device), given.device_mesh, given.placements, src_data_rank=None)


def copy_into(target: Tensor, whole: Tensor) -> None:
    """A whole tensor into one that may be shared out."""
    with torch.no_grad():
        target.copy_(like(whole, target))


# --- whole for a while -----------------------------------------------------------------------------------------------


def remember(module: nn.Module) -> None:
    """Before a module is shared out: keep a twin of it as it is now, whose parameters take no memory, for ``whole``."""
    shared: dict[int, Any] = {id(x): x for x in module.buffers()}
    shared |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    _TWINS[module] = copy.deepcopy(module, shared)


def reshard(module: nn.Module) -> None:
    """Let go of whole weights that are kept from the last call, so that the next one gathers them anew."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def whole(module: nn.Module, device: torch.device, here: bool) -> Iterator[None]:
    """Within this context a module that is shared out is, in the process where ``here``, what it was before that: its
    weights are plain tensors on ``device``, and nobody else is asked when it is called. All processes enter together,
    and one tensor after the other is gathered. A module that is not shared out stays as it is.
    """
    if not is_split(dict(module.named_parameters())):
        yield
        return
    twin, full = _TWINS[module], {}
    for name, p in module.named_parameters(remove_duplicate=False):
        tensor = p.full_tensor() if isinstance(p, DTensor) else p
        if here:
            full[name] = nn.Parameter(tensor.detach().to(device), requires_grad=False)
    if not here:
        yield
        return
    pairs = list(zip(module.modules(), twin.modules(), strict=True))
    empty = dict(twin.named_parameters(remove_duplicate=False))
    _put(twin, full)
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)
        _put(twin, empty)


def _put(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, p in parameters.items():
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path)._parameters[leaf] = p


def _exchange(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Class, parameters, hooks and all else of each pair, but not the tree that they form."""
    for ours, theirs in pairs:
        for name in ("_modules", "_buffers", "training"):  # twice exchanged: they stay where they are
            ours.__dict__[name], theirs.__dict__[name] = theirs.__dict__[name], ours.__dict__[name]
        for name in ("__class__", "__dict__"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            object.__setattr__(ours, name, other)
            object.__setattr__(theirs, name, mine)
