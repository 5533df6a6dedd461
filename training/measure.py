"""What a device has and what of it is used: memory free and at its peak, and the share of its speed."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator

# TFLOP/s of dense matrix products in bf16 or fp16 with float32 accumulation, by the whole model name
# (with the form factor where speeds differ). From NVIDIA's data sheets; GeForce, RTX A6000 and RTX 6000
# Ada from the appendices of the GA102, Ada and RTX Blackwell architecture whitepapers ("Peak FP16
# Tensor TFLOPS with FP32 Accumulate").
PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "GH200": 989, "H200": 989, "H200 NVL": 835, "H100": 989, "H100 PCIE": 756,
    "H100 NVL": 835, "H800": 989, "H800 PCIE": 756, "H20": 148, "A100": 312, "A800": 312, "A40": 150, "A30": 165,
    "A10": 125, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121, "V100": 125, "V100 PCIE": 112, "V100S": 130, "T4": 65,
    "RTX 6000 ADA GENERATION": 364, "RTX A6000": 155, "GEFORCE RTX 5090": 210, "GEFORCE RTX 4090": 165,
    "GEFORCE RTX 4080": 97, "GEFORCE RTX 3090": 71, "GEFORCE RTX 3070": 41,
}  # fmt: skip
VENDOR = {"NVIDIA", "TESLA"}
PACKAGE = re.compile(r"PCIE|SXM\d?")
MEMORY = re.compile(r"\d+GB?|HBM\d?E?")
CONTAINER = Path("/sys/fs/cgroup")  # what a container may take, and has taken


def free_memory(device: torch.device) -> int:
    """Bytes that a run could take: on a GPU what torch's allocator holds unused counts too, on a CPU a container's
    limit does."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable:") or 2**63
    with suppress(OSError, ValueError):  # no such file, or "max"
        limit, taken = (int((CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - taken)
    return free


def reset_peak(device: torch.device) -> None:
    """``peak`` counts from here, where the system can be told so (a GPU, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not on this system: the peak is then the process's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(device: torch.device) -> int:
    """Most bytes in use since ``reset_peak``: on a GPU by torch, on a CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    whole_life = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return _kilobytes(Path("/proc/self/status"), "VmHWM:") or whole_life


def _kilobytes(file: Path, line: str) -> int | None:
    """In bytes, what a line of such a file tells; None where there is none."""
    lines = file.read_text(encoding="ascii", errors="replace").splitlines() if file.is_file() else []
    found = next((text for text in lines if text.startswith(line)), None)
    return None if found is None else int(found.split()[1]) * 1024


def peak_tflops(name: str) -> int | None:
    """Peak TFLOP/s of dense half precision.

    Args:
        name: what ``torch.cuda.get_device_name`` returns.
    Returns:
        None for a model that is not in the table, and for a part of one (MIG, a virtual GPU).
    """
    words = [word for word in re.split(r"[\s-]+", name.upper()) if word not in VENDOR and not MEMORY.fullmatch(word)]
    model = " ".join(word for word in words if not PACKAGE.fullmatch(word))
    return PEAK_TFLOPS.get(" ".join(words), PEAK_TFLOPS.get(model))


def matrix_speed(device: torch.device, precision: str) -> float:
    """FLOP/s of the product of two square matrices, the best of two: what no network exceeds.

    Args:
        precision: ``no``, ``bf16`` or ``fp16``.
    """
    side = 2048 if device.type == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    x = torch.ones(side, side, device=device, dtype=dtype)
    best = math.inf
    for _ in range(3):  # the first one warms up
        began = time.perf_counter()
        torch.mm(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def utilisation(flops: float, device: torch.device, precision: str) -> float | None:
    """FLOP/s of one device as a share of its peak; None if that is unknown, or in float32."""
    if device.type != "cuda" or precision == "no":
        return None
    peak = peak_tflops(torch.cuda.get_device_name(device))
    return None if peak is None else flops / (peak * 1e12)


def work(flops: int | None, speed: float, accelerator: Accelerator) -> dict[str, float]:
    """For the log: TFLOP/s of all processes, and as a share of what their devices can do (MFU) where that is known.

    Args:
        flops: of one image; None: nothing is told.
        speed: images a second.
    """
    if flops is None:
        return {}
    found = {"tflops": flops * speed / 1e12}
    share = utilisation(flops * speed / accelerator.num_processes, accelerator.device, accelerator.mixed_precision)
    return found if share is None else {**found, "mfu": share}
