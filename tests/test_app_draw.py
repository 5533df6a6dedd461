"""Drawing for the page: seeds, previews, cancelling, LoRA, and what lands on the disk."""

import gc
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.app_draw import Studio, find_loras, fit, mask_of
from pipelines.app_settings import Settings
from pipelines.lora.files import LoraFile, write_lora
from pipelines.picture_files import read_settings
from pipelines.text_to_image import TextToImagePipeline
from tests import families, lora_made

ASKED = Settings("a red apple", "", None, 3, 3.0, 5, 16, 16)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("app")
    stock = families.sd()
    layers = {"unet": lora_made.layers(stock.unet, lora_made.UNET)}
    write_lora(folder / "loras" / "style.safetensors", LoraFile(layers), "diffusers", base="sd15", names={})
    loras = find_loras(folder / "loras")
    return Studio(TextToImagePipeline.from_diffusers(stock), folder / "pictures", loras, model="tiny")


def draw(studio: Studio, settings: Settings, **shown) -> list[np.ndarray]:
    *_, last = studio.draw(settings, **shown)
    return [np.asarray(Image.open(file)) for file, _ in last.files]


def test_a_picture_is_its_seed_and_nothing_else(studio: Studio):
    both, other = draw(studio, replace(ASKED, pictures=2)), draw(studio, replace(ASKED, seed=6))
    assert both[0].std() > 5 and not np.array_equal(both[0], both[1])
    np.testing.assert_allclose(both[1].astype(int), other[0].astype(int), atol=1)  # a batch may round otherwise
    again = draw(studio, replace(ASKED, seed=6))
    np.testing.assert_array_equal(again[0], other[0])


def test_steps_are_told_with_previews(studio: Studio, monkeypatch):
    monkeypatch.setattr("pipelines.app_draw.PREVIEW_EVERY", 0)
    monkeypatch.setattr("pipelines.app_draw.queue.Queue.empty", lambda _: True)  # every step, however slow the reader
    told = list(studio.draw(replace(ASKED, pictures=2)))
    assert [(x.done, x.steps, x.preview is not None) for x in told] == [
        (0, 3, False), (1, 3, True), (2, 3, True), (3, 3, True), (3, 3, False),
    ]  # fmt: skip
    assert told[1].preview is not None and told[1].preview.size == (32, 16)  # two pictures, side by side


def test_the_png_says_how_it_was_made(studio: Studio):
    *_, last = studio.draw(replace(ASKED, pictures=2, negative_prompt="blue", sampler="euler"))
    file, settings = last.files[1]
    assert file.parent == studio.pictures and settings.seed == 6
    found = read_settings(file)
    assert found == {
        "model": "tiny", "prompt": "a red apple", "negative_prompt": "blue", "sampler": "euler", "guidance_scale": 3.0,
        "num_inference_steps": 3, "seed": 6, "width": 16, "height": 16, "pictures": 1, "mode": "text",
        "long_prompt": "chunk", "dtype": "fp32",
    }  # fmt: skip


def test_closing_stops_within_a_step(studio: Studio):
    calls = []
    hook = studio.pipe.net.register_forward_pre_hook(lambda *_: calls.append(time.sleep(0.01)))
    try:
        before = set(studio.pictures.iterdir())
        steps = studio.draw(replace(ASKED, num_inference_steps=500))
        while next(steps).done < 2:
            pass
        steps.close()
        called = len(calls)
        assert called < 100
        time.sleep(0.1)
        assert len(calls) == called  # and no thread draws on
        assert set(studio.pictures.iterdir()) == before
    finally:
        hook.remove()
    assert draw(studio, ASKED)[0].std() > 5  # the pipeline is free, and whole


def test_one_job_at_a_time(studio: Studio):
    """Also where two are asked for at once, and where a reader goes away without a word."""
    inside, most = [], []

    def enter(*_: object) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)

    def leave(*_: object) -> None:
        inside.pop()

    hook, after = studio.pipe.net.register_forward_pre_hook(enter), studio.pipe.net.register_forward_hook(leave)
    try:
        threads = [threading.Thread(target=draw, args=(studio, replace(ASKED, seed=i))) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(most) == 1
        left = studio.draw(ASKED)
        next(left)
        del left
        gc.collect()
        assert draw(studio, ASKED)
    finally:
        hook.remove()
        after.remove()


def test_lora_acts_by_its_weight_and_leaves_no_trace(studio: Studio):
    plain = draw(studio, ASKED)[0]
    half, full = (draw(studio, replace(ASKED, loras={"style.safetensors": w}))[0] for w in (0.5, 1.0))
    assert not np.array_equal(plain, half) and not np.array_equal(half, full)
    np.testing.assert_array_equal(draw(studio, ASKED)[0], plain)


def test_what_the_pipeline_refuses_reaches_the_reader(studio: Studio):
    with pytest.raises(ValueError, match="width"):
        list(studio.draw(replace(ASKED, width=15)))
    with pytest.raises(ValueError, match="Picture: there is none"):
        list(studio.draw(replace(ASKED, mode="image", strength=0.5)))
    blank = Image.new("L", (16, 16), 0)
    with pytest.raises(ValueError, match="nothing is painted"):
        list(studio.draw(replace(ASKED, mode="inpaint", strength=1.0), Image.new("RGB", (16, 16)), blank))


def test_image_to_image_stays_nearer_where_strength_is_low(studio: Studio):
    shown = Image.fromarray((torch.rand(16, 16, 3) * 255).byte().numpy())
    asked = replace(ASKED, mode="image", num_inference_steps=20)
    own, low, high = (draw(studio, replace(asked, strength=s), image=shown)[0] for s in (0.05, 0.1, 1.0))
    assert np.abs(low - own.astype(float)).mean() < np.abs(high - own.astype(float)).mean()


def test_inpainting_changes_what_was_painted(studio: Studio):
    shown = Image.new("RGB", (32, 32), "red")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    asked = replace(ASKED, mode="inpaint", strength=1.0, width=32, height=32)
    one, other = (draw(studio, replace(asked, seed=seed), image=shown, mask=mask)[0].astype(float) for seed in (1, 2))
    changed = np.abs(one - other).mean((0, 2))
    assert changed[:12].mean() > 4 * changed[20:].mean()


def test_pictures_are_turned_upright_put_on_white_and_cut():
    photo = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    exif = photo.getexif()
    exif[0x0112] = 6  # lies on its side
    photo.info["exif"] = exif.tobytes()
    done = fit(photo, (8, 16))
    assert done.size == (8, 16) and done.mode == "RGB" and done.getpixel((4, 4)) == (255, 255, 255)


def test_a_mask_is_what_was_painted():
    layer = Image.new("RGBA", (4, 2))
    layer.putpixel((1, 0), (0, 0, 0, 9))
    assert np.asarray(mask_of([None, layer], (4, 2))).tolist() == [[0, 255, 0, 0], [0, 0, 0, 0]]


def test_loras_are_found_below_their_folder_alone(tmp_path: Path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("in/a.safetensors", "in/deep/b.safetensors", "in/notes.txt", "out.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "in" / "c.safetensors").symlink_to(tmp_path / "out.safetensors")
    assert list(find_loras(tmp_path / "in")) == ["a.safetensors", "deep/b.safetensors"]
    for folder in ("none", "in/deep/b.safetensors"):
        with pytest.raises(ValueError, match="no such folder"):
            find_loras(tmp_path / folder)
