"""`ldm sample`: pictures that it draws again from their own settings, bit for bit, and what it refuses."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.paths import RectifiedFlow
from ldm.prediction import Flow
from pipelines.card_defaults import sampling_defaults
from pipelines.core import Parts
from pipelines.folder import save_parts
from pipelines.lora.files import write_lora
from pipelines.picture_files import read_settings, save_png
from pipelines.schedulers import default_schedule
from tests import lora_made, tiny
from training import cli, cli_sample
from training.run_folder import model_of

Ldm = Callable[..., "Said"]


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def ldm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ldm:
    """Run the command line in this process. An exception that is not a message fails the test with its traceback."""
    monkeypatch.setenv("COLUMNS", "400")  # no line is broken
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["ldm", "sample", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        return Said(code, *capsys.readouterr())

    return run


def refused(said: Said, *words: str) -> None:
    assert said.code == 2 and said.err.startswith("ldm: "), said
    for word in words:
        assert word in said.err, (word, said.err)


def save(folder: Path, seed: int = 3) -> Path:
    schedule = default_schedule(RectifiedFlow(), Flow(), "sd", 1.0)
    save_parts(folder, Parts(tiny.randomize(tiny.unet(), seed), tiny.vae(), tiny.text("sd"), schedule))
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("made") / "pipeline")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


# --- one, a grid, a folder -------------------------------------------------------------------------------------------


def test_writes_the_same_picture_twice(ldm: Ldm, pipeline: Path, tmp_path: Path) -> None:
    drawn = []
    for name in ("one.png", "two.png"):
        out = tmp_path / "new" / name
        said = ldm(pipeline, "a red circle", "-n", 4, "--seed", 7, "--steps", 3, "-o", out)
        assert said.code == 0 and said.out.strip() == str(out), said
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1]
    with Image.open(tmp_path / "new/one.png") as sheet:
        assert sheet.size == (8 + 2 * (16 + 8), 8 + 2 * (16 + 8))  # 2 x 2 pictures of 16 px
        second = np.asarray(sheet.crop((32, 8, 48, 24))).astype(int)
    alone = tmp_path / "alone.png"
    assert ldm(pipeline, "a red circle", "--seed", 8, "--steps", 3, "-o", alone).code == 0
    assert pixels(alone).shape == (16, 16, 3)  # picture i of seed s is that of seed s + i, but for a batch's rounding
    assert abs(pixels(alone) - second).max() <= 1
    assert ldm(pipeline, "a red circle", "--seed", 9, "--steps", 3, "-o", alone).code == 0
    assert abs(pixels(alone) - second).max() > 16


def test_a_folder_gets_each_picture_and_loses_none(ldm: Ldm, pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    how = (pipeline, "zebra", "-n", 3, "--seed", 4, "--steps", 2, "-o", out)
    assert ldm(*how).out.split() == [str(out / f"{seed}.png") for seed in (4, 5, 6)]
    assert ldm(*how).out.split() == [str(out / f"{seed}-2.png") for seed in (4, 5, 6)]
    assert (out / "5.png").read_bytes() == (out / "5-2.png").read_bytes() != (out / "6.png").read_bytes()
    again = tmp_path / "again.png"
    assert ldm("--from", out / "5.png", "-o", again).code == 0  # out of its batch
    assert again.read_bytes() == (out / "5.png").read_bytes()
    assert ldm("--from", out / "5.png", "-n", 1, "-o", again).code == 0  # by itself
    assert read_settings(again)["seed"] == 5 and "index" not in read_settings(again)
    assert abs(pixels(again) - pixels(out / "5.png")).max() <= 1
    assert ldm("--from", out / "5.png", "--seed", 6, "-o", again).code == 0
    assert abs(pixels(again) - pixels(out / "6.png")).max() <= 1
    jpeg = tmp_path / "a.jpg"
    assert ldm(*how[:-1], jpeg).out.strip() == str(jpeg) and jpeg.stat().st_size


# --- again -----------------------------------------------------------------------------------------------------------


def test_from_repeats_all_of_it(ldm: Ldm, pipeline: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "toy.safetensors", lora_made.lora("sd15"), "diffusers")
    options = [
        "-n", 2, "--seed", 11, "--steps", 4, "--guidance", 4.5, "--negative", "a dog", "--sampler", "euler_ancestral",
        "--height", 20, "--width", 12, "--guidance-rescale", 0.3, "--guide", "classifier_free", "--guide",
        "interval:low=0.1,high=0.9", "--long-prompt", "chunk", "--weighting", "--lora", f"{lora}:0.5",
        "--lora-from", 0.5,
    ]  # fmt: skip
    first, again, other = (tmp_path / f"{name}.png" for name in ("first", "again", "other"))
    assert ldm(pipeline, "a (red:1.4) apple " * 5, *options, "-o", first).code == 0
    found = read_settings(first)
    assert found["loras"] == {str(lora): 0.5} and set(found["digests"]) == {"model", str(lora)}
    assert (found["height"], found["width"], found["sampler"]) == (20, 12, "euler_ancestral")
    assert found["guidance"] == ["classifier_free", {"name": "interval", "low": 0.1, "high": 0.9}]
    assert ldm("--from", first, "-o", again).code == 0
    assert again.read_bytes() == first.read_bytes()
    for change in (  # the options that are not keywords of every stock call; each comes before the picture's own
        ("--sampler", "euler"),
        ("--guide", "apg", "--guidance-rescale", 0),
        ("--long-prompt", "cut"),
        ("--no-weighting",),
        ("--lora", f"{lora}:0.9"),
        ("--lora-from", 0),
        ("--lora-from", 0.75),
    ):
        assert ldm("--from", first, *change, "-o", other).code == 0, change
        assert abs(pixels(other) - pixels(first)).max() > 2, change
    changed = [
        "--seed",
        12,
        "--steps",
        1,
        "--guidance",
        2,
        "--negative",
        "a cat",
        "--height",
        16,
        "--width",
        8,
        "-n",
        1,
    ]
    assert ldm("--from", first, *changed, "-o", other).code == 0
    names = ("seed", "num_inference_steps", "guidance_scale", "negative_prompt", "height", "width", "pictures")
    assert [read_settings(other)[name] for name in names] == [12, 1, 2, "a cat", 16, 8, 1]
    assert ldm(pipeline, "zebra", "--from", first, "--steps", 1, "-o", other).code == 0
    assert read_settings(other)["prompt"] == "zebra" and read_settings(other)["seed"] == 11


def test_from_names_what_is_not_what_it_was(ldm: Ldm, tmp_path: Path) -> None:
    folder, out, again = save(tmp_path / "pipeline"), tmp_path / "out.png", tmp_path / "again.png"
    lora = write_lora(tmp_path / "toy.safetensors", lora_made.lora("sd15"), "diffusers")
    assert ldm(folder, "zebra", "--steps", 1, "--lora", lora, "-o", out).code == 0
    lora.rename(tmp_path / "moved.safetensors")
    refused(ldm("--from", out, "-o", again), str(out), f"drawn with {lora}", "not here")
    assert ldm("--from", out, "--lora", tmp_path / "moved.safetensors", "-o", again).code == 0
    assert (pixels(again) == pixels(out)).all()
    (tmp_path / "moved.safetensors").rename(lora)
    shutil.rmtree(folder)
    refused(ldm("--from", out, "-o", again), str(folder), "no folder here")
    save(folder, seed=4)
    refused(ldm("--from", out, "-o", again), str(folder), "its files have changed")
    said = ldm(folder, "--from", out, "-o", again)  # who names it wants it
    assert said.code == 0 and "was drawn with other files than those of" in " ".join(said.err.split())
    save_png(Image.new("RGB", (8, 8)), out, {"model": "owner/name", "prompt": "zebra"})
    refused(ldm("--from", out, "-o", again), "owner/name", "fetches nothing")


def test_from_a_page_of_another_version(ldm: Ldm, pipeline: Path, tmp_path: Path) -> None:
    """As the web page writes it: without a model."""
    page, again = tmp_path / "page.png", tmp_path / "again.png"
    told: dict[str, Any] = {"prompt": "zebra", "seed": 5, "num_inference_steps": 2, "versions": {"torch": "0.1"}}
    save_png(Image.new("RGB", (8, 8)), page, told | {"mode": "text"})
    said = ldm("--from", page, "-o", again)
    assert said.code == 2 and "ldm: sample: FOLDER is missing" in said.err
    assert "was drawn with torch 0.1, this is" in " ".join(said.err.split())
    assert ldm(pipeline, "--from", page, "-o", again).code == 0
    assert read_settings(again)["seed"] == 5


def test_the_precision_is_part_of_the_settings(ldm: Ldm, pipeline: Path, tmp_path: Path) -> None:
    """A picture from before it was, was drawn in float32, whatever the default of this machine is."""
    default, half, again, old = (tmp_path / f"{name}.png" for name in ("default", "half", "again", "old"))
    options = [pipeline, "zebra", "--steps", 2]
    assert ldm(*options, "-o", default).code == 0 and ldm(*options, "--dtype", "bf16", "-o", half).code == 0
    assert [read_settings(x)["dtype"] for x in (default, half)] == ["fp32", "bf16"]
    assert (pixels(default) != pixels(half)).any()
    assert ldm("--from", half, "-o", again).code == 0
    assert again.read_bytes() == half.read_bytes()
    settings = read_settings(default)
    del settings["dtype"]
    with Image.open(default) as picture:
        save_png(picture, old, settings)
    assert cli_sample._taken_up(old, {})["dtype"] == "fp32"
    assert ldm("--from", half, "--dtype", "fp32", "-o", again).code == 0
    assert again.read_bytes() == default.read_bytes()
    refused(ldm(*options, "--dtype", "fp8", "-o", again), "dtype fp8: expected one of fp32, bf16, fp16")


# --- with a picture --------------------------------------------------------------------------------------------------


def test_image_and_mask(ldm: Ldm, pipeline: Path, tmp_path: Path) -> None:
    shades = torch.linspace(0, 255, 16).expand(16, 16).to(torch.uint8).numpy()
    start, mask = tmp_path / "start.png", tmp_path / "where.png"
    Image.fromarray(shades).save(start)
    Image.fromarray((np.arange(16)[None] >= 8).repeat(16, 0)).save(mask)
    drawn = {}
    for name, more in {"image": (), "mask": ("--mask", mask), "far": ("--strength", 1.0)}.items():
        out, again = tmp_path / f"{name}.png", tmp_path / f"{name}-again.png"
        given = (pipeline, "zebra", "--image", start, "--strength", 0.5, "--steps", 4, *more)
        assert ldm(*given, "-o", out).code == 0, name
        assert ldm("--from", out, "-o", again).code == 0 and again.read_bytes() == out.read_bytes()
        drawn[name] = pixels(out)
    assert abs(drawn["image"] - drawn["far"]).max() > 2 and abs(drawn["image"] - drawn["mask"]).max() > 2
    assert set(read_settings(tmp_path / "mask.png")["digests"]) == {"model", str(start), str(mask)}
    Image.new("L", (16, 16), 9).save(start)
    refused(ldm("--from", tmp_path / "image.png", "-o", tmp_path / "x.png"), str(start), "have changed")
    Image.new("L", (8, 8)).save(mask)
    refused(ldm(pipeline, "zebra", "--image", start, "--mask", mask), str(mask), "one size")
    refused(ldm(pipeline, "zebra", "--image", start, "-o", start), "would be written over")
    start.write_text("no picture")
    refused(ldm(pipeline, "zebra", "--image", start), str(start), "does not open as a picture")


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_a_name_may_begin_with_the_users_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in --lora=~/style, which no shell resolves."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (8, 6)).save(tmp_path / "x.png")
    assert cli_sample._picture("~/x.png", "RGB").size == (8, 6) and cli_sample._lora("~/x.png") == ("~/x.png", 1.0)


def test_refuses_what_it_cannot_draw(ldm: Ldm, pipeline: Path, tmp_path: Path) -> None:
    out, nothing = tmp_path / "out.png", tmp_path / "nothing"
    nothing.mkdir()
    a_cat = (pipeline, "a cat", "--steps", 2)
    for arguments, words in (
        ((nothing, "a cat"), ("model_index.json", "no pipeline folder")),
        ((tmp_path / "gone", "a cat"), (str(tmp_path / "gone"), "no such folder")),
        ((*a_cat, "--sampler", "dimm"), ("dimm", "ddim")),
        ((*a_cat, "-o", tmp_path / "out.picture"), ("out.picture", ".png")),
        ((pipeline,), ("PROMPT is missing",)),
        ((), ("FOLDER is missing",)),
        ((*a_cat, "--strength", 0.5), ("--strength goes with --image",)),
        ((*a_cat, "--mask", out), ("--mask goes with --image",)),
        ((*a_cat, "--image", out), ("--image", "no such picture file")),
        ((*a_cat, "--guide", "apgg"), ("'apgg'", "did you mean 'apg'")),
        ((*a_cat, "--guide", "apg:eta"), ("--guide apg:eta", "KEY=NUMBER")),
        ((*a_cat, "--guide", "apg:eta=much"), ("eta is 'much'", "a number")),
        ((*a_cat, "--long-prompt", "fold"), ("--long-prompt fold", "cut, chunk, refuse")),
        ((*a_cat, "--height", 17), ("height is 17", "18")),
        ((*a_cat, "--lora", "gone.safetensors"), ("gone.safetensors", "PATH:WEIGHT")),
        ((*a_cat, "--lora-from", 0.3), ("lora_from is 0.3", "no LoRA acts on the denoiser")),
        ((pipeline, "a red apple " * 9, "--long-prompt", "refuse"), ("prompt 0 has",)),
        (("--from", tmp_path / "gone.png"), ("gone.png", "no such picture file")),
    ):
        refused(ldm(*(arguments if "-o" in arguments else (*arguments, "-o", out))), *words)
    Image.new("RGB", (8, 8)).save(out)
    refused(ldm("--from", out), str(out), "no settings in it")
    save_png(Image.new("RGB", (8, 8)), out, {"model": str(pipeline), "prompt": "a", "pictures": 2, "index": 5})
    refused(ldm("--from", out, "-o", tmp_path / "x.png"), "index is 5 of 2")
    for hostile in ("a" * 5000, "~nobody/x", "a\0b", "https://example.com/x"):  # a name that somebody sent
        save_png(Image.new("RGB", (8, 8)), out, {"model": hostile, "prompt": "a"})
        refused(ldm("--from", out, "-o", tmp_path / "x.png"), "no folder here")
        save_png(Image.new("RGB", (8, 8)), out, {"model": str(pipeline), "prompt": "a", "loras": {hostile: 1.0}})
        refused(ldm("--from", out, "-o", tmp_path / "x.png"), "which is not here")
    assert not (tmp_path / "x.png").exists() and not [*nothing.iterdir()]


# --- files, runs and defaults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["jpg", "webp"])
def test_a_jpeg_keeps_the_settings(ldm: Ldm, pipeline: Path, tmp_path: Path, end: str) -> None:
    said = ldm(pipeline, "a löwe ☃", "--steps", 1, "--seed", 7, "-o", tmp_path / f"a.{end}")
    assert said.code == 0 and "keeps no settings" not in said.err
    settings = read_settings(tmp_path / f"a.{end}")
    assert (settings["prompt"], settings["seed"], settings["num_inference_steps"]) == ("a löwe ☃", 7, 1)
    again = ldm("--from", tmp_path / f"a.{end}", "-o", tmp_path / f"b.{end}")
    assert again.code == 0, again
    assert np.array_equal(pixels(tmp_path / f"a.{end}"), pixels(tmp_path / f"b.{end}"))


def test_a_format_without_settings_says_so(ldm: Ldm, pipeline: Path, tmp_path: Path) -> None:
    said = ldm(pipeline, "", "--steps", 1, "-o", tmp_path / "a.bmp")
    assert said.code == 0 and "this format keeps no settings" in said.err and "the prompt is empty" in said.err
    with pytest.raises(ValueError, match="no settings can be read"):
        read_settings(tmp_path / "a.bmp")


def test_a_prompt_that_names_a_file_is_asked_about(ldm: Ldm, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n")
    refused(ldm("no/such/model", tmp_path / "prompts.txt"), "prompts.txt", "is the name of a file here")


def test_a_lost_target_does_not_lose_the_picture(
    ldm: Ldm, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def full(picture: Image.Image, path: Path, *arguments: Any, **options: Any) -> None:
        if Path(path).name == "a.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(picture, path, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    said = ldm(pipeline, "dog", "--steps", 1, "-o", tmp_path / "a.png")
    assert said.code == 0 and "a.png: cannot be written" in said.err
    assert said.out.strip() == str(tmp_path / "a-2.png") and read_settings(tmp_path / "a-2.png")["prompt"] == "dog"


def test_a_run_is_a_model_and_its_card_says_the_defaults(ldm: Ldm, pipeline: Path, tmp_path: Path) -> None:
    run, made = tmp_path / "run", tmp_path / "made.png"
    shutil.copytree(pipeline, run / "pipeline")
    card = "---\ninference:\n  parameters:\n    num_inference_steps: {}\n    guidance_scale: {}\n---\n# x\n"
    (run / "pipeline" / "README.md").write_text(card.format(3, 2.5))
    assert ldm(run, "dog", "-o", made).code == 0
    settings = read_settings(made)
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (3, 2.5)
    assert settings["model"] == str(run / "pipeline")
    assert ldm(run, "dog", "--steps", 2, "-o", made).code == 0
    assert (read_settings(made)["num_inference_steps"], read_settings(made)["guidance_scale"]) == (2, 2.5)

    small = tmp_path / "small"  # of an adapt run: the base, and beside it what was trained
    (small / "adapter").mkdir(parents=True)
    (small / "config.yaml").write_text(f"task: adapt\nbase: {run}\n")
    write_lora(small / "adapter" / "pytorch_lora_weights.safetensors", lora_made.lora("sd15"), "diffusers")
    (small / "adapter" / "README.md").write_text(card.format(1, 0))
    model = model_of(small)
    assert model == (str(run / "pipeline"), str(small / "adapter"), (), "small")
    assert ldm(small, "dog", "-o", made).code == 0
    settings = read_settings(made)
    assert settings["loras"] == {str(small / "adapter"): 1.0} and settings["num_inference_steps"] == 1
    assert sampling_defaults(run, (50, 7.5)) == (3, 2.5)
    assert sampling_defaults(run, (50, 7.5), [small]) == (1, 0.0)
    assert sampling_defaults(pipeline, (50, 7.5), [pipeline / "none.safetensors"]) == (50, 7.5)
    (run / "pipeline" / "README.md").write_text(card.format("many", -1))
    assert sampling_defaults(run, (50, 7.5)) == (50, 7.5)  # what is no number counts for nothing
    (small / "config.yaml").write_text(f"task: adapt\nbase: {tmp_path}/gone\n")
    with pytest.raises(ValueError, match=r"its base .*gone is not here"):
        model_of(small)
