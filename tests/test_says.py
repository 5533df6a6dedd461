"""What a command writes to stderr is our own: no notes of libraries, no traceback of a hub."""

from __future__ import annotations

import os
import subprocess
import sys

import httpx
import pytest

from pipelines.hub import hub_error
from training.evaluate.report import label

NOISE = """
from training.says import say
say()
import logging
from transformers import CLIPImageProcessor  # asks for torchvision
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
logging.getLogger("DeepSpeed").warning("no accelerator")
"""


def test_libraries_are_quiet() -> None:
    env = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    ran = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, env=env, timeout=300)
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", "")


def test_an_error_of_the_hub_is_a_line() -> None:
    with pytest.raises(OSError) as caught:
        try:
            raise httpx.ConnectError("Name or service not known")
        except httpx.ConnectError as error:
            raise OSError("Cannot load model x: the model is not fully cached locally. " * 5) from error
    assert hub_error(caught.value) == "the hub cannot be reached (Name or service not known)"
    long = hub_error(ValueError("words " * 70 + "\nmore"))
    assert len(long) < 170 and "\n" not in long and "not fetched from the hub" in long


def test_metrics_have_labels() -> None:
    assert label("net_grad_norm") == "gradient norm of the denoiser"
    assert label("held_out_psnr") == "held-out PSNR" and label("loss") == "loss"
    assert label("images_per_second") == "images per second" and label("lr") == "learning rate"
