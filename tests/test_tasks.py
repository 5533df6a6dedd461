"""CLIP, autoencoder and both denoisers from pictures to folders that stock classes open: tiny, but whole."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm.models.dit import DiT
from ldm.models.vae import VAE
from pipelines.core import start_latents
from pipelines.text_to_image import TextToImagePipeline
from tests.shapes import PROMPTS, SIDE, Made, accelerator, chain
from training import loop
from training.batches import to_unit
from training.config import parse
from training.evaluate.grids import picture_grid
from training.fit import ConfigError
from training.run import build, open_data, train_all


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return chain(tmp_path_factory.mktemp("runs"))


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


def test_what_is_made_is_taken_up(
    made: Made, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("trained again"))
    with caplog.at_level(logging.INFO, logger="training"):
        train_all(list(made.configs.values()))
    said = [m for m in caplog.messages if "already made" in m]
    assert len(said) == 5 and all(str(made.run(n)) in m for n, m in zip(made.configs, said, strict=True))
