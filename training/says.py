"""What commands say while they run."""

from __future__ import annotations

import logging
import os

# Notes of libraries that a user of `ldm` can do nothing about; their errors are raised, and shown.
NOISY = ("httpx", "httpx2", "datasets", "accelerate", "botocore", "aiobotocore")
VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")  # read when the libraries are imported


def quiet_libraries() -> None:
    """Silence notes of libraries; to be called before any of them is imported."""
    for name in VERBOSITY:
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("bitsandbytes.backends.cpu.ops", "DeepSpeed"):  # kernels to fetch, the accelerator that was found
        logging.getLogger(name).addFilter(_is_error)  # DeepSpeed sets the level itself, when it is imported


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def say() -> None:
    """Show our own log lines, and no notes of libraries, from now on."""
    quiet_libraries()

    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, markup=False)
    first = os.environ.get("RANK", "0") == "0"  # of several processes one tells
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING,
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[handler],
        force=True,
    )
