"""Drawing what is to be judged: picture i from prompt i and the seed + i, one file each; what is there is kept."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipelines.core import Parts
from pipelines.folder import load_parts
from pipelines.precision import dtype_name, sampling_dtype

from .grids import to_pil
from .measures_data import Drawn, Progress, Prompt
from .retrieval import weights_of


class Painter:
    """A pipeline, and how it is asked to draw; ``dtype`` as ``sampling_dtype`` takes it."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        steps: int,
        guidance_scale: float,
        sampler: str | None,
        dtype: str | None = None,
    ):
        from ldm.sampling import SAMPLERS
        from pipelines.text_to_image import TextToImagePipeline

        if sampler is not None and sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
        self.folder, self.device, self.dtype = folder, device, sampling_dtype(device, dtype)
        self.weights = weights_of(folder)
        self.pipeline: Any = TextToImagePipeline.from_pretrained(folder, dtype=self.dtype).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}

    def in_float32(self) -> Parts:
        """The folder's parts on the device, in which a loss or a likelihood keeps its digits."""
        if self.dtype == torch.float32:
            return self.pipeline.parts
        parts = load_parts(self.folder)
        for part in (parts.net, parts.vae, parts.text):
            part.to(self.device)
        return parts

    def draw(
        self, order: Sequence[Prompt], count: int, seed: int, batch_size: int, place: Path, progress: Progress
    ) -> tuple[Drawn, Path]:
        """``count`` pictures of the prompts in ``order``, round and round, into a folder of ``place`` that is named by
        the weights and all that is asked: stopped and begun again, it goes on; asked for more, it draws the rest; asked
        for anything else, it takes another folder.

        It is an imagefolder with the prompts as captions. ``log.jsonl`` in it says how long each batch took.
        """
        asked = {"weights": self.weights, "seed": seed, "size": self.pipeline.parts.size, **self.call}
        asked["prompts"] = hashlib.sha256("\0".join(x.text for x in order).encode()).hexdigest()
        if self.dtype != torch.float32:  # those in float32 keep the folder names that they had
            asked["dtype"] = dtype_name(self.dtype)
        prompts = [order[i % len(order)] for i in range(count)]
        name = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:12]
        folder = place / name
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "asked.json", json.dumps(asked, indent=1, default=str).encode())
        files = [folder / f"{i:06d}.png" for i in range(len(prompts))]
        table = [
            json.dumps({"file_name": f.name, "text": p.text}, ensure_ascii=False)
            for f, p in zip(files, prompts, strict=True)
        ]
        known = folder / "metadata.jsonl"
        if not known.is_file() or len(known.read_text(encoding="utf-8").splitlines()) < len(table):
            _write(known, "".join(line + "\n" for line in table).encode())
        missing = [i for i, file in enumerate(files) if not file.is_file()]
        for first in range(0, len(missing), batch_size):
            some = missing[first : first + batch_size]
            start = time.perf_counter()
            pictures = self.pipeline(
                [prompts[i].text for i in some],
                generator=[torch.Generator().manual_seed(seed + i) for i in some],  # the same noise on any device
                output_type="pt",
                **self.call,
            ).images.cpu()
            seconds = time.perf_counter() - start
            for i, picture in zip(some, to_pil(pictures), strict=True):
                _save(files[i], picture)
            line = {"pictures": len(some), "seconds": seconds, "device": device_name(self.device), "first": first == 0}
            with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            progress("drawing", len(files) - len(missing) + first + len(some), len(files))
        return Drawn(files, prompts), folder


def speeds(folder: Path, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and seconds of the batches that were drawn on such a device, without those that each process began with,
    which warm up, where there are others."""
    file = folder / "log.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = []
    for line in lines:
        with suppress(ValueError):  # one that was stopped may have left half a line, with the next one behind it
            rows.append(json.loads(line))
    rows = [x for x in rows if x["device"] == device_name(device)]
    rows = [x for x in rows if not x["first"]] or rows
    return torch.tensor([x["pictures"] for x in rows]), torch.tensor([x["seconds"] for x in rows])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _save(file: Path, picture: Image.Image) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    picture.save(beside, format="PNG")
    os.replace(beside, file)


def _write(file: Path, content: bytes) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, file)
