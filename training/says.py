"""What commands say while they run."""

from __future__ import annotations


def say() -> None:
    """From now on the log says our own lines, without the libraries' notes on what is not installed."""
    import logging
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

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
    for name in ("httpx", "httpx2", "datasets", "accelerate", "botocore", "aiobotocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that it would fetch
