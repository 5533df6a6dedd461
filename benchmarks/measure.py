"""Time, memory and agreement of two implementations of one thing, side by side in one process."""

from __future__ import annotations

import gc
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], Any]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: of all threads, not counting waits for a core


class Ratio(NamedTuple):
    """Of two medians, with the interval in which it lies at the level asked for."""

    value: float
    low: float
    high: float


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of each call in each round, garbage collection held back and the order turned round every time.

    Interleaved, a machine that slows down or is shared does it to both alike; turned round, neither always runs with
    the caches that the other left.

    Args:
        calls: name -> what is timed.
        rounds: how often each is timed.
        device: waited for before both readings of the clock.
        between: run after each call, outside the timed region; the call's result is dropped before it.
        clock: one of ``CLOCKS``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            seconds[name].append(timed(calls[name], device, clock))
            between()
    return seconds


def timed(call: Call, device: torch.device, clock: str = "wall") -> float:
    """Seconds that one call takes, with whatever it started on the device."""
    read, collects = CLOCKS[clock], gc.isenabled()
    gc.disable()
    try:
        synchronize(device)
        start = read()
        call()
        synchronize(device)
        return read() - start
    finally:
        if collects:
            gc.enable()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio_of_medians(
    ours: Sequence[float], theirs: Sequence[float], *, level: float = 0.9, draws: int = 4000, seed: int = 0
) -> Ratio:
    """median(ours) / median(theirs), and its percentile bootstrap interval (Efron 1979) over rounds.

    A round is drawn whole, ours and theirs together, since what disturbed one will have disturbed the other.

    Raises:
        ValueError: no rounds, or not the same number of them on both sides.
    """
    if len(ours) == 0 or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rounds of ours, {len(theirs)} of theirs: expected as many of both, one or more")
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    drawn = np.random.default_rng(seed).integers(len(a), size=(draws, len(a)))
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


def difference(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> float:
    """Largest difference of two lists of tensors, relative to the largest value of the tensor that it is in.

    A tensor whose values are all below a tenth of the largest in the list counts as that large: the gradient of a
    bias before a norm is a sum over a picture that comes to zero, and what is left of it is rounding. None is a
    gradient that is zero. Infinite where a value is not finite or a shape differs.
    """
    shapes = [(a is not None and b is not None and a.shape != b.shape) for a, b in zip(ours, theirs, strict=True)]
    if any(shapes):
        return math.inf
    sizes = [0.0 if b is None else float(b.abs().max()) for b in theirs]
    floor = max([1e-30, *(0.1 * x for x in sizes)])
    worst = 0.0
    for a, b, size in zip(ours, theirs, sizes, strict=True):
        if a is None and b is None:
            continue
        delta = (0 if a is None else a.double()) - (0 if b is None else b.double())
        value = float(torch.as_tensor(delta).abs().max()) / max(size, floor)
        worst = max(worst, value) if math.isfinite(value) else math.inf
    return worst


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most memory that is alive at once while ``call`` runs, above what was alive before it.

    On a GPU by the allocator's own count; on a CPU by adding up every allocation and release that torch's allocator
    reports, a kernel's own buffers among them. Exact and the same each time, unlike a process's resident size; what
    libraries allocate past torch (oneDNN's scratchpads) is in neither.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.autograd.profiler import profile

    seen: Any = profile(profile_memory=True)
    with seen:
        call()
    events = [x for x in seen.kineto_results.events() if x.name() == "[memory]"]
    alive = np.cumsum([0, *(x.nbytes() for x in sorted(events, key=lambda x: x.start_ns()))])
    return int(alive.max())


def operators(call: Call, device: torch.device, calls: int = 3) -> dict[str, tuple[float, int]]:
    """Where the time goes: operator -> (ms of its own, times called), the longest first; of the quickest of some calls,
    the one that was disturbed least."""
    from torch.profiler import ProfilerActivity, profile

    gpu, found = device.type == "cuda", []
    for _ in range(calls):
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as seen:
            call()
            synchronize(device)
        events = seen.key_averages()
        took = {x.key: ((x.self_device_time_total if gpu else x.self_cpu_time_total) / 1e3, x.count) for x in events}
        found.append((sum(ms for ms, _ in took.values()), took))
    return dict(sorted(min(found, key=lambda x: x[0])[1].items(), key=lambda x: -x[1][0]))


def machine(device: torch.device) -> dict[str, Any]:
    """What a number depends on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # processes that want a core: above the number of cores, times are no good
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
            "cuda": torch.version.cuda,
        },
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
