"""Weights that are shared out among processes (FSDP2's DTensors): saved by each, read by any number of processes.

torch's distributed checkpoint writes them, in safetensors; its usual format keeps a pickle, which is never read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor


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
