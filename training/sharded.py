"""Weights that are sharded among processes: saved, and read by any number of processes.

FSDP2's are DTensors. Each process writes its own shards, in the files of torch's distributed
checkpoint for safetensors (its usual format keeps a pickle, which is never read here), and reads what
it needs of all of them. Of a parameter of ZeRO's stage 3 each process holds as many of its numbers
(``ds_tensor``, the last one's padded); one tensor after the other is gathered, and the main process
saves it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from . import tensor_files
from .tensor_files import StoredTensor

_TWINS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def is_main() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def rank_and_world() -> tuple[int, int]:
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    if rank_and_world()[1] > 1:
        dist.barrier()


def gather_objects(mine: Any) -> list[Any]:
    """Of every process, in their order; all call this."""
    _, world = rank_and_world()
    everyone: list[Any] = [mine] * world
    if world > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def bare(module: nn.Module) -> nn.Module:
    """The module that a task made, out of what calls it for several processes."""
    wrapped = isinstance(module, DistributedDataParallel) or type(module).__name__ == "DeepSpeedEngine"
    return cast(nn.Module, module.module) if wrapped else module


def is_part(p: Tensor) -> bool:
    """A parameter of ZeRO's stage 3."""
    return hasattr(p, "ds_tensor")


def is_split(flat: Mapping[str, Tensor]) -> bool:
    """Some of these tensors are shared out among processes."""
    return any(isinstance(x, DTensor) or is_part(x) for x in flat.values())


def own(p: Tensor) -> Tensor:
    """What an average of a parameter is made like: itself, or the part that is here."""
    return cast(Any, p).ds_tensor if is_part(p) else p


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor's own part on this process, sharing its memory: what acts on each number alone needs no more."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in (own(y).detach() for y in tensors)]


def shape(p: Tensor) -> torch.Size:
    return cast(Any, p).ds_shape if is_part(p) else p.shape


def gathered(p: Tensor, x: Tensor | None = None) -> Tensor:
    """A parameter whole, or what is laid out as ``own(p)`` is; all processes call this."""
    x = own(p) if x is None else x
    if isinstance(x, DTensor):
        return x.full_tensor()
    if not is_part(p):
        return x
    of: Any = p
    mine = x.detach().to(of.ds_tensor.device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[: of.ds_numel].view(of.ds_shape)


def kept(p: Tensor, x: Tensor | None = None) -> Tensor:
    """What a checkpoint is given of a parameter, or of what is laid out as ``own(p)`` is: that itself; but of ZeRO's
    parts the whole, in the main process (an empty tensor in the others)."""
    if not is_part(p):
        return p if x is None else x
    whole = gathered(p, x)
    return whole.cpu() if is_main() else whole.new_empty(0)


def save(folder: Path, flat: Mapping[str, Tensor]) -> dict[str, str]:
    """Every process writes its own shards into ``folder``, which is there; of those that several
    processes hold alike, the first writes. The file is one of torch's distributed checkpoint.

    Returns:
        SHA-256 of the file that this process wrote, by its name.
    Raises:
        OSError: the disk is full.
    """
    shards: dict[str, Tensor] = {}
    begins: dict[str, dict[str, list[int]]] = {}
    for name, x in flat.items():
        if not isinstance(x, DTensor):
            begin, part, mine = [0] * x.ndim, x, is_main()
        else:
            (begin, _), part = local_box(x), x.to_local()
            # ranks of one row of a replicated dimension hold the same
            mine = bool(part.numel()) and not any(
                x.device_mesh.get_local_rank(i) for i, placement in enumerate(x.placements) if placement.is_replicate()
            )
        if mine:
            shards[name], begins[name] = part, {"saved_offsets": begin}
    rank, _ = rank_and_world()
    if not shards and rank:
        return {}
    file = f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
    about = {tensor_files.OFFSETS: json.dumps(begins), "DCP_VERSION": "1.0", "format": "pt"}
    return {file: tensor_files.write(folder / file, shards, about)}


def local_box(x: DTensor) -> tuple[list[int], list[int]]:
    """Where this process's part of a tensor begins, and its size."""
    (chunk,) = x.__create_chunk_list__()
    return list(chunk.offsets), list(chunk.sizes)


def like(x: Tensor | StoredTensor, given: Tensor) -> Tensor:
    """``x`` on the device of ``given`` and, if that is sharded, sharded as it is; a stored tensor is read only where
    this process needs it. No process asks another."""
    if is_part(given):
        part = cast(Any, given).ds_tensor
        n = part.numel()
        first = dist.get_rank() * n
        flat = x.read_flat(first, n) if isinstance(x, StoredTensor) else x.flatten()[first : first + n]
        padded = part.new_zeros(n)
        padded[: flat.numel()] = flat
        return padded
    if not isinstance(given, DTensor):
        return tensor_files.read(x).to(given.device)
    begin, size = local_box(given)
    if isinstance(x, StoredTensor):
        own_part = x.read(begin, size)
    else:
        box = tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
        own_part = x[box].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        own_part.to(given.device), given.device_mesh, given.placements,
        run_check=False, shape=given.shape, stride=given.stride(),
    )  # fmt: skip


def copy_into(target: Tensor, whole: Tensor | StoredTensor) -> None:
    """A whole tensor into one that may be shared out."""
    with torch.no_grad():
        own(target).copy_(like(whole, target))


# --- whole for a while -----------------------------------------------------------------------------------------------


def remember(module: nn.Module) -> None:
    """Before a module is shared out: keep a twin of it as it is now, whose parameters take no memory, for ``whole``."""
    shared: dict[int, Any] = {id(x): x for x in module.buffers()}
    shared |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    _TWINS[module] = copy.deepcopy(module, shared)


def reshard(module: nn.Module) -> None:
    """Let go of whole weights that are kept from the last call, so that the next one gathers them anew."""
    if any(is_part(p) for p in module.parameters()):
        cast(Any, module).optimizer.empty_partition_cache()
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
        tensor = gathered(p)
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
