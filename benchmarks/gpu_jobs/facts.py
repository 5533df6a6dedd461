"""The machine: versions, matrix products and copies at their fastest, the kernels that xFormers has for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.measure import cpu_name

from .rows import Settings, Skipped
from .timing import check_device, finish, median_ms, rounded

__all__ = ["finish", "rows"]
PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "xformers", "bitsandbytes", "datasets",
    "huggingface_hub", "safetensors", "tokenizers", "torchmetrics", "numpy", "pydantic",
)  # fmt: skip


def rows(settings: Settings) -> dict[str, Callable[[], dict[str, Any]]]:
    check_device(settings)
    return {
        "facts/machine": lambda: machine(settings),
        "facts/speed": lambda: speed(settings),
        "facts/xformers": xformers_info,
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine(settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = {
        "versions": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": "cpu",
    }
    if settings.device != "cuda":
        return values
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return values | {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": total / 2**30,
        "free_gib": free / 2**30,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver(),
    }


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip().splitlines()[0] if found.stdout.strip() else None


def speed(settings: Settings) -> dict[str, Any]:
    """Square matrix products of random numbers (zeros run faster: they take less power), and a copy on the device."""
    device, n = torch.device(settings.device), 128 if settings.tiny else 8192
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
    values: dict[str, float] = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, dtype in kinds.items():
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            repeats = 10 if name == "fp32" else 20
            values[f"{name}_tflops"] = 2e-9 * n**3 / median_ms(lambda a=a, b=b: a @ b, device, repeats=repeats)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.empty(2**12 if settings.tiny else 2**30, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), device)
    return rounded(values | {"matrix": n, "copy_gb_per_s": 2 * source.nbytes / 1e6 / ms})  # bytes read and written


def xformers_info() -> dict[str, Any]:
    """``python -m xformers.info``: each of its kernels, and whether it runs here."""
    if installed("xformers") is None:
        raise Skipped("xformers is not installed")
    done = subprocess.run([sys.executable, "-m", "xformers.info"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"python -m xformers.info: {done.stderr.strip() or 'no output'}")
    pairs = (line.partition(":") for line in done.stdout.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}
