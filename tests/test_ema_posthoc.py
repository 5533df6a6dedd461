"""Averages put together after the run against those that were tracked all along."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.integrate import quad
from torch import nn

from training.config import dump
from training.ema import EMA
from training.fit import ConfigError
from training.posthoc import (
    ema_pipeline,
    gamma_to_sigma_rel,
    inner_products,
    reconstruct,
    replace_weights,
    sigma_rel_to_gamma,
    snapshots,
    solve_weights,
)
from training.schema import AutoencoderConfig
from training.schema.optim import EMA as EMAConfig

STEPS, BATCH, SIZE = 4000, 4, 500


# --- the mathematics -------------------------------------------------------------------------------------------------


def test_widths_are_standard_deviations():
    """σ_rel of a power by integration of its moments; and the paper's own pair, 0.10 for γ = 6.94 (§3)."""
    for gamma in (0.0, 0.5, 3.0, 6.94, 16.97, 60.0):
        mean = quad(lambda t, g=gamma: t * (g + 1) * t**g, 0, 1)[0]
        square = quad(lambda t, g=gamma: t * t * (g + 1) * t**g, 0, 1)[0]
        assert gamma_to_sigma_rel(gamma) == pytest.approx((square - mean**2) ** 0.5, rel=1e-6)
        assert sigma_rel_to_gamma(gamma_to_sigma_rel(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-9)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=5e-3)
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=5e-3)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, 1.0])
def test_other_widths_do_not_exist(width: float):
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.289"):
        sigma_rel_to_gamma(width)


def test_inner_products_are_integrals():
    ta, ga, tb, gb = np.array([3.0, 7.0]), np.array([2.0, 17.0]), np.array([5.0, 7.0]), np.array([6.9, 0.5])
    found = inner_products(ta, ga, tb, gb)
    for i in range(2):
        for j in range(2):

            def both(t, i=i, j=j):
                a = (ga[i] + 1) * t ** ga[i] / ta[i] ** (ga[i] + 1)
                return a * (gb[j] + 1) * t ** gb[j] / tb[j] ** (gb[j] + 1)

            assert found[i, j] == pytest.approx(quad(both, 0, min(ta[i], tb[j]))[0], rel=1e-8)


def test_a_stored_average_is_taken_as_it_is():
    times = np.repeat([1e8, 2e8, 3e8], 2)  # images of a long run: nothing overflows
    gammas = np.tile([sigma_rel_to_gamma(0.05), sigma_rel_to_gamma(0.1)], 3)
    found = solve_weights(times, gammas, 2e8, gammas[1])
    np.testing.assert_allclose(found, [0, 0, 0, 1, 0, 0], atol=1e-9)


def test_no_other_weights_come_nearer():
    """The least squares of profiles on a fine grid, under a sum of one, by another route: a basis of what may move."""
    t = (np.arange(200_000) + 0.5) / 200_000
    times = np.repeat(np.linspace(0.25, 1, 4), 2)
    gammas = np.tile([17.0, 7.0], 4)
    profiles = np.where(t <= times[:, None], (gammas[:, None] + 1) * t ** gammas[:, None], 0)
    profiles /= profiles.mean(1, keepdims=True)
    target = 4.0 * t**3
    first, moves = profiles[0], profiles[1:] - profiles[0]
    rest = np.linalg.lstsq(moves @ moves.T, moves @ (target - first), rcond=None)[0]
    expected = np.append(1 - rest.sum(), rest)
    found = solve_weights(times, gammas, 1.0, 3.0)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found, expected, atol=2e-4)  # the grid's error at the profiles' edges


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> tuple[Path, dict[float, torch.Tensor], torch.Tensor]:
    """A random walk of 4,000 steps, 16 snapshots of two widths; and other widths, tracked all along in float64."""
    folder = tmp_path_factory.mktemp("ema")
    generator = torch.Generator().manual_seed(0)
    net = nn.ParameterDict({"a": torch.randn(SIZE, generator=generator) * 30, "b": torch.zeros(SIZE)})
    ema = EMA(net.named_parameters(), 0.0, EMAConfig(snapshot_every=STEPS * BATCH // 16), end=STEPS * BATCH)
    truth = {width: torch.zeros(2, SIZE, dtype=torch.float64) for width in (0.04, 0.07, 0.1, 0.15, 0.2)}
    for k in range(STEPS):
        with torch.no_grad():
            for p in net.values():
                p.add_(torch.randn(SIZE, generator=generator))
        now = torch.stack([p.detach().double() for p in net.values()])
        for width, average in truth.items():
            average.lerp_(now, 1 - (k / (k + 1)) ** (sigma_rel_to_gamma(width) + 1))
        ema.update(k, BATCH * (k + 1))
        if ema.snapshot_due(BATCH * k, BATCH * (k + 1)):
            ema.write_snapshot(folder, BATCH * (k + 1))
    return folder, truth, now


def error(folder: Path, width: float, truth: torch.Tensor, last: torch.Tensor, **how) -> float:
    """Of the reconstruction, as a share of how far the true average is from the last weights."""
    found = torch.stack(list(reconstruct(folder, width, **how).values())).double()
    return ((found - truth).norm() / (truth - last).norm()).item()


@pytest.mark.parametrize("width, bound", [(0.04, 4e-3), (0.07, 8e-4), (0.1, 1e-5), (0.15, 8e-4), (0.2, 5e-3)])
def test_any_width_is_put_together_afterwards(width: float, bound: float, walked):
    """Measured: 2.6e-3, 5.4e-4, 1.5e-6 (a width that is stored, in float32), 5.0e-4 and 3.0e-3. A width that is wrong
    by 2% is off by 1.5e-2 or more."""
    folder, truth, last = walked
    assert len(snapshots(folder)) == 32
    assert error(folder, width, truth[width], last) < bound
    assert error(folder, width * 1.02, truth[width], last) > 1.5e-2


def test_it_can_be_put_together_for_an_earlier_time(walked):
    folder, _, _ = walked
    half = STEPS * BATCH // 2
    stored = load_file(folder / f"images_{half:09d}_sigma_rel_0.1.safetensors")
    for name, x in reconstruct(folder, 0.1, images=half).items():
        torch.testing.assert_close(x, stored[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=f"no snapshot at 1234 images; there are 1000, 2000, .*{STEPS * BATCH}"):
        reconstruct(folder, 0.1, images=1234)


def test_weights_that_stand_still_stay_what_they_are(tmp_path: Path):
    """To float32: the sum of the combination's weights is one."""
    w = nn.Parameter(torch.tensor([1.0, -1e4, 3e-5]))
    ema = EMA([("w", w)], 0.0, EMAConfig(snapshot_every=100))
    for k in range(8):
        ema.update(k, 100 * (k + 1))
        ema.write_snapshot(tmp_path, 100 * (k + 1))
    torch.testing.assert_close(reconstruct(tmp_path, 0.2)["w"], w.detach(), rtol=1e-6, atol=0)


def test_a_player_that_joined_late_has_its_own_time(tmp_path: Path):
    """Snapshots bear the run's images; the averages count from the player's start."""
    folders = tmp_path / "first", tmp_path / "late"
    for folder, start in zip(folders, (0, 5000), strict=True):
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.zeros(20))
        ema = EMA([("w", w)], 0.0, EMAConfig(snapshot_every=100), start=start)
        for k in range(1, 9):
            with torch.no_grad():
                w.add_(torch.randn(20, generator=generator))
            ema.update(k - 1, start + 100 * k)
            ema.write_snapshot(folder, start + 100 * k)
    assert reconstruct(folders[0], 0.15)["w"].equal(reconstruct(folders[1], 0.15)["w"])
    assert reconstruct(folders[0], 0.15, images=600)["w"].equal(reconstruct(folders[1], 0.15, images=5600)["w"])


def test_a_damaged_or_odd_snapshot_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no snapshots in it; train with ema\.snapshot_every set"):
        reconstruct(tmp_path, 0.1)
    ema = EMA([("w", nn.Parameter(torch.ones(2)))], 0.0, EMAConfig(snapshot_every=100))
    for k in range(2):
        ema.update(k, 100 * (k + 1))
        ema.write_snapshot(tmp_path, 100 * (k + 1))
    odd = tmp_path / "images_000000100_sigma_rel_0.1.safetensors"
    about = {"images": "100", "time": "100", "sigma_rel": "0.1"}
    save_file({"v": torch.ones(2)}, odd, metadata=about)
    with pytest.raises(ConfigError, match=r"images_000000100_sigma_rel_0.1.safetensors: other weights"):
        reconstruct(tmp_path, 0.1)
    odd.write_bytes(odd.read_bytes()[:20])
    with pytest.raises(ConfigError, match=r"images_000000100_sigma_rel_0.1.safetensors: no snapshot that can be read"):
        reconstruct(tmp_path, 0.1)


# --- a pipeline ------------------------------------------------------------------------------------------------------


def snapshot(folder: Path, names: dict[str, torch.Tensor]) -> None:
    """Of weights that stood still."""
    ema = EMA([(k, nn.Parameter(v)) for k, v in names.items()], 0.0, EMAConfig(snapshot_every=8))
    ema.update(0, 8)
    ema.write_snapshot(folder, 8)


def autoencoder(run: Path, data: Path) -> AutoencoderConfig:
    model = {"block_out_channels": [8, 8], "norm_num_groups": 4, "mid_block_add_attention": False}
    parts = {"data": {"path": str(data), "resolution": 16, "held_out": 0.25}, "train": {"images": 8, "batch_size": 4}}
    return AutoencoderConfig(task="autoencoder", output_dir=str(run), model=model, **parts)


def test_weights_go_to_the_part_that_has_them(tmp_path: Path):
    """Behind a wrapper's name or bare, into shards, in the file's precision; every other file as it was."""
    files = {
        "unet/model-1.safetensors": {"a": torch.zeros(2), "fixed": torch.ones(1)},
        "unet/model-2.safetensors": {"b": torch.zeros(3, dtype=torch.float16)},
        "vae/model.safetensors": {"a": torch.zeros(4), "b": torch.zeros(3)},  # other shapes
    }
    for name, flat in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(flat, tmp_path / name)
    untouched = (tmp_path / "vae/model.safetensors").read_bytes()
    for prefix, value in (("net.", 1.0), ("", 2.0)):
        replace_weights(tmp_path, {f"{prefix}a": torch.full((2,), value), f"{prefix}b": torch.full((3,), value)})
        first, second = (load_file(tmp_path / "unet" / f"model-{i}.safetensors") for i in (1, 2))
        assert first["a"].tolist() == [value] * 2 and first["fixed"].tolist() == [1]
        assert second["b"].dtype == torch.float16 and second["b"].tolist() == [value] * 3
    assert (tmp_path / "vae/model.safetensors").read_bytes() == untouched
    with pytest.raises(ConfigError, match=r"no part of it has the weights of the snapshots, as net\.c"):
        replace_weights(tmp_path, {"net.c": torch.zeros(1)})


def test_an_autoencoders_latents_are_measured_anew(tmp_path: Path):
    """Weights in which only the quant conv differs, by a factor of 3: so does the latents' scale. What is written is
    otherwise the run's own export."""
    from ldm.models.vae import VAE

    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    data.mkdir()
    generator = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(data / f"{i}.png")
    (data / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,a picture\n" for i in range(8)))
    config = autoencoder(run, data)
    torch.manual_seed(0)
    vae = VAE(**config.model.model_dump(), sample_size=16)
    flat = {name: p.detach().clone() for name, p in vae.named_parameters()}
    for name in ("quant_conv.weight", "quant_conv.bias"):
        flat[name][:4] *= 3
    snapshot(run / "ema" / "vae", flat)
    (run / "config.yaml").write_text(dump(config))
    with pytest.raises(ConfigError, match="expected the folder of a run that has written its pipeline"):
        ema_pipeline(run, 0.1, out)
    (run / "pipeline").mkdir()
    assert ema_pipeline(run, 0.1, out) == out
    assert not list(tmp_path.glob(".out*"))
    made = VAE.from_diffusers(out)
    assert all(p.equal(flat[name]) for name, p in made.named_parameters())
    with torch.no_grad():
        vae.load_state_dict(flat)
    assert made.latent_scale.scale != VAE(**config.model.model_dump()).latent_scale.scale
    with pytest.raises(ConfigError, match="is there already"):
        ema_pipeline(run, 0.1, out)


def test_a_clips_names_are_those_of_its_file(tmp_path: Path):
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    text = {**tower, "vocab_size": 16, "max_position_embeddings": 8}
    small = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=4)
    run = tmp_path / "run"
    clip = CLIPModel(small)
    clip.save_pretrained(run / "pipeline")
    flat = {f"clip.{name}": torch.randn(p.shape) for name, p in clip.named_parameters()}
    snapshot(run / "ema" / "clip", flat)
    config = {"task": "clip", "output_dir": str(run), "data": {"path": "nowhere"}, "train": {"images": 8}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    made = CLIPModel.from_pretrained(ema_pipeline(run, 0.1, tmp_path / "out"))
    assert all(p.equal(flat[f"clip.{name}"]) for name, p in made.named_parameters())
    with pytest.raises(ValueError, match=r"sigma_rel 0\.5"):
        ema_pipeline(run, 0.5, tmp_path / "other")
    assert not (tmp_path / "other").exists()
