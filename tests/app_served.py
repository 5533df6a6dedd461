"""The page over a tiny pipeline with random weights, served in this process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.app import serve
from pipelines.app_draw import Studio, find_loras
from pipelines.lora.files import LoraFile, write_lora
from pipelines.text_to_image import TextToImagePipeline
from tests import families, lora_made

KEPT = ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "GRADIO_ANALYTICS_ENABLED")
PASSWORD = "correct horse"


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[tuple[Any, Studio, Path]]:
    """(page, studio, the folder that it may write to); the page gets a relative path, as by default."""
    before, temporary = {name: os.environ.get(name) for name in KEPT}, tempfile.tempdir
    stock = families.sd()
    file = LoraFile({"unet": lora_made.layers(stock.unet, lora_made.UNET)})
    write_lora(folder / "loras" / "style.safetensors", file, "diffusers", base="sd15", names={})
    out = folder / "out"
    relative = Path(os.path.relpath(out))
    pipe = TextToImagePipeline.from_diffusers(stock)
    studio = Studio(pipe, relative / "pictures", find_loras(folder / "loras"), model="tiny")
    page = serve(studio, relative, title="tiny", **options)
    try:
        yield page, studio, out
    finally:
        page.close()
        tempfile.tempdir = temporary
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def slowed(studio: Studio, seconds: float) -> Iterator[list[float]]:
    """Each call of the network takes so long; their times are given back."""
    calls: list[float] = []

    def wait(*_: object) -> None:
        time.sleep(seconds)
        calls.append(time.monotonic())

    hook = studio.pipe.net.register_forward_pre_hook(wait)
    try:
        yield calls
    finally:
        hook.remove()


def address(page: Any) -> tuple[str, int]:
    parts = urlsplit(page.local_url)
    return str(parts.hostname), int(parts.port or 80)
