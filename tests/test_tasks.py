"""CLIP, autoencoder and both denoisers from pictures to folders that stock classes open: tiny, but whole."""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm import rng
from ldm.models.dit import DiT
from ldm.models.vae import VAE
from pipelines.core import start_latents
from pipelines.text_to_image import TextToImagePipeline
from training import loop
from training.batches import Stream, to_unit
from training.cache import make_cache
from training.checkpoint import CheckpointError, listed
from training.config import load, parse
from training.data import DataError
from training.evaluate.grids import picture_grid
from training.fit import ConfigError
from training.run import build, inputs_of, is_done, open_data, train_all
from training.schema import Config

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("red", "green", "blue", "yellow", "black", "orange")
SHAPES = ("circle", "square", "triangle", "cross")
SIDE = 32


def draw(shape: str, colour: str, room: int) -> Image.Image:
    """``room`` pixels from the edge."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen, a, b, m = ImageDraw.Draw(picture), room, SIDE - 1 - room, SIDE // 2
    if shape == "circle":
        pen.ellipse((a, a, b, b), fill=colour)
    elif shape == "square":
        pen.rectangle((a, a, b, b), fill=colour)
    elif shape == "triangle":
        pen.polygon(((m, a), (a, b), (b, b)), fill=colour)
    else:
        pen.line((a, m, b, m), fill=colour, width=6)
        pen.line((m, a, m, b), fill=colour, width=6)
    return picture


def write_shapes(root: Path) -> Path:
    """An imagefolder: 24 captioned pictures to train on, the six circles in another size held out."""
    for split, shapes, room in (("train", SHAPES, 4), ("test", SHAPES[:1], 7)):
        (root / split).mkdir(parents=True)
        lines = []
        for colour in COLOURS:
            for shape in shapes:
                name = f"{colour}_{shape}.png"
                draw(shape, colour, room).save(root / split / name)
                lines.append(json.dumps({"file_name": name, "text": f"a {colour} {shape}"}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


PROMPTS = ["a red circle", "a blue square", "a green cross", "a black triangle"]
CLIP = {
    "task": "clip",
    "model": {
        "text": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        "vision": {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "patch_size": 8,
        },
        "projection_dim": 12,
        "tokenizer": {"vocab_size": 560, "max_length": 12},
    },
    "ema_decay": 0.8,
    "optimizer": {"learning_rate": 3e-3},
    "train": {"images": 240, "batch_size": 24, "log_every": 24, "validate_every": 120, "checkpoint_every": 240},
}  # fmt: skip
VAE_ = {
    "task": "autoencoder",
    "model": {"block_out_channels": [8, 8, 16], "norm_num_groups": 4, "mid_block_add_attention": False},
    "loss": {
        "perceptual_weight": 0.1, "gan_weight": 0.1, "gan_start": 48, "critic_channels": 8, "critic_layers": 1,
    },
    "ema_decay": 0.8,
    "optimizer": {"learning_rate": 3e-3},
    "train": {
        "images": 96, "batch_size": 8, "log_every": 8, "validate_every": 48, "sample_every": 96,
        "checkpoint_every": 96,
    },
}  # fmt: skip
UNET = {
    "task": "diffusion",
    "model": {
        "name": "unet", "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8,
        "attention_head_dim": 2,
    },
    "ema_decay": 0.9,
    "optimizer": {"learning_rate": 3e-3},
    "train": {
        "images": 1440, "batch_size": 24, "log_every": 48, "validate_every": 240, "sample_every": 720,
        "checkpoint_every": 120, "mixed_precision": "no",
    },
    "sample": {"prompts": PROMPTS, "num_inference_steps": 5, "guidance_scale": 2.0, "seed": 3},
}  # fmt: skip
MMDIT = UNET | {
    "model": {"name": "mmdit", "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2},
    "train": UNET["train"] | {"images": 240, "checkpoint_every": 240, "sample_every": 240},
}
DIT = MMDIT | {"model": {"name": "dit", "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}}


@dataclass
class Made:
    """A trained chain of runs."""

    root: Path
    raw: dict[str, dict[str, Any]]
    configs: dict[str, Config]

    def run(self, name: str) -> Path:
        return self.root / name

    def pipeline(self, name: str) -> Path:
        return self.root / name / "pipeline"

    def metrics(self, name: str, key: str) -> list[tuple[int, float]]:
        lines = (self.run(name) / "log/metrics.jsonl").read_text().splitlines()
        return [(row["images"], row[key]) for row in map(json.loads, lines) if key in row]

    def variant(self, name: str, output_dir: Path, **changes: Any) -> dict[str, Any]:
        """The plain config of a run, with dotted changes, in another folder."""
        raw = copy.deepcopy(self.raw[name])
        for key, value in {**changes, "output_dir": str(output_dir)}.items():
            *parents, last = key.split("__")
            section = raw
            for part in parents:
                section = section.setdefault(part, {})
            section[last] = value
        return raw


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("runs")
    data = {"path": str(write_shapes(root / "data")), "resolution": SIDE}
    given = {"vae": {"pretrained": str(root / "vae")}, "text": {"pretrained": str(root / "clip")}}
    raw = {
        "clip": CLIP,
        "vae": VAE_ | {"loss": VAE_["loss"] | {"perceptual": f"clip:{root / 'clip'}"}},
        "unet": UNET | given,
        "mmdit": MMDIT | given,
        "dit": DIT | given,
    }
    raw = {name: {**r, "output_dir": str(root / name), "data": data} for name, r in raw.items()}
    configs = {name: parse(r, name) for name, r in raw.items()}
    train_all(list(configs.values()))
    return Made(root, raw, configs)


def accelerator() -> Accelerator:
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="no")


# --- CLIP ------------------------------------------------------------------------------------------------------------


def test_clip_opens_in_stock_classes_and_pools_at_the_first_end_token(made: Made) -> None:
    folder = made.pipeline("clip")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    text = CLIPTextModel.from_pretrained(folder).eval()
    clip = CLIPModel.from_pretrained(folder).eval()
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (4, 12) and tokenizer.pad_token_id == tokenizer.eos_token_id == text.config.eos_token_id
    with torch.no_grad():
        out = text(ids)
        pooled = clip.text_model(ids).pooler_output
        vectors = clip(input_ids=ids, pixel_values=torch.zeros(1, 3, SIDE, SIDE)).text_embeds
    for row, states, vector, full in zip(ids, out.last_hidden_state, out.pooler_output, pooled, strict=True):
        end = row.tolist().index(tokenizer.eos_token_id)
        assert 0 < end < 11  # captions of this data set end before the padding does
        assert torch.equal(vector, states[end]) and torch.equal(full, states[end])
    assert (vectors @ vectors.T - torch.eye(4)).abs().max() > 1e-3 and not torch.allclose(vectors[0], vectors[1])


def test_clip_learns_and_is_measured_on_held_out_pictures(made: Made) -> None:
    losses = [value for _, value in made.metrics("clip", "loss")]
    assert losses[-1] < losses[0] - 0.3  # from log(24): chance
    assert [at for at, _ in made.metrics("clip", "held_out_loss")] == [120, 240]
    assert all(0 <= value <= 1 for _, value in made.metrics("clip", "held_out_accuracy"))


# --- autoencoder -----------------------------------------------------------------------------------------------------


def test_vae_opens_in_stock_and_its_scale_gives_unit_latents(made: Made) -> None:
    stock = AutoencoderKL.from_pretrained(made.pipeline("vae")).eval()
    rows, _ = open_data(made.configs["vae"])
    x = to_unit(rows.pictures(range(len(rows))))
    with torch.no_grad():
        moments = stock.encode(x).latent_dist
        generator = torch.Generator().manual_seed(1)  # not the noise that the scale was measured with
        z = moments.sample(generator) * stock.config.scaling_factor
        ours = VAE.from_diffusers(made.pipeline("vae")).encode(x)
    assert torch.allclose(ours.mean, moments.mean, atol=1e-5)
    # the same pictures, other noise: the error of a second moment over n values is at most sqrt(2 / n)
    assert z.square().mean().item() == pytest.approx(1, abs=4 * (2 / z.numel()) ** 0.5)
    assert not stock.config.shift_factor


def test_vae_runs_perceptual_and_adversarial_terms_from_gan_start(made: Made) -> None:
    assert next(at for at, _ in made.metrics("vae", "perceptual_loss")) == 8
    for key in ("critic_loss", "generator_loss", "adaptive_weight", "critic_grad_norm"):
        # rows are written after the step, so the first that holds them is one batch past gan_start
        assert [at for at, _ in made.metrics("vae", key)] == list(range(56, 97, 8)), key
    assert all(np.isfinite(v) for key in ("loss", "critic_loss") for _, v in made.metrics("vae", key))
    for key in ("held_out_psnr", "train_psnr", "held_out_ssim"):
        assert [at for at, _ in made.metrics("vae", key)] == [48, 96]
    before, after = (value for _, value in made.metrics("vae", "train_psnr"))
    assert after > before


def test_each_move_leaves_the_other_player_untouched(made: Made, tmp_path: Path) -> None:
    config = parse(made.variant("vae", tmp_path / "vae"), "vae")
    task = build(config, *open_data(config), tmp_path / "vae", accelerator())
    batch = task.rows.__getitems__([(i, i) for i in range(8)])
    vae, critic = task.players

    def weights(player: loop.Player) -> list[torch.Tensor]:
        return [p.detach().clone() for p in player.module.parameters()]

    for player, other in ((vae, critic), (critic, vae)):
        own, others = weights(player), weights(other)
        loss, _ = player.loss(batch, config.loss.gan_start)
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in other.module.parameters())
        player.optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(others, weights(other), strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(own, weights(player), strict=True))


# --- denoiser --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet", "mmdit", "dit"])
def test_stock_and_own_pipeline_give_equal_latents(made: Made, name: str) -> None:
    assert_stock_draws_the_same(made.pipeline(name))


def assert_stock_draws_the_same(folder: Path) -> None:
    ours = TextToImagePipeline.from_pretrained(folder)
    stock = DiffusionPipeline.from_pretrained(folder)
    assert type(stock).__module__.startswith("diffusers.")
    start = start_latents((2, 4, 8, 8), torch.Generator().manual_seed(5))
    given: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "latent"}
    out = []
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
        if type(pipe).__name__.startswith("PixArt"):  # its defaults are for a T5, and for 256, 512 and 1024 pixels
            given |= {"max_sequence_length": pipe.tokenizer.model_max_length, "use_resolution_binning": False}
        out.append(pipe(PROMPTS[:2], latents=start.clone(), **given).images)
    assert out[0].shape == (2, 4, 8, 8) and out[0].std() > 0.1
    assert (out[0] - out[1]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("recipe", "scheduler"),
    [
        (
            {
                "path": {"name": "discrete"}, "prediction_type": "v_prediction",
                "timesteps": {"name": "uniform", "stratified": True}, "weighting": {"name": "min_snr"},
            },
            "DPMSolverMultistepScheduler",
        ),
        (
            {
                "path": {"name": "discrete", "rescale_betas_zero_snr": True}, "prediction_type": "v_prediction",
                "weighting": {"name": "p2"},
            },
            "DDIMScheduler",
        ),
        (
            {
                "path": {"name": "ve"}, "prediction_type": "karras", "timesteps": {"name": "log_normal"},
                "weighting": {"name": "edm", "sigma_data": 1.0},
            },
            "EDMEulerScheduler",
        ),
    ],
    ids=["v", "zero_snr", "edm"],
)  # fmt: skip
def test_other_recipes_learn_and_open_in_stock(made: Made, tmp_path: Path, recipe: dict, scheduler: str) -> None:
    raw = made.variant("unet", tmp_path / "unet", train__images=480, train__validate_every=240, **recipe)
    train_all([parse(raw, "unet")])
    rows = (tmp_path / "unet/log/metrics.jsonl").read_text().splitlines()
    losses = [row["train_fixed_loss"] for row in map(json.loads, rows) if "train_fixed_loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    index = json.loads((tmp_path / "unet/pipeline/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", scheduler]
    assert_stock_draws_the_same(tmp_path / "unet/pipeline")


def test_learned_variance_is_trained_and_opens_in_stock(made: Made, tmp_path: Path) -> None:
    recipe = {"path": {"name": "discrete"}, "prediction_type": "epsilon", "learned_variance": True}
    raw = made.variant("dit", tmp_path / "dit", train__images=240, train__validate_every=120, **recipe)
    train_all([parse(raw, "dit")])
    net = DiT.from_diffusers(tmp_path / "dit/pipeline", subfolder="transformer")
    assert net.out_channels == 8
    told = net.proj_out.weight.unflatten(0, (2, 2, 8))[:, :, 4:]  # (p, p, the variance's channels, D); zero at first
    assert told.abs().max() > 0
    assert_stock_draws_the_same(tmp_path / "dit/pipeline")
    raw["model"] = made.raw["unet"]["model"]
    with pytest.raises(ConfigError, match=r"learned_variance needs model\.name dit"):
        train_all([parse({**raw, "output_dir": str(tmp_path / "other")}, "unet")])


@pytest.mark.parametrize("name", ["unet", "mmdit", "dit"])
def test_the_grid_of_the_training_is_what_the_pipeline_draws(made: Made, name: str) -> None:
    how = made.configs[name].sample
    file = sorted((made.run(name) / "samples").glob("*.png"))[-1]
    pipe = TextToImagePipeline.from_pretrained(made.pipeline(name))
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(
        PROMPTS,
        num_inference_steps=how.num_inference_steps,
        guidance_scale=how.guidance_scale,
        generator=[torch.Generator().manual_seed(how.seed + i) for i in range(4)],
        output_type="pt",
    ).images
    with Image.open(file) as shown:
        assert shown.size == (8 + 2 * (128 + 8), 8 + 2 * (128 + 33 + 8))  # 2 x 2 cells with captions
        assert np.array_equal(np.asarray(shown), np.asarray(picture_grid(pictures, PROMPTS)))


def test_a_small_set_is_learnt_and_followed_at_fixed_noise(made: Made) -> None:
    fixed = [value for _, value in made.metrics("unet", "train_fixed_loss")]
    noisy = [value for _, value in made.metrics("unet", "loss")]
    assert [at for at, _ in made.metrics("unet", "held_out_loss")] == list(range(240, 1441, 240))
    # a network that knows nothing answers 0 and loses E|eps - x0|² = 2: unit noise and unit latents, independent
    assert 1.5 < noisy[0] < 2.5
    assert fixed == sorted(fixed, reverse=True) and fixed[-1] < 0.7 * 2
    assert noisy[-1] < 0.75 * noisy[0]


def test_every_run_leaves_a_report(made: Made) -> None:
    for name in made.configs:
        text = (made.run(name) / "report.html").read_text(encoding="utf-8")
        assert "held_out" in text and "output_dir" in text


# --- taking up, refusing ---------------------------------------------------------------------------------------------


def test_what_is_made_is_taken_up(
    made: Made, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("trained again"))
    with caplog.at_level(logging.INFO, logger="training"):
        train_all(list(made.configs.values()))
    said = [m for m in caplog.messages if "already made" in m]
    assert len(said) == 5 and all(str(made.run(n)) in m for n, m in zip(made.configs, said, strict=True))


def test_another_config_in_the_same_folder_is_refused_by_key(made: Made) -> None:
    raw = made.variant("unet", made.run("unet"), optimizer__learning_rate=1e-5)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.003 there, 1e-05 here"):
        train_all([parse(raw, "unet")])


def test_data_of_all_stages_is_opened_before_the_first_trains(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("trained before the data of all was looked at"))
    first = parse(made.variant("clip", tmp_path / "clip"), "clip")
    for key, value, message in (
        ("data__image_column", "photo", "no column 'photo'"),
        ("data__path", str(tmp_path / "nowhere"), "nowhere"),
    ):
        second = parse(made.variant("vae", tmp_path / "vae", **{key: value}), "vae")
        with pytest.raises(DataError, match=message):
            train_all([first, second])
        assert not (tmp_path / "clip").exists() and not (tmp_path / "vae").exists()


def copied_vae(made: Made, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in made.pipeline("vae").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_retrained_autoencoder_is_noticed(made: Made, tmp_path: Path) -> None:
    vae = copied_vae(made, tmp_path / "vae")
    short = {"train__images": 24, "train__sample_every": 10**6, "vae__pretrained": str(vae)}
    config = parse(made.variant("unet", tmp_path / "unet", **short), "unet")
    train_all([config])
    rows, _ = open_data(config)
    assert is_done(config, inputs_of(config, rows))
    assert not is_done(config, inputs_of(config, rows) | {"data": "other"})
    (weights,) = vae.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] += 0.25
    save_file(tensors, weights, metadata={"format": "pt"})
    assert not is_done(config, inputs_of(config, rows))
    with pytest.raises(CheckpointError, match=r"trained from another vae than the one there now; .*delete .*unet"):
        train_all([config])


def test_stages_may_differ_in_precision_and_bf16_draws_what_its_pipeline_draws(made: Made, tmp_path: Path) -> None:
    short: dict[str, Any] = {"train__images": 24, "train__sample_every": 24}
    single = made.variant("vae", tmp_path / "vae", train__images=8, train__mixed_precision="no")
    half = made.variant("unet", tmp_path / "unet", **short, train__mixed_precision="bf16")
    train_all([parse(single, "vae"), parse(half, "unet")])
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "unet/pipeline")
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(
        PROMPTS,
        num_inference_steps=5,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(3 + i) for i in range(4)],
        output_type="pt",
    ).images
    with Image.open(tmp_path / "unet/samples/images_000000024.png") as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(picture_grid(pictures, PROMPTS)))


# --- killed and gone on ----------------------------------------------------------------------------------------------


def test_a_run_killed_twice_ends_in_the_same_bits(made: Made, tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL, then to the end; and measures and samples, left out here, disturb no weight."""
    run, file = tmp_path / "unet", tmp_path / "unet.yaml"
    quiet = {"train__validate_every": 10**6, "train__sample_every": 10**6}
    file.write_text(yaml.safe_dump(made.variant("unet", run, **quiet)))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}

    def train_until_next_checkpoint(number: int) -> tuple[int, str]:
        known = listed(run / "checkpoints")[-1:]
        command = [sys.executable, "-m", "training.cli", "train", str(file)]
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and listed(run / "checkpoints")[-1:] == known:
            time.sleep(0.005)
        child.send_signal(number)
        _, said = child.communicate(timeout=300)
        return child.returncode, " ".join(said.split())

    code, said = train_until_next_checkpoint(signal.SIGTERM)
    assert code == 75 and "the same command goes on from here" in said, said
    assert not (run / "done.json").exists()
    code, said = train_until_next_checkpoint(signal.SIGKILL)
    assert code == -signal.SIGKILL and "going on from" in said, said
    assert not (run / "done.json").exists()
    train_all([load(file)])

    whole, parts = listed(made.run("unet") / "checkpoints")[-1], listed(run / "checkpoints")[-1]
    assert whole.name == parts.name
    for name in ("net", "net_ema", "net_optimizer"):
        assert (whole / f"{name}.safetensors").read_bytes() == (parts / f"{name}.safetensors").read_bytes(), name
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (made.pipeline("unet") / part).read_bytes() == (run / "pipeline" / part).read_bytes(), part


# --- the task's own arithmetic ---------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_equation(made: Made, tmp_path: Path) -> None:
    """x_t = (1 - t) x0 + t eps, target eps - x0 (Liu et al. 2022), with each image's own noise and time."""
    config = parse(made.variant("unet", tmp_path / "unet", caption_dropout=0.0), "unet")
    task = build(config, *open_data(config), tmp_path / "unet", accelerator())
    index = torch.arange(24)
    batch = task.rows.__getitems__([(i, i) for i in range(24)])
    loss, _ = task.loss(batch, 0)
    vae, seed = task.parts.vae, config.seed
    rows, _ = open_data(config)
    moments = vae.encode(to_unit(rows.pictures(range(24))))
    shape = moments.mean.shape[1:]
    raw = moments.mean + (0.5 * moments.log_var).exp() * rng.normal(seed, index, shape, Stream.POSTERIOR)
    x0 = raw * vae.config["scaling_factor"]
    t = torch.sigmoid(torch.special.ndtri(rng.uniform(seed, index, (), Stream.TIME).double())).float()
    eps = rng.normal(seed, index, shape, Stream.NOISE)
    w = t.view(-1, 1, 1, 1)
    out = task.parts.net((1 - w) * x0 + w * eps, torch.floor(1000 * t), task.parts.text.encode(rows.captions))
    assert loss.item() == pytest.approx((out - (eps - x0)).square().mean().item(), rel=1e-5)


# --- encoded at each step --------------------------------------------------------------------------------------------


def test_a_run_without_a_cache_learns_what_a_run_with_one_learns(made: Made, tmp_path: Path) -> None:
    """The same numbers go in but for rounding, mirrored and dropped alike; and in half precision nearly the same."""
    losses = {}
    for name, how in {
        "cached": {}, "live": {"latents": False, "text": False}, "half": {"precision": "fp16"}, "worker": {},
    }.items():  # fmt: skip
        changes = {
            "train__images": 96,
            "train__validate_every": 96,
            "train__sample_every": 96,
            "data__random_flip": True,
        }
        raw = made.variant("unet", tmp_path / name, **changes, train__num_workers=int(name == "worker"), cache=how)
        train_all([parse(raw, "unet")])
        rows = [json.loads(line) for line in (tmp_path / name / "log/metrics.jsonl").read_text().splitlines()]
        losses[name] = [row[key] for row in rows for key in ("loss", "held_out_loss", "train_fixed_loss") if key in row]
        assert len(losses[name]) == 4
        assert (tmp_path / name / "cache").exists() == (name != "live")
    assert losses["worker"] == losses["cached"]
    assert losses["live"] == pytest.approx(losses["cached"], rel=1e-4)
    assert losses["half"] == pytest.approx(losses["cached"], rel=1e-2) and losses["half"] != losses["cached"]


def test_a_cache_made_ahead_is_what_the_run_reads(made: Made, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    changes = {"train__images": 24, "train__sample_every": 10**6, "cache__dir": str(shared)}
    config = parse(made.variant("dit", tmp_path / "dit", **changes), "dit")
    counts = make_cache(config, *open_data(config), accelerator())
    assert (counts["pictures_made"], counts["texts_made"]) == (24 + 6, 24 + 1)  # held-out captions are known by then
    before = {x.name: x.read_bytes() for x in shared.rglob("*.npy")}
    train_all([config])
    assert {x.name: x.read_bytes() for x in shared.rglob("*.npy")} == before
    assert not (tmp_path / "dit/cache").exists()
