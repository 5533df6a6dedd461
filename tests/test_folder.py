"""Folders that are not as they should be, and what an export leaves alone."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.models.text import TextEncoder
from ldm.paths import CosineVP
from ldm.prediction import V
from pipelines.core import Parts, generate
from pipelines.folder import load_parts, save_parts
from pipelines.schedulers import default_schedule
from pipelines.text_to_image import TextToImagePipeline
from tests import tiny
from tests.forms import exported, noise, ours, parts, quiet


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, SimpleNamespace]:
    return exported(tmp_path_factory)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "copy"))


def test_an_older_export_is_replaced_and_nothing_else_left(folders, tmp_path):
    folder = copied(folders["unet_v"].folder, tmp_path)
    save_parts(folder, folders["unet"].parts)
    assert listing(folder) == listing(folders["unet"].folder)
    assert list(tmp_path.iterdir()) == [folder]
    TextToImagePipeline.from_pretrained(folder).save_pretrained(folder)  # onto itself, its files open
    assert listing(folder) == listing(folders["unet"].folder)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: (p / "holiday.jpg").write_bytes(b"1"), "holiday.jpg but no model_index.json"),
        (lambda p: shutil.rmtree(p) or p.write_text("x"), "in the way"),
        (lambda p: [(p / n).write_text("{}") for n in ("model_index.json", "thesis.tex")], "thesis.tex"),
    ],
)
def test_anything_but_a_pipeline_is_never_overwritten(tmp_path, folders, prepare, message):
    folder = tmp_path / "mine"
    folder.mkdir()
    prepare(folder)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_parts(folder, folders["unet"].parts)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("form", ["unet", "mmdit"])
def test_an_export_that_does_not_read_back_leaves_the_old_one(folders, tmp_path, monkeypatch, form):
    """Each part is damaged between writing and reading; the comparison must notice."""
    import pipelines.folder as module

    folder, write = copied(folders[form].folder, tmp_path), module._write_for_older_readers
    before = listing(folder)
    net = "transformer" if form == "mmdit" else "unet"
    for part, file in ((net, "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):

        def damage(beside, weights=f"{part}/{file}.safetensors"):
            write(beside)
            state = load_file(beside / weights)
            name = min(key for key in state if key.endswith("weight"))
            state[name] = state[name] * 1.001
            save_file(state, beside / weights, metadata={"format": "pt"})

        monkeypatch.setattr(module, "_write_for_older_readers", damage)
        with pytest.raises(RuntimeError, match="does not come back as it was"):
            save_parts(folder, folders[form].parts)
    for part, key, value in ((net, "norm_eps", 0.3), ("vae", "norm_num_groups", 2)) if form == "unet" else ():

        def reconfigure(beside, config=f"{part}/config.json", change={key: value}):  # noqa: B006
            write(beside)
            (beside / config).write_text(json.dumps(json.loads((beside / config).read_text()) | change))

        monkeypatch.setattr(module, "_write_for_older_readers", reconfigure)
        with pytest.raises(RuntimeError, match="answers otherwise in stock form"):
            save_parts(folder, folders[form].parts)
    assert listing(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_an_export_draws_no_random_number_and_leaves_modes_alone(tmp_path, folders):
    given = parts("mmdit")
    given.net.train()
    state = torch.get_rng_state()
    save_parts(tmp_path / "pipeline", given)
    assert torch.equal(torch.get_rng_state(), state)
    assert given.net.training and not given.vae.training
    assert given.vae.config["shift_factor"] == 0.3


def test_half_precision_is_written_as_it_is(tmp_path):
    given = parts("mmdit")
    given.net.to(torch.bfloat16)
    given.text.to(torch.bfloat16)
    again = load_parts(save_parts(tmp_path / "pipeline", given))
    assert again.net.dtype == again.text.dtype == again.vae.dtype == torch.float32
    for name, value in load_file(tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors").items():
        assert value.dtype == torch.bfloat16 and torch.equal(again.net.state_dict()[name], value.float())
    assert load_parts(tmp_path / "pipeline", torch.bfloat16).vae.dtype == torch.bfloat16


def with_nan() -> Parts:
    given = parts("unet")
    nn.init.constant_(given.net.conv_in.bias, float("nan"))
    return given


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_nan, "NaN or infinity in conv_in.bias"),
        (lambda: replace(parts("unet"), text=tiny.text("sd3")), "takes text family 'sd'"),
        (lambda: replace(parts("unet"), vae=tiny.vae(shift_factor=0.5)), "ignores the VAE's shift_factor"),
        (
            lambda: replace(parts("unet"), vae=tiny.vae(latent_channels=8)),
            "in_channels is 4, the VAE's latent_chan.* 8",
        ),
        (lambda: replace(parts("unet"), net=tiny.unet(cross_attention_dim=20)), "cross_attention_dim is 20"),
        (lambda: replace(parts("mmdit"), net=tiny.mmdit(pooled_projection_dim=12)), "pooled_projection_dim is 12"),
        (lambda: replace(parts("mmdit"), text=tiny.text("sd3", joint_width=20)), "joint_attention_dim is 24"),
        (lambda: replace(parts("unet"), net=tiny.vae()), "VAE has no stock pipeline"),
        (lambda: replace(parts("unet"), schedule=default_schedule(CosineVP(), V(), "sd")), "no stock form"),
    ],
)
def test_parts_that_no_stock_pipeline_takes_are_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        save_parts(tmp_path / "pipeline", make())
    assert not list(tmp_path.iterdir())


def test_a_path_without_a_stock_form_is_drawn_by_ours():
    given = replace(parts("unet"), schedule=default_schedule(CosineVP(), V(), "sd"))
    assert generate(given, ["zebra"], steps=3).shape == (1, 3, 16, 16)


def edit(name, **values):
    def change(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


def lose(name, key):
    def change(folder):
        state = load_file(folder / name)
        del state[key]
        save_file(state, folder / name, metadata={"format": "pt"})

    return change


def as_pickle(folder):
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin")


INDEX, NET = "model_index.json", "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda f: (f / INDEX).unlink(), r"model_index\.json: missing"),
        (lambda f: (f / INDEX).write_text("{"), r"model_index\.json: not JSON"),
        (lambda f: (f / INDEX).write_text("[]"), r"model_index\.json: expected a JSON object"),
        (edit(INDEX, _class_name="FluxPipeline"), r"model_index\.json: _class_name is 'FluxPipeline'"),
        (edit(INDEX, _class_name=["evil", "Pipeline"]), r"model_index\.json: _class_name is \['evil', 'Pipeline'\]"),
        (edit(INDEX, unet=["evil", "UNet"]), r"model_index\.json: unet is \['evil', 'UNet'\]"),
        (edit(INDEX, vae=["diffusers", "AutoencoderTiny"]), r"model_index\.json: vae is"),
        (lambda f: shutil.rmtree(f / "vae"), r"vae/config\.json: missing"),
        (as_pickle, "unet: no safetensors file"),
        (lambda f: (f / "tokenizer/tokenizer.json").unlink() or (f / "tokenizer/vocab.json").unlink(), "no tokenizer"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), r"scheduler_config\.json: missing"),
        (edit("scheduler/scheduler_config.json", _class_name="evil"), "'evil' is not a scheduler"),
        (lose(NET, "conv_out.weight"), r"UNet2DConditionModel.* conv_out\.weight"),
        (lose("text_encoder/model.safetensors", "text_model.final_layer_norm.bias"), "lacks 1 weights of CLIPText"),
        (edit("unet/config.json", act_fn="gelu"), "act_fn='gelu' is not supported"),
    ],
)
def test_a_folder_that_is_no_pipeline_of_ours_is_refused(folders, tmp_path, damage, message, monkeypatch):
    folder = copied(folders["unet"].folder, tmp_path)
    damage(folder)
    (tmp_path / "evil.py").write_text("raise SystemExit('foreign code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        TextToImagePipeline.from_pretrained(folder)
    assert "evil" not in sys.modules


def filled(folder: Path, part: str) -> Path:
    weights = folder / part / "model.safetensors"
    save_file({k: torch.ones_like(v) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    return folder


def test_a_second_clip_that_is_not_all_zeros_is_read(folders, tmp_path):
    """However small it is: stock reads it too."""
    folder = filled(copied(folders["mmdit"].folder, tmp_path), "text_encoder_2")
    call = dict(num_inference_steps=3, guidance_scale=2.0, output_type="latent", latents=noise(1))
    stock = quiet(DiffusionPipeline.from_pretrained(folder))
    expected = stock("zebra", **call).images
    for source in (folder, stock):
        pipe = quiet(TextToImagePipeline.from_diffusers(source))
        assert (pipe("zebra", **call).images - expected).abs().max() < 1e-5
    assert (ours("mmdit")("zebra", **call).images - expected).abs().max() > 1e-3


def test_a_t5_with_the_tokenizer_of_a_clip_is_refused(folders, tmp_path):
    folder = filled(copied(folders["mmdit"].folder, tmp_path), "text_encoder_3")
    with pytest.raises(ValueError, match="tokenizer_3: does not open as a T5Tokenizer"):
        load_parts(folder)
    assert load_parts(folder, t5=None).text.model_3 is None


def test_a_scheduler_without_a_counterpart_still_tells_how_the_network_was_trained(folders, tmp_path, caplog):
    from diffusers import PNDMScheduler

    folder = copied(folders["unet_v"].folder, tmp_path)
    scheduler = StableDiffusionPipeline.from_pretrained(folder).scheduler
    PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    edit(INDEX, scheduler=["diffusers", "PNDMScheduler"])(folder)
    assert load_parts(folder).schedule == folders["unet_v"].parts.schedule
    assert "PNDMScheduler" in caplog.text and "dpmpp_2m" in caplog.text


def test_a_hub_name_that_cannot_be_had_says_so():
    with pytest.raises(ValueError, match="nobody/nothing: no such folder, and the hub cannot be reached"):
        TextToImagePipeline.from_pretrained("nobody/nothing")


def test_an_argument_that_is_none_is_named(folders):
    folder = folders["unet"].folder
    with pytest.raises(ValueError, match="unknown argument torch_dtype; did you mean dtype"):
        TextToImagePipeline.from_pretrained(folder, torch_dtype=torch.float16)
    with pytest.raises(ValueError, match="unknown argument revison"):
        TextEncoder.from_pretrained(folder, revison="main")
