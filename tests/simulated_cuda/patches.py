"""All that is replaced in torch.cuda, each with its reason: a CPU build has no C functions behind these names."""

from __future__ import annotations

from typing import Any

import torch

from .syncs import note

TOTAL = 80 * 2**30  # bytes of memory that it says it has
NAME = "NVIDIA H100 80GB HBM3"
NOTHING = "a no-op on a device that does its work at once"
ANSWER = "asks the driver"


class Event:
    """Of a stream on which nothing is ever under way; whoever waits for it is noted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        note("event.synchronize")

    def elapsed_time(self, other: Event) -> float:
        note("event.elapsed_time")
        return 0.0


class Properties:
    name, major, minor, total_memory, multi_processor_count = NAME, 9, 0, TOTAL, 132


def _swap_tensors(one: torch.Tensor, other: torch.Tensor) -> None:
    """Each object has the other's content and class. torch's own refuses tensors that a graph refers to."""
    if type(one) is type(other) and one.dtype is other.dtype and one.data_ptr() == other.data_ptr():
        return  # it is there already: nothing has to move
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)


def _synchronize(device: Any = None) -> None:
    note("cuda.synchronize")


# name in torch.cuda -> what stands there, why
PATCHES: dict[str, tuple[Any, str]] = {
    "is_available": (lambda: True, ANSWER),
    "is_initialized": (lambda: True, ANSWER),
    "_lazy_init": (lambda: None, "torch calls it before it makes a CUDA tensor; it would refuse a CPU build"),
    "device_count": (lambda: 1, ANSWER),
    "current_device": (lambda: 0, ANSWER),
    "set_device": (lambda device: None, NOTHING),
    "_exchange_device": (lambda index: 0, "`with torch.cuda.device(…)` calls it"),
    "_maybe_exchange_device": (lambda index: 0, "the same context calls it at its end"),
    "get_device_name": (lambda device=None: NAME, ANSWER),
    "get_device_capability": (lambda device=None: (9, 0), ANSWER),
    "get_device_properties": (lambda device=None: Properties(), ANSWER),
    "is_bf16_supported": (lambda *args, **kwargs: True, ANSWER),
    "synchronize": (_synchronize, "is noted as a wait"),
    "empty_cache": (lambda: None, NOTHING),
    "ipc_collect": (lambda: None, NOTHING),
    "memory_allocated": (lambda device=None: 0, "memory is not simulated"),
    "memory_reserved": (lambda device=None: 0, "memory is not simulated"),
    "max_memory_allocated": (lambda device=None: 0, "memory is not simulated"),
    "reset_peak_memory_stats": (lambda device=None: None, "memory is not simulated"),
    "mem_get_info": (lambda device=None: (TOTAL, TOTAL), "memory is not simulated"),
    "manual_seed": (lambda seed: None, "the device draws from the CPU's generator"),
    "manual_seed_all": (lambda seed: None, "the device draws from the CPU's generator"),
    "get_rng_state": (lambda device=None: torch.get_rng_state(), "the device draws from the CPU's generator"),
    "set_rng_state": (lambda state, device=None: None, "the device draws from the CPU's generator"),
    "get_rng_state_all": (lambda: [torch.get_rng_state()], "the device draws from the CPU's generator"),
    "set_rng_state_all": (lambda states: None, "the device draws from the CPU's generator"),
    "Event": (Event, "has C functions behind it"),
}


def apply() -> None:
    for name, (stand_in, _) in PATCHES.items():
        assert hasattr(torch.cuda, name), f"torch.cuda.{name} is gone: take it off the list"
        setattr(torch.cuda, name, stand_in)
    # nn.Module.to: of a real device it puts new data into a parameter, whoever refers to it.
    torch.utils.swap_tensors = _swap_tensors
    # torch._inductor, which diffusers imports, takes it where a device is there.
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # type: ignore[attr-defined]
