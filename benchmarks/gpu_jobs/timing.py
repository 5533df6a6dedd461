"""Milliseconds and peak memory of a call on a device."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import peak_bytes, synchronize

from .rows import Settings

__all__ = ["check_device", "finish", "median_ms", "peak_mb", "rounded", "synchronize"]


def check_device(settings: Settings) -> torch.device:
    """Raises RuntimeError where torch does not see the device: nothing of this size is to run on a CPU instead."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch sees no CUDA device here")
    return torch.device(settings.device)


def median_ms(call: Callable[[], Any], device: torch.device, *, warm: int = 3, repeats: int = 10) -> float:
    """Of ``repeats`` calls after ``warm`` that are not counted; on a GPU by events, queued without waiting."""
    for _ in range(warm):
        call()
    if device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return 1e3 * statistics.median(seconds)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def peak_mb(call: Callable[[], Any], device: torch.device) -> float:
    """Most memory that is alive at once during the call, above what was alive before it, in MB (2^20 bytes)."""
    return peak_bytes(call, device) / 2**20


def rounded(values: Any, digits: int = 4) -> Any:
    """Floats of a nested structure to some significant digits; what JSON has no number for becomes text."""
    if isinstance(values, dict):
        return {key: rounded(value, digits) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(value, digits) for value in values]
    if isinstance(values, float):
        return float(f"{values:.{digits}g}") if math.isfinite(values) else str(values)
    return values


def finish(settings: Settings) -> None:
    """Between two rows: memory is given back.

    Raises:
        RuntimeError: the device is of no more use to this process (an error that CUDA does not recover from).
    """
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
