"""The full-size configs: their networks' sizes are stock's, `ldm check` tells them, and each made small trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from rich.console import Console

from tests import tiny
from training import measure, preflight
from training.arithmetic import parameters
from training.config import load
from training.fit import ConfigError, check_together
from training.preflight import DoesNotFit, report
from training.run import train_all
from training.schema import Config
from training.sizes import network_of

ROOT = Path(__file__).resolve().parent.parent
HUB = {  # as the hub has them, without the fields that nobody asks for
    "stabilityai/sd-vae-ft-mse": {
        "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4,
        "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 256,
    },
    "openai/clip-vit-large-patch14": {
        "model_type": "clip", "projection_dim": 768,
        "text_config": {"model_type": "clip_text_model", "hidden_size": 768, "max_position_embeddings": 77},
    },
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": {
        "model_type": "clip", "projection_dim": 1024,
        "text_config": {"model_type": "clip_text_model", "hidden_size": 1024, "num_hidden_layers": 24},
    },
}  # fmt: skip
STOCK = {
    "unet_sd2_from_scratch": ("UNet2DConditionModel", 865_910_724),  # stabilityai/stable-diffusion-2-1
    "dit_xl_from_scratch": ("PixArtTransformer2DModel", 607_003_792),
    "mmdit_from_scratch": ("SD3Transformer2DModel", 2_021_114_896),
    "vae_f8": ("AutoencoderKL", 83_653_863),  # stabilityai/sd-vae-ft-mse
}
SMALL = {  # widths divided by 16; the groups of the norms, and heads or their widths, with them
    "unet_sd2_from_scratch": ["model.block_out_channels=[20, 40, 80, 80]", "model.norm_num_groups=4"],
    "dit_xl_from_scratch": ["model.num_attention_heads=1"],
    "mmdit_from_scratch": ["model.attention_head_dim=4"],
    "vae_f8": ["model.block_out_channels=[8, 16, 32, 32]", "model.norm_num_groups=2", "loss.critic_channels=4"],
}


def serve(room: Path) -> Any:
    """In place of the hub."""

    def download(name: str, file: str) -> str:
        place = room / name.replace("/", "--") / file
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(HUB[name]))
        return str(place)

    return download


def stages(name: str, *overrides: str) -> list[Config]:
    """The config, after the one that it builds on."""
    names = ["vae_f8", name] if name == "mmdit_from_scratch" else [name]
    return [load(ROOT / f"configs/{n}.yaml", overrides) for n in names]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": tiny.CAPTIONS[i]}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A tiny autoencoder of factor 8, and a tiny CLIP."""
    root = tmp_path_factory.mktemp("parts")
    tiny.vae(block_out_channels=(8, 8, 8, 8)).to_diffusers().save_pretrained(root / "vae")
    tiny.clip().save_pretrained(root / "clip")
    tiny.tokenizer().save_pretrained(root / "clip")
    return root


@pytest.mark.parametrize("name", STOCK)
def test_the_network_is_as_large_as_the_stock_class(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", serve(tmp_path))
    *earlier, config = stages(name)
    kind, count = STOCK[name]
    with torch.device("meta"):
        ours: Any = network_of(config, earlier)[0]()
        stock = getattr(diffusers, kind).from_config(dict(ours.config))
    assert parameters(ours) == parameters(stock) == (count, 0)


@pytest.mark.parametrize("name", STOCK)
def test_check_tells_each_of_them(name: str, tmp_path: Path, pictures: Path, monkeypatch):
    """On a device that is too small, so that the table is all there is."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", serve(tmp_path))
    monkeypatch.setattr(measure, "free_memory", lambda device: 2**30)
    monkeypatch.chdir(tmp_path)  # where outputs/vae is none
    configs = stages(name, f"data.path={pictures}")
    check_together(configs)
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "told").open("w"))
    with pytest.raises(DoesNotFit):
        report(configs, console=console)
    told = console.export_text().split(f"outputs/{Path(configs[-1].output_dir).name}:")[1]
    assert f"{STOCK[name][1] / 1e6:.2f}M trained" in told
    work = {"unet_sd2_from_scratch": "2,412.8", "dit_xl_from_scratch": "867.5", "mmdit_from_scratch": "5,022.2"}
    assert work.get(name, "2,394.8") + " GFLOP an image" in told
    assert "7 to train on, 1 held out" in told and "1.00 GiB are free on cpu: weights" in told
    assert name == "vae_f8" or "15 pictures and 8 captions" in told  # 7 and their mirror images, 1 held out
    assert not any(".ldm-check" in str(p) for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("name", STOCK)
def test_two_steps_with_its_widths_divided_by_16(name: str, tmp_path: Path, pictures: Path, parts: Path):
    small = [*SMALL[name], f"output_dir={tmp_path / 'run'}", f"data.path={pictures}", "data.resolution=64"]
    small += ["train.images=4", "train.batch_size=2", "train.num_workers=0", "train.log_every=2"]
    if name == "vae_f8":
        small += ["data.random_crop=32", "loss.gan_start=2", f"loss.perceptual=clip:{parts / 'clip'}"]
    else:
        small += [f"vae.pretrained={parts / 'vae'}", f"text.pretrained={parts / 'clip'}"]
        small += ["sample.num_inference_steps=2", "sample.prompts=[a red apple]"]
    config = load(ROOT / f"configs/{name}.yaml", small)
    train_all([config])
    folder = tmp_path / "run/pipeline"
    lines = [json.loads(line) for line in (tmp_path / "run/log/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    if name == "vae_f8":
        stock = AutoencoderKL.from_pretrained(folder)
        assert any("critic_loss" in line for line in lines)
        with torch.no_grad():
            drawn = stock.decode(torch.randn(1, 4, 4, 4)).sample
        assert drawn.shape == (1, 3, 32, 32)
        return
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pixart = {"max_sequence_length": pipe.tokenizer.model_max_length, "use_resolution_binning": False}
    extra = pixart if name.startswith("dit") else {}
    drawn = pipe("a red apple", num_inference_steps=2, output_type="np", height=64, width=64, **extra).images
    assert drawn.shape == (1, 64, 64, 3) and np.isfinite(drawn).all()


def test_a_hub_name_that_cannot_be_had_is_named(tmp_path: Path, pictures: Path, monkeypatch):
    def offline(name: str, file: str) -> str:
        raise OSError("We couldn't connect to the hub.\nTry again.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    config = stages("dit_xl_from_scratch", f"data.path={pictures}", f"output_dir={tmp_path / 'run'}")
    with pytest.raises(
        ConfigError, match=r"vae.pretrained: stabilityai/sd-vae-ft-mse .*couldn't connect.*local folder"
    ):
        report(config, console=Console(quiet=True))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", serve(tmp_path))
    swapped = stages(
        "dit_xl_from_scratch", f"data.path={pictures}", f"output_dir={tmp_path / 'run'}",
        "vae.pretrained=openai/clip-vit-large-patch14",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"vae.pretrained: openai/clip.* is of another kind of model \(clip\)"):
        report(swapped, console=Console(quiet=True))


def test_what_fits_is_told():
    memory = preflight.Memory(weights=10, gradients=10, optimizer=20, average=10, activations=160)
    config = load(ROOT / "configs/dit_xl_from_scratch.yaml")  # 128 pictures
    assert preflight.what_would_fit(memory, config, 130).startswith("train.batch_size 64 would, or more of")
    assert "FSDP2" in preflight.what_would_fit(memory, config, 50)
    assert memory.shared(2).total == 185
