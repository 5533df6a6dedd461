"""The tasks' runs: refused, killed and gone on with, in another precision, with a cache and without one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import rng
from pipelines.text_to_image import TextToImagePipeline
from tests.shapes import PROMPTS, Made, accelerator, chain
from tests.toy import begun
from training import loop
from training.batches import Stream, to_unit
from training.cache import make_cache
from training.checkpoint import CheckpointError, listed
from training.cli import main
from training.config import dump, load, parse
from training.data import DataError
from training.evaluate.grids import picture_grid
from training.fit import ConfigError
from training.run import build, check_folder, inputs_of, is_done, open_data, train_all


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return chain(tmp_path_factory.mktemp("runs"), ("clip", "vae", "unet"))


# --- refusing --------------------------------------------------------------------------------------------------------


def test_another_config_in_the_same_folder_is_refused_by_key(made: Made) -> None:
    raw = made.variant("unet", made.run("unet"), optimizer__learning_rate=1e-5)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.003 there, 1e-05 here"):
        train_all([parse(raw, "unet")])


def test_a_run_begun_before_a_key_was_there_has_its_default(made: Made, tmp_path: Path) -> None:
    config = parse(made.variant("unet", tmp_path / "old"), "unet")
    old = yaml.safe_load(dump(config))
    del old["train"]["allow_tf32"], old["seed"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(old))
    check_folder(config)
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump({**old, "gone": 1}))
    with pytest.raises(ConfigError, match="gone: 1 there, None here"):
        check_folder(config)


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


def test_a_retrained_autoencoder_is_noticed(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = copied_vae(made, tmp_path / "vae")
    short = {"train__images": 24, "train__sample_every": 10**6, "vae__pretrained": str(vae)}
    config = parse(made.variant("unet", tmp_path / "unet", **short), "unet")
    files: list[Path] = []
    digest = hashlib.file_digest
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda file, how: (files.append(Path(file.name)), digest(file, how))[1])
        train_all([config])
    rows, _ = open_data(config)
    assert is_done(config, inputs_of(config, rows))
    assert not is_done(config, inputs_of(config, rows) | {"data": "other"})
    read = [file for file in files if not file.is_relative_to(tmp_path / "unet")]  # but for its own checkpoints
    assert len(read) == len({*read}) and {file.parent for file in read} == {vae, made.pipeline("clip")}  # each once
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


def command_line(arguments: list[str], said: Path) -> None:
    """``ldm`` in a process of its own; what it says goes to a file."""
    handle = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 2)
    sys.argv = ["ldm", *arguments]
    main()


def test_a_run_killed_twice_ends_in_the_same_bits(made: Made, tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL, then to the end; and measures and samples, left out here, disturb no weight."""
    run, file = tmp_path / "unet", tmp_path / "unet.yaml"
    quiet = {"train__validate_every": 10**6, "train__sample_every": 10**6}
    file.write_text(yaml.safe_dump(made.variant("unet", run, **quiet)))

    def train_until_next_checkpoint(number: int) -> tuple[int | None, str]:
        known, said = listed(run / "checkpoints")[-1:], tmp_path / f"{number}.txt"
        child = begun(command_line, ["train", str(file)], said)
        while child.is_alive() and listed(run / "checkpoints")[-1:] == known:
            time.sleep(0.005)
        os.kill(child.pid, number)
        child.join(300)
        return child.exitcode, " ".join(said.read_text().split())

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
            "train__sample_every": 10**6,
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
