"""Does it draw what it was asked for? Every prompt is drawn, and a judge that had no part in training looks.

The judge's features of a drawing are compared with those of all real pictures: the share of prompts whose own
picture is the nearest, and among the five nearest, with bootstrap intervals (``metrics.retrieval``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from .features import extract, load_features, to_unit
from .grids import picture_grid
from .metrics import Retrieval, retrieval

if TYPE_CHECKING:
    from ..data import Split

log = logging.getLogger(__name__)
SHOWN = 16  # prompts in the grids
BLANK = 0.02  # a picture whose values deviate by less than this shows nothing


class Rows(Protocol):
    """What is needed of a data set: see ``training.data.open_rows``."""

    @property
    def captions(self) -> Sequence[str]: ...

    def pictures(self, indices: Any, /) -> Tensor: ...


Draw = Callable[[list[str], list[int]], Tensor]  # prompts, one seed each -> (B, 3, H, W) float in [0, 1] or uint8
Progress = Callable[[int, int], None]  # pictures drawn, of how many


@dataclass(frozen=True)
class Judged:
    """``retrieval`` of N drawings, ``prompts`` (N / samples_per_prompt of them), ``shown``: some prompts' numbers
    with their ``drawings`` (one of each), ``blank``: how many of the N show nothing."""

    retrieval: Retrieval
    prompts: list[str]
    shown: list[int]
    drawings: Tensor
    blank: int


def judge(
    draw: Draw,
    rows: Rows,
    features: nn.Module,
    *,
    seed: int,
    samples_per_prompt: int = 1,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Judged:
    """Draw each different caption of ``rows`` and rank all concepts by their nearness to the drawing.

    Rows with equal captions are one concept. Picture j of prompt i is drawn with the seed
    ``seed + i * samples_per_prompt + j``, whatever the batch size.

    Raises:
        ValueError: no rows, or sizes below 1.
    """
    if samples_per_prompt < 1 or batch_size < 1:
        raise ValueError(f"samples_per_prompt={samples_per_prompt}, batch_size={batch_size}: both must be at least 1")
    captions = list(rows.captions)
    if not captions:
        raise ValueError("the data set has no rows to evaluate on")
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}  # prompt -> concept
    prompts = list(number)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    shown = sorted(order[:SHOWN])

    real = [  # in batches: the pictures of a large set need not fit into memory at once
        extract(features, rows.pictures(list(range(i, min(i + batch_size, len(captions))))), batch_size)
        for i in range(0, len(captions), batch_size)
    ]
    fake: list[Tensor] = []
    drawings: dict[int, Tensor] = {}
    blank = 0
    total = len(prompts) * samples_per_prompt
    for start in range(0, total, batch_size):
        jobs = range(start, min(start + batch_size, total))
        pictures = to_unit(draw([prompts[j // samples_per_prompt] for j in jobs], [seed + j for j in jobs]).cpu())
        if len(pictures) != len(jobs):
            raise ValueError(f"the pipeline made {len(pictures)} pictures for {len(jobs)} prompts")
        fake.append(extract(features, pictures, batch_size))
        blank += int((pictures.std((1, 2, 3)) < BLANK).sum())
        for j, picture in zip(jobs, pictures, strict=True):
            if j % samples_per_prompt == 0 and j // samples_per_prompt in shown:
                drawings[j // samples_per_prompt] = picture
        if progress:
            progress(jobs[-1] + 1, total)
    labels = torch.arange(total) // samples_per_prompt
    result = retrieval(torch.cat(fake), torch.cat(real), labels, torch.tensor([number[c] for c in captions]))
    return Judged(result, prompts, shown, torch.stack([drawings[i] for i in shown]), blank)


def evaluate_retrieval(
    pipeline_folder: str | Path,
    data_path: str | Path,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    samples_per_prompt: int = 1,
    batch_size: int = 16,
    out: str | Path,
    split: Split = "train",
    image_column: str = "image",
    caption_column: str = "text",
    features: str = "mobilenetv2",
    device: str | torch.device | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw every prompt of a data set with a pipeline and have the drawings judged.

    Writes into the folder ``out``: ``evaluation.json`` (the returned values, and each prompt's ranks, 1 = hit),
    ``samples.png`` (16 prompts chosen by the seed) and ``samples_unlabelled.png`` (the same without captions, for a
    person who is to say what they show). Files of these names are replaced.

    Args:
        pipeline_folder: as a run exports it.
        data_path: an imagefolder or parquet, as for training.
        num_inference_steps: of the sampler.
        guidance_scale: classifier-free guidance; 1 is none.
        samples_per_prompt: drawings of each prompt; the intervals count prompts.
        features: the judge, a name in ``features.FEATURES``.
        device: left out, CUDA where there is one.
        dtype: of the pipeline's weights, as ``pipelines.precision.sampling_dtype`` takes it.
        progress: called with (pictures drawn, of how many) after each batch.
    Raises:
        ValueError: no such folder, no judge, no rows (DataError).
    """
    from pipelines.precision import dtype_name, sampling_dtype
    from pipelines.text_to_image import TextToImagePipeline

    from ..data import open_rows

    net = load_features(features)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = sampling_dtype(device, dtype)
    pipeline: Any = TextToImagePipeline.from_pretrained(pipeline_folder, dtype=kind).to(device)
    pipeline.set_progress_bar_config(disable=True)
    rows = open_rows(
        data_path,
        split=split,
        image_column=image_column,
        caption_column=caption_column,
        resolution=min(pipeline.parts.size),
    )

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        return pipeline(
            prompts,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(s) for s in seeds],  # on the CPU: the same noise on any device
            output_type="pt",
        ).images

    out = Path(out)
    asked = {
        "samples_per_prompt": samples_per_prompt,
        "split": split,
        "judge": features,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "pipeline": str(pipeline_folder),
        "weights": weights_of(Path(pipeline_folder)),
        "data": str(data_path),
        "pictures": rows.fingerprint,
    }
    if kind != torch.float32:  # what was evaluated in float32 is taken up as before
        asked["dtype"] = dtype_name(kind)
    earlier = _earlier(out, asked)
    if earlier is not None:
        log.info("%s: already evaluated, taken up", out / "evaluation.json")
        return earlier
    judged = judge(
        draw,
        rows,
        net.to(device),
        seed=seed,
        samples_per_prompt=samples_per_prompt,
        batch_size=batch_size,
        progress=progress,
    )
    found, count = judged.retrieval, len(judged.prompts)
    summary: dict[str, Any] = {
        "top1": found.top1,
        "top1_interval": list(found.interval(1)),
        "top5": found.top5,
        "top5_interval": list(found.interval(5)),
        "chance_top1": 1 / count,
        "chance_top5": min(1.0, 5 / count),
        "median_rank": found.ranks.double().median().item(),
        "blank_pictures": judged.blank,
        "prompts": count,
        **asked,
    }
    ranks = dict(zip(judged.prompts, found.ranks.view(count, samples_per_prompt).tolist(), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary | {"ranks": ranks}, indent=1, ensure_ascii=False)
    _replace(out / "evaluation.json", lambda beside: beside.write_text(text, encoding="utf-8"))
    names = [judged.prompts[i] for i in judged.shown]
    _save(picture_grid(judged.drawings, names, columns=4), out / "samples.png")
    _save(picture_grid(judged.drawings, columns=4), out / "samples_unlabelled.png")
    return summary


def weights_of(folder: Path) -> str:
    """SHA-256 over the files that decide a pipeline's pictures."""
    digest = hashlib.sha256()
    for file in sorted(x for x in folder.rglob("*") if x.suffix in (".safetensors", ".json")):
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _earlier(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The summary that is there already, if the same was asked of the same weights and pictures."""
    files = [out / name for name in ("evaluation.json", "samples.png", "samples_unlabelled.png")]
    if not all(file.is_file() for file in files):
        return None
    found = json.loads(files[0].read_text(encoding="utf-8"))
    found.pop("ranks", None)
    return found if all(found.get(key) == value for key, value in asked.items()) else None


def _save(picture: Image.Image, path: Path) -> None:
    _replace(path, lambda beside: picture.save(beside, format="PNG", optimize=True))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    write(beside)
    os.replace(beside, path)
