"""The settings in a PNG: they come back, and nothing that somebody else put there does harm."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.picture_files import digest, read_settings, save_png

SETTINGS: dict[str, Any] = {
    "model": "outputs/demo/pipeline", "prompt": 'a (red:1.3) apple, 苹果 🍎 "quoted"\nand a line \0 \ud800', "seed": 7,
    "pictures": 4, "index": 2, "num_inference_steps": 20, "guidance_scale": 3.5, "sampler": "dpmpp_2m", "height": 32,
    "width": 16, "negative_prompt": "blue", "weighting": True, "loras": {"runs/toy.safetensors": 0.8},
    "guidance": [{"name": "apg", "eta": 0.5}, "interval"], "digests": {"model": "0123456789abcdef"},
    "versions": {"ldm": "0.1.0"}, "of_a_later_version": [1, 2],
}  # fmt: skip


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((16, 32)).convert("RGB")


def test_settings_come_back_and_the_picture_is_what_it_was(tmp_path: Path):
    save_png(picture(), tmp_path / "a.png", SETTINGS | {"image": None})
    assert read_settings(tmp_path / "a.png") == SETTINGS
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.tobytes() == picture().tobytes()
        shown = opened.info["parameters"]
    first, *others = shown.split("\n")
    assert first.startswith("a (red:1.3) apple, 苹果 🍎") and "Negative prompt: blue" in others
    assert others[-1] == (
        "Steps: 20, Sampler: dpmpp_2m, CFG scale: 3.5, Seed: 9, Size: 16x32, Model hash: 0123456789, Model: pipeline, "
        "Lora: toy:0.8, Version: 0.1.0"
    )


def test_null_is_as_good_as_left_out(tmp_path: Path):
    assert read_settings(written(tmp_path / "a.png", '{"loras": null, "seed": 3}')) == {"seed": 3}


def test_settings_that_cannot_be_written(tmp_path: Path):
    for wrong, message in (
        ({"seed": "7"}, "seed is '7'"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"more": {1, 2}}, "JSON cannot write"),
    ):
        with pytest.raises(ValueError, match=message):
            save_png(picture(), tmp_path / "a.png", wrong)
    assert not (tmp_path / "a.png").exists()


def written(path: Path, text: str | None, key: str = "ldm", compressed: bool = False) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text(key, text, zip=compressed)
    picture().save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there are no settings in it"),
        ('{"seed": 7', "damaged, they are not JSON"),
        ("[" * 100_000, "damaged, they are not JSON"),
        ('{"seed": ' + "9" * 10_000 + "}", "damaged, they are not JSON"),
        ("[1]", r"damaged: \[1\], expected a JSON object"),
        ('{"seed": "seven"}', "its settings: seed is 'seven': Input should be a valid integer"),
        ('{"seed": -1}', "seed is -1"),
        ('{"pictures": 1.5}', "pictures is 1.5"),
        ('{"num_inference_steps": true}', "num_inference_steps is True"),
        ('{"prompt": ["a"]}', "prompt is"),
        ('{"guidance_scale": NaN}', "guidance_scale is nan"),
        ('{"loras": {"a": "b"}}', "loras.a is 'b'"),
        ('{"model": {"$ref": "x"}}', "model is"),
        ('{"prompt": "' + "a" * 2**20 + '"}', r"a text of 1,048,\d+ bytes; settings have at most 1,048,576"),
    ],
)
def test_what_is_damaged_or_hostile_is_one_clear_error(tmp_path: Path, text: str | None, message: str):
    file = written(tmp_path / "a.png", text)
    with pytest.raises(ValueError, match=message) as caught:
        read_settings(file)
    assert str(caught.value).startswith(str(file)) and len(str(caught.value)) < 400


def test_other_files(tmp_path: Path):
    bomb = written(tmp_path / "bomb.png", '{"prompt": "' + "a" * 50_000_000 + '"}', compressed=True)
    assert bomb.stat().st_size < 200_000
    jpeg, cut, foreign, huge = (tmp_path / name for name in ("a.jpg", "cut.png", "foreign.png", "huge.png"))
    picture().save(jpeg)
    cut.write_bytes(written(tmp_path / "a.png", json.dumps(SETTINGS)).read_bytes()[:60])
    written(foreign, "a cat\nSteps: 20", key="parameters")  # A1111's own
    body = b"IHDR" + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    huge.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)))
    for file, message in (
        (bomb, "Decompressed data too large|too large"), (jpeg, "no settings in it"), (cut, "cut.png: "),
        (foreign, "no settings in it"), (huge, "huge.png: "), (tmp_path / "gone.png", "no such picture file"),
        (tmp_path, "no such picture file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_settings(file)


def test_digest_sees_what_draws_and_nothing_else(tmp_path: Path):
    folder = tmp_path / "pipeline"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"unet": ["diffusers", "X"], "_class_name": "Y"}')
    weights = folder / "unet" / "model.safetensors"
    weights.write_bytes(bytes(1000))
    base = digest(folder)
    (folder / "README.md").write_text("a card")
    (folder / "cache").mkdir()
    (folder / "cache" / "more.safetensors").write_bytes(b"1")
    assert digest(folder) == base and digest(weights) == digest(weights)
    seen = {base, digest(weights)}
    weights.write_bytes(bytes(999) + b"1")
    seen.add(digest(folder))
    (folder / "unet" / "config.json").write_text("{}")
    seen.add(digest(folder))
    assert len(seen) == 4
    with weights.open("wb") as large:  # 100 MB that are on no disk
        large.truncate(100_000_000)
    sparse = digest(folder)
    with weights.open("r+b") as large:
        large.seek(-1, 2)
        large.write(b"1")
    assert digest(folder) != sparse
    for nothing in (tmp_path / "gone", folder / "cache" / "x"):
        with pytest.raises(ValueError, match="no such file or folder"):
            digest(nothing)
    with pytest.raises(ValueError, match="no safetensors and configs"):
        digest(_empty(tmp_path))


def _empty(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"
