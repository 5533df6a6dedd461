"""Runs of the whole trainer on a base that is shown something: what it draws is what stock draws of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from pipelines.conditions import draw
from tests.adapting import CALL, base, trained
from tests.families import quiet
from training.batches import to_bytes


def pil(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray(x.permute(1, 2, 0).numpy().squeeze()) for x in pictures]


def with_hints(root: Path) -> Path:
    """The same pictures, each with itself upside down."""
    folder = root / "hinted"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        lines = []
        for line in (root / "data" / split / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            name, hint = row["file_name"], f"hint_{row['file_name']}"
            picture = Image.open(root / "data" / split / name)
            picture.save(folder / split / name)
            picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(folder / split / hint)
            lines.append(json.dumps(row | {"hint_file_name": hint}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("family", "section", "pipeline"),
    [
        ("sd", {"name": "inpaint"}, "StableDiffusionInpaintPipeline"),
        ("sdxl", {"name": "inpaint"}, "StableDiffusionXLInpaintPipeline"),
        ("sd", {"name": "image"}, "StableDiffusionInstructPix2PixPipeline"),
        ("sd", {"name": "low_resolution"}, "StableDiffusionUpscalePipeline"),
    ],
    ids=lambda x: x if isinstance(x, str) else x["name"],
)
def test_the_trainers_picture_is_the_users(
    family: str, section: dict[str, Any], pipeline: str, tmp_path_factory, monkeypatch
) -> None:
    root = tmp_path_factory.getbasetemp() / "conditioned"
    root.mkdir(exist_ok=True)
    kept: dict[str, Any] = {}

    def spy(parts: Any, prompts: list[str], pictures: Tensor, mask: Tensor | None = None, **kw: Any) -> Tensor:
        kept.update(prompts=prompts, pictures=pictures, mask=mask)
        kept["drawn"] = draw(parts, prompts, pictures, mask, **kw)
        return kept["drawn"]

    monkeypatch.setattr("training.conditioning.draw", spy)
    base(family, root)
    data = {"data": {"path": str(with_hints(root)), "hint_column": "hint"}} if section["name"] == "image" else {}
    run = trained(family, root, f"{family}_{section['name']}", conditioning=section, train={"sample_every": 6}, **data)

    pipe: Any = quiet(DiffusionPipeline.from_pretrained(run / "pipeline"))
    assert type(pipe).__name__ == pipeline
    assert pipe.unet.conv_in.weight[:, 4:].abs().mean() > 1e-3  # what was zero has learnt
    told: dict[str, Any] = {"image": pil(to_bytes(kept["pictures"]))}
    if section["name"] == "inpaint":
        side = kept["pictures"].shape[-1]
        told |= {"mask_image": pil(to_bytes(2 * kept["mask"] - 1)), "strength": 1.0, "height": side, "width": side}
    if section["name"] == "image":
        told["image_guidance_scale"] = 1.0
    if section["name"] == "low_resolution":
        told["image"] = kept["pictures"] / 2 + 0.5  # means of pixels are no whole bytes
    generators = [torch.Generator().manual_seed(i) for i in range(len(kept["prompts"]))]
    stock = pipe(kept["prompts"], generator=generators, output_type="np", **CALL, **told).images
    torch.testing.assert_close(kept["drawn"], torch.from_numpy(stock).permute(0, 3, 1, 2), atol=1e-4, rtol=0)
