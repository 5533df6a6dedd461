"""What the page does when a button is pressed: one job at a time on the pipeline, with previews, stopped on wish."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.sampling import SAMPLERS

from .app_settings import LONG_PROMPT, Limits, Settings
from .card_defaults import sampling_defaults
from .outputs import write_or_keep
from .picture_files import save_png
from .precision import dtype_name
from .preview import LinearPreview, fit_preview
from .text_to_image import TextToImagePipeline

PREVIEW_EVERY = 0.25  # seconds at least from one preview to the next: each waits for the device


@dataclass
class Step:
    """Where a job is, with its newest preview. At its end ``files`` are the pictures, one for each seed."""

    done: int
    steps: int
    preview: Image.Image | None = None
    files: list[tuple[Path, Settings]] = field(default_factory=list)


class Studio:
    """A pipeline, its LoRA files, and the folder of what it draws.

    Args:
        pictures: folder to write to, made where it is not there.
        loras: name -> file or folder.
        model: its folder or hub name, as the PNG files say it; its card says the steps and guidance to start with.
        chosen: name in ``loras`` that the form starts with, and whose card comes first.
        embeddings: files of new tokens that ``pipe`` has loaded, for the PNG files.
        max_side, max_pictures: of one request.
    """

    def __init__(
        self,
        pipe: TextToImagePipeline,
        pictures: Path,
        loras: Mapping[str, Path] | None = None,
        *,
        model: str | None = None,
        chosen: str = "",
        embeddings: Sequence[str] = (),
        max_side: int = 2048,
        max_pictures: int = 8,
    ):
        self.pipe, self.loras, self.model = pipe, dict(loras or {}), model
        self.pictures = pictures.resolve()  # the page's server gives out files by absolute names alone
        self.limits = Limits(
            pipe.vae.factor, tuple(SAMPLERS), tuple(self.loras), max_side=max_side, max_pictures=max_pictures
        )
        self.preview: LinearPreview = fit_preview(pipe.vae)
        self.chosen, self.embeddings = chosen, list(embeddings)
        adapters = [*([self.loras[chosen]] if chosen else []), *embeddings]
        self.steps, self.guidance = sampling_defaults(model or "", pipe.defaults[pipe.text.family], adapters)
        self.size = pipe.parts.size  # height, width
        self._loaded: dict[str, str] = {}
        self._one_at_a_time = threading.Lock()
        self.pictures.mkdir(parents=True, exist_ok=True)
        pipe.set_progress_bar_config(disable=True)

    def draw(
        self, settings: Settings, image: Image.Image | None = None, mask: Image.Image | None = None
    ) -> Iterator[Step]:
        """Draw in a thread, and tell of it. A caller who closes the iterator stops the drawing within a step.

        Args:
            image: to start from, in the modes ``image`` and ``inpaint``; cut to the size that is asked for.
            mask: white where something new is wanted, as large as ``image``.
        Raises:
            ValueError: what the pipeline says of its arguments; no image, or no mask, where one is needed.
        """
        extra = self._shown(settings, image, mask)
        said: queue.Queue[Step | BaseException] = queue.Queue()
        stop = threading.Event()
        with self._one_at_a_time:
            thread = threading.Thread(target=self._work, args=(settings, extra, said, stop), daemon=True)
            thread.start()
            try:
                while True:
                    told = said.get()
                    while not told_last(told) and not said.empty():  # a slow reader sees the newest
                        told = said.get()
                    if isinstance(told, BaseException):
                        raise told
                    yield told
                    if told.files:
                        return
            finally:
                stop.set()
                thread.join()

    def _work(self, settings: Settings, extra: dict[str, Any], said: queue.Queue, stop: threading.Event) -> None:
        try:
            said.put(Step(0, settings.num_inference_steps))
            self._choose(settings.loras or {})
            shown, picture = 0.0, None

            def on_step(pipe: Any, i: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
                nonlocal shown, picture
                if stop.is_set():
                    pipe._interrupt = True
                if time.monotonic() - shown > PREVIEW_EVERY:
                    picture, shown = self._thumbnails(tensors["denoised"]), time.monotonic()
                said.put(Step(i + 1, pipe.num_timesteps, picture))
                return {}

            seeds = [settings.of_picture(i).seed for i in range(settings.pictures)]
            pictures = self._pipeline(settings.mode)(
                prompt=[settings.prompt] * settings.pictures,
                negative_prompt=settings.negative_prompt or None,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                sampler=settings.sampler,
                weighting=settings.weighting,
                long_prompt=LONG_PROMPT,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=on_step,
                callback_on_step_end_tensor_inputs=["denoised"],
                **extra,
            ).images
            if not stop.is_set():
                files = [self._save(picture, settings.of_picture(i)) for i, picture in enumerate(pictures)]
                said.put(Step(settings.num_inference_steps, settings.num_inference_steps, None, files))
        except BaseException as error:
            said.put(error)

    def _pipeline(self, mode: str) -> Any:
        if mode == "text":
            return self.pipe
        from .image_to_image import ImageToImagePipeline
        from .inpaint import InpaintPipeline

        pipe = (InpaintPipeline if mode == "inpaint" else ImageToImagePipeline).from_parts(self.pipe.parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _shown(self, settings: Settings, image: Image.Image | None, mask: Image.Image | None) -> dict[str, Any]:
        """The arguments that the modes do not share."""
        size = settings.width, settings.height
        if settings.mode == "text":
            return {"width": size[0], "height": size[1]}
        if image is None:
            raise ValueError("Picture: there is none; drop one into the field")
        shown: dict[str, Any] = {"image": fit(image, size), "strength": settings.strength}
        if settings.mode == "inpaint":
            if mask is None or mask.getbbox() is None:
                raise ValueError("Mask: nothing is painted; paint over what is to be drawn anew")
            shown["mask_image"] = ImageOps.fit(mask.convert("L"), size, Image.Resampling.NEAREST)
            shown |= {"width": size[0], "height": size[1]}
        return shown

    def _choose(self, weights: Mapping[str, float]) -> None:
        """Let these LoRA act, and no other; each file is read when it is first asked for."""
        for name in weights:
            if name not in self._loaded:
                adapter = f"page_{len(self._loaded)}"
                self.pipe.load_lora_weights(self.loras[name], adapter)
                self._loaded[name] = adapter
        self.pipe.set_adapters([self._loaded[name] for name in weights], list(weights.values()))

    def _thumbnails(self, latents: Tensor) -> Image.Image:
        """(B, C, h, w) -> one picture of all, side by side."""
        spread = latents.float().std(dim=(1, 2, 3), keepdim=True)  # far above 1 at the start of some paths
        rgb = self.preview(latents / spread.clamp(min=1))
        row = rgb.permute(2, 0, 3, 1).flatten(1, 2)  # (h, B w, 3)
        small = Image.fromarray((row * 255).round().byte().cpu().numpy())
        scale = max(1, min(self.pipe.vae.factor, 1024 // small.width))
        return small.resize((small.width * scale, small.height * scale), Image.Resampling.BICUBIC)

    def _save(self, picture: Image.Image, settings: Settings) -> tuple[Path, Settings]:
        """Under a name that nobody chose: the time, the seed, and what makes it the only one."""
        name = f"{time.strftime('%Y%m%d_%H%M%S')}_{settings.seed}_{secrets.token_hex(4)}.png"
        path = self.pictures / name
        written = {"dtype": dtype_name(self.pipe.net.dtype), **settings.written()}
        stored = {"model": self.model, "embeddings": self.embeddings or None, **written}
        return write_or_keep(path, lambda file: save_png(picture, file, stored), suffix=".png"), settings


def told_last(told: Step | BaseException) -> bool:
    return isinstance(told, BaseException) or bool(told.files)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Upright, on white where it is transparent, and cut in the middle to (width, height)."""
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def mask_of(layers: list[Image.Image | None], size: tuple[int, int]) -> Image.Image:
    """What was painted in the editor, whatever its colour: white, on black, (width, height) as the picture."""
    mask = Image.new("L", size, 0)
    for layer in layers:
        if layer is not None and layer.size == size:
            mask.paste(255, mask=layer.convert("RGBA").getchannel("A").point([0] + [255] * 255))
    return mask


def find_loras(folder: Path) -> dict[str, Path]:
    """Name -> file, of all LoRA files below ``folder``; links that lead out of it are not followed.

    Raises:
        ValueError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise ValueError(f"--loras {folder}: no such folder")
    root = folder.resolve()
    files = [x for x in sorted(root.rglob("*.safetensors")) if x.resolve().is_relative_to(root)]
    if not files:
        raise ValueError(f"--loras {folder}: no .safetensors file in it")
    return {str(file.relative_to(root)): file for file in files}
