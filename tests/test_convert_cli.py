"""``ldm convert``: what it prints, what it refuses, and what it leaves behind."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import clip, opened, pipeline, same, weights
from transformers import CLIPTextModel

from pipelines import convert_files
from pipelines.convert import convert
from training import cli


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``folder`` and ``single.safetensors`` of a tiny Stable Diffusion 1.5."""
    place = tmp_path_factory.mktemp("sd15")
    pipeline("sd15").save_pretrained(place / "folder")
    convert(place / "folder", place / "single.safetensors")
    return place


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Stable Diffusion 2.1."""
    place = tmp_path_factory.mktemp("sd21")
    pipeline("sd21").save_pretrained(place / "folder")
    convert(place / "folder", place / "single.safetensors")
    return place


def test_the_command_there_and_back(saved: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ldm", "convert", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        return code, *capsys.readouterr()

    code, out, err = run(saved / "folder", tmp_path / "x.safetensors", "--dtype", "bf16")
    assert (code, out.strip()) == (0, str(tmp_path / "x.safetensors")), err
    assert "a program that reads the file alone will not know" in err
    code, out, err = run(tmp_path / "x.safetensors", tmp_path / "y", "--config", saved / "folder", "--dtype", "fp32")
    assert (code, out.strip()) == (0, str(tmp_path / "y")), err
    before = {name: value.bfloat16().float() for name, value in weights(opened(saved / "folder")).items()}
    same(before, weights(opened(tmp_path / "y")))
    code, _, err = run(tmp_path / "x.safetensors", tmp_path / "z")
    assert code == 2 and err.startswith("ldm: ") and "--config FOLDER" in err
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp8"}, "dtype 'fp8' is not one of fp32, bf16, fp16"),
        ({"layout": "sd14"}, "layout 'sd14' is not one of sd15, sd21, sdxl, sd3"),
        ({"layout": "sdxl"}, "text_encoder_2"),
    ],
)
def test_options_are_checked(options: dict, said: str, saved: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        convert(saved / "folder", tmp_path / "x.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_users_is_overwritten(saved: Path, tmp_path: Path):
    folder, file = saved / "folder", saved / "single.safetensors"
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    for source, target, said in (
        (folder, other, "was not written by this command"),
        (folder, folder / "x.safetensors", "would overwrite or lie in"),
        (file, saved, "would overwrite or lie in"),
        (folder, tmp_path / "x", "expected a name that ends in .safetensors"),
        (file, tmp_path / "y.safetensors", "a name of a file was given"),
        (tmp_path / "none", tmp_path / "y", "no such file or folder"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            convert(source, target, config=folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.txt"):
        convert(file, tmp_path / "mine", config=folder)
    (tmp_path / "x.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"x\.yaml: is there already"):
        convert(folder, tmp_path / "x.safetensors")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["mine", "other.safetensors", "x.yaml"]


def test_its_own_work_is_replaced(saved: Path, tmp_path: Path):
    shutil.copy(saved / "single.safetensors", tmp_path / "x.safetensors")
    convert(saved / "folder", tmp_path / "x.safetensors", dtype="fp16")
    assert load_file(tmp_path / "x.safetensors")["model.diffusion_model.out.2.bias"].dtype == torch.float16
    shutil.copytree(saved / "folder", tmp_path / "y")
    convert(tmp_path / "x.safetensors", tmp_path / "y", config=saved / "folder")
    again = load_file(tmp_path / "y" / "unet" / "diffusion_pytorch_model.safetensors")
    assert again["conv_out.bias"].dtype == torch.float16
    assert sorted(x.name for x in tmp_path.iterdir()) == ["x.safetensors", "y"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "y").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_failure_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Disk full while the third part is written: what was there before is there, and nothing else."""
    calls = []
    real = convert_files.write_safetensors

    def full(*args, **kw):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*args, **kw)

    monkeypatch.setattr("pipelines.convert_in.write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        convert(saved / "single.safetensors", tmp_path / "y", config=saved / "folder")
    assert len(calls) == 3 and not list(tmp_path.iterdir())


def test_a_name_missing_or_left_over_is_told(saved: Path, tmp_path: Path):
    state = load_file(saved / "single.safetensors")
    bare = {name: x for name, x in state.items() if name != "first_stage_model.decoder.up.0.block.1.conv2.bias"}
    spoilt = state | {"model.diffusion_model.out.2.bias": torch.zeros(5)}
    for content, said in (
        (bare, r"first_stage_model.*decoder.up.0.block.1.conv2.bias is missing \(1 such"),
        (state | {"model.diffusion_model.extra": torch.zeros(1)}, r"model.diffusion_model.*: extra is left over"),
        (state | {"hypernet.x": torch.zeros(1)}, r"hypernet.x is left over \(1 such names\), sd15 has none"),
        (spoilt, r"model.diffusion_model.out.2.bias is \(5,\); .*wants \(4,\) for conv_out.bias"),
    ):
        save_file(content, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=said):
            convert(tmp_path / "x.safetensors", tmp_path / "y", config=saved / "folder")
    folder = tmp_path / "folder"
    shutil.copytree(saved / "folder", folder)
    weight = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae = load_file(weight)
    for content, said in (
        ({n: x for n, x in vae.items() if n != "decoder.conv_in.bias"}, "decoder.conv_in.bias is missing"),
        (vae | {"decoder.extra.bias": torch.zeros(1)}, "decoder.extra.bias is left over"),
        (vae | {"decoder.conv_in.bias": torch.zeros(3)}, r"decoder.conv_in.bias is \(3,\), by config.json \(16,\)"),
    ):
        save_file(content, weight)
        with pytest.raises(ValueError, match=f"vae: {said}"):
            convert(folder, tmp_path / "z.safetensors")


@pytest.mark.parametrize(
    ("name", "likely"),
    [
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a Flux model"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("lora_unet_mid_block_resnets_0_conv1.alpha", "a LoRA in kohya's form"),
        ("conditioner.embedders.0.model.ln_final.weight", "an SDXL refiner"),
        ("down_blocks.0.resnets.0.norm1.weight", "one part of a pipeline folder"),
    ],
)
def test_another_model_is_named(name: str, likely: str, saved: Path, tmp_path: Path):
    save_file({name: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"it begins with {re.escape(name)}; it looks like {likely}"):
        convert(tmp_path / "x.safetensors", tmp_path / "y", config=saved / "folder")


def test_what_is_no_weights_file_is_told(saved: Path, tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(b"<!DOCTYPE html> please log in")
    cut = (saved / "single.safetensors").read_bytes()[:-10]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    for name in ("x", "cut"):
        with pytest.raises(ValueError, match=rf"{name}.safetensors: not a safetensors file, or cut short"):
            convert(tmp_path / f"{name}.safetensors", tmp_path / "y", config=saved / "folder")


def test_a_header_may_begin_like_a_pickle(saved: Path, tmp_path: Path):
    """One file in 32 has a header whose length starts with the byte that starts a pickle."""
    state = load_file(saved / "single.safetensors")
    for n in range(0, 512, 4):
        save_file(state, tmp_path / "x.safetensors", metadata={"pad": "x" * n})
        if (tmp_path / "x.safetensors").read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no such length found")
    assert convert_files.open_checkpoint(tmp_path / "x.safetensors").like.keys() == state.keys()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_pickle_is_read_only_when_asked_and_never_run(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    state = load_file(saved / "single.safetensors")
    for zipped in (True, False):  # the older form cannot be mapped into memory
        torch.save({"state_dict": state, "epoch": 3}, "x.ckpt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"x.ckpt: a pickled checkpoint, not safetensors; --allow-pickle"):
            convert("x.ckpt", "y", config=saved / "folder")
        convert("x.ckpt", "y", config=saved / "folder", allow_pickle=True)
        same(weights(opened(saved / "folder")), weights(opened(tmp_path / "y")))
        shutil.rmtree("y")
    torch.save({"state_dict": state, "callbacks": Trap()}, "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt: holds more than tensors"):
        convert("x.ckpt", "y", config=saved / "folder", allow_pickle=True)
    assert not Path("sprung").exists() and not Path("y").exists()


def test_what_half_precision_cannot_hold_is_refused(saved: Path, tmp_path: Path):
    shutil.copytree(saved / "folder", tmp_path / "a")
    weight = tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weight)
    state["conv_out.bias"][1] = 1e6
    save_file(state, weight)
    with pytest.raises(ValueError, match=r"out.2.bias: holds 1e\+06, beyond torch.float16; take bf16 or fp32"):
        convert(tmp_path / "a", tmp_path / "x.safetensors", dtype="fp16")
    convert(tmp_path / "a", tmp_path / "x.safetensors", dtype="bf16")


def test_shards_and_variants_are_read(saved: Path, tmp_path: Path):
    pipe = opened(saved / "folder")
    shutil.copytree(saved / "folder", tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "unet")
    pipe.unet.save_pretrained(tmp_path / "a" / "unet", max_shard_size="50KB")
    assert len(list((tmp_path / "a" / "unet").glob("*-of-*.safetensors"))) > 2
    weight = tmp_path / "a" / "vae" / "diffusion_pytorch_model.safetensors"
    weight.rename(weight.with_suffix(".fp16.safetensors"))
    convert(tmp_path / "a", tmp_path / "x.safetensors")
    same(load_file(tmp_path / "x.safetensors"), load_file(saved / "single.safetensors"))


def test_second_version_text_encoder_of_published_depth(tmp_path: Path):
    """23 layers are used; the file holds a 24th and a projection, as the published one does, and they go again."""
    pipe = pipeline("sd21")
    pipe.text_encoder = clip(CLIPTextModel, 16, 16, "gelu", 5)
    config = pipe.text_encoder.config
    config.num_hidden_layers = 23
    pipe.text_encoder = CLIPTextModel(config).eval()
    pipe.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "x.safetensors")
    single = load_file(tmp_path / "x.safetensors")
    prefix = "cond_stage_model.model."
    assert torch.equal(single[f"{prefix}text_projection"], torch.eye(16))
    assert f"{prefix}transformer.resblocks.23.ln_1.bias" in single
    convert(tmp_path / "x.safetensors", tmp_path / "b", config=tmp_path / "a")
    before = opened(tmp_path / "a")
    same(weights(before), weights(opened(tmp_path / "b")))
    same(weights(before), weights(type(before).from_single_file(f"{tmp_path}/x.safetensors", config=f"{tmp_path}/a")))


def test_inpainting_is_known_by_its_channels(tmp_path: Path):
    from diffusers import StableDiffusionInpaintPipeline
    from safetensors import safe_open
    from test_convert import unet

    parts = pipeline("sd15").components
    parts.pop("image_encoder", None)
    pipe = StableDiffusionInpaintPipeline(**(parts | {"unet": unet(16, in_channels=9)}), requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as f:
        assert f.metadata()["modelspec.architecture"] == "stable-diffusion-v1-inpainting"
    convert(tmp_path / "x.safetensors", tmp_path / "b", config=tmp_path / "a")
    assert isinstance(opened(tmp_path / "b"), StableDiffusionInpaintPipeline)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({}, "v_prediction"),  # as Stable Diffusion 2.1 was published
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.predict_key": "v"}, "v_prediction"),
        ("parameterization: eps", "epsilon"),
        ("parameterization: v", "v_prediction"),
    ],
)
def test_a_foreign_file_tells_what_it_predicts(metadata, told: str, second: Path, tmp_path: Path):
    foreign = metadata if isinstance(metadata, dict) else {}
    save_file(load_file(second / "single.safetensors"), tmp_path / "x.safetensors", metadata=foreign)
    if isinstance(metadata, str):
        (tmp_path / "x.yaml").write_text(f"model:\n  params:\n    {metadata}\n")
    shutil.copytree(second / "folder", tmp_path / "a", ignore=shutil.ignore_patterns("scheduler"))
    convert(tmp_path / "x.safetensors", tmp_path / "b", config=tmp_path / "a")
    scheduler = json.loads((tmp_path / "b" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["prediction_type"]) == ("DDIMScheduler", told)
