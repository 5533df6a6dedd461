"""`ldm adapt`: from a folder of pictures to a config that fits its base, and to a trained adapter."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.adapting import base
from training import adapt_auto, measure
from training.adapt_auto import adapt, adapt_config, shown_by_autoencoder, written
from training.config import load
from training.fit import ConfigError
from training.preflight import DoesNotFit
from training.run import open_data
from training.schema import AdaptConfig
from training.tables import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("auto")


def folder(place: Path, count: int = 5) -> Path:
    place.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return place


def made(root: Path, images: Path, family: str = "sd", trigger: str = "sks box", **how) -> AdaptConfig:
    return adapt_config(str(base(family, root)), images, trigger, root / "run", fitted=False, **how)


@pytest.mark.parametrize(
    ("family", "steps", "weighting"),
    [("sd", 30, "min_snr"), ("sdxl", 30, "min_snr"), ("sd3", 28, "unit"), ("pixart alpha", 20, "min_snr")],
)
def test_defaults_are_the_familys(
    root: Path, tmp_path: Path, family: str, steps: int, weighting: str, monkeypatch
) -> None:
    monkeypatch.setattr(adapt_auto, "SMALL", 0)  # bases as large as the published ones
    config = made(root, folder(tmp_path / "p"), family, "red box")
    assert config.data.resolution == 16  # the base's own
    assert config.sample.num_inference_steps == steps and config.weighting.name == weighting
    assert config.data.instance_prompt == "red box" and config.sample.prompts[0] == "red box"
    assert config.lora is not None and config.lora.rank == 8 and config.train.images == 1_600


def test_a_small_base_learns_by_higher_rates_and_more_images(root: Path, tmp_path: Path) -> None:
    config = made(root, folder(tmp_path / "p"))
    assert config.lora is not None and config.lora.rank == 16 and config.train.images == 6_000
    assert config.optimizer.learning_rate == 1e-3 and config.train.validate_every == 1_500
    assert (config.validation.rows, config.validation.levels) == (4, 4)


def test_the_number_of_pictures_decides_rank_and_length(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(adapt_auto, "SMALL", 0)
    config = made(root, folder(tmp_path / "p", 30))
    assert config.lora is not None and config.lora.rank == 16 and config.train.images == 3_000


def test_captions_beside_the_pictures_are_taken(root: Path, tmp_path: Path) -> None:
    images = folder(tmp_path / "p", 2)
    (images / "0.txt").write_text("a red box")
    with pytest.raises(DataError, match=r"1 of 2 pictures has a caption.*1.txt is missing"):
        made(root, images)
    (images / "1.txt").write_text("a blue box")
    config = made(root, images)
    assert config.data.instance_prompt is None and config.data.caption_templates == ("sks box, {}",)
    (images / "1.txt").write_text("a Sks Box in the sun")
    assert made(root, images).data.caption_templates == ()


def test_methods(root: Path, tmp_path: Path) -> None:
    images = folder(tmp_path / "p")
    dream = made(root, images, method="dreambooth")
    assert dream.prior is not None and dream.prior.class_prompt == "box" and dream.prior.num_class_images == 100
    with pytest.raises(ConfigError, match="needs the class too, as 'sks dog'"):
        made(root, images, method="dreambooth", trigger="sks")
    words = made(root, images, method="textual_inversion", trigger="toy")
    assert [new.token for new in words.new_tokens] == ["<toy>"] and not words.train_denoiser and words.lora is None
    assert all("<toy>" in (s.instance_prompt or "") for s in words.data.sources)
    whole = made(root, images, method="finetune")
    assert whole.whole and whole.optimizer.learning_rate == 1e-5
    with pytest.raises(ConfigError, match="expected one of lora, dreambooth"):
        made(root, images, method="hypernetwork")  # type: ignore[arg-type]


def test_a_step_that_does_not_fit_gets_smaller(root: Path, tmp_path: Path, monkeypatch) -> None:
    images, where = folder(tmp_path / "p", 9), str(base("sd", root))
    assert adapt_config(where, images, "sks box", tmp_path / "run").train.batch_size == 8
    short = adapt_config(where, images, "sks box", tmp_path / "run", overrides=["train.images=3"]).train
    assert (short.batch_size, short.gradient_accumulation_steps) == (2, 1)  # not more than the run sees
    monkeypatch.setattr(measure, "free_memory", lambda device: 1)
    small = adapt_config(where, images, "sks box", tmp_path / "run").train
    assert (small.batch_size, small.gradient_accumulation_steps, small.gradient_checkpointing) == (1, 4, 1.0)
    said = adapt_config(where, images, "sks box", tmp_path / "run", overrides=["train.batch_size=2"]).train
    assert said.batch_size == 2


def test_a_run_that_does_not_fit_is_not_begun(root: Path, tmp_path: Path, monkeypatch) -> None:
    images, where = folder(tmp_path / "p"), str(base("sd", root))
    monkeypatch.setattr(measure, "free_memory", lambda device: 1000)
    monkeypatch.setattr("training.run.train_all", None)
    with pytest.raises(
        DoesNotFit, match=r"(?s)runs/box: does not fit: a step takes .*\nnothing is begun; `ldm train --no"
    ):
        adapt(where, images, "sks box", out=tmp_path / "runs/box", yes=True)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["box.yaml"]


def test_bad_input_is_named(root: Path, tmp_path: Path) -> None:
    images = folder(tmp_path / "p")
    with pytest.raises(DataError, match="no such folder"):
        made(root, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in it"):
        made(root, tmp_path / "empty")
    with pytest.raises(ConfigError, match="--trigger: says nothing"):
        made(root, images, trigger="  ")
    with pytest.raises(ConfigError, match="says nothing to the base's tokenizer"):
        made(root, images, "pixart alpha", trigger="苹果")
    for name in (tmp_path / "gone", images):
        with pytest.raises(ConfigError, match=f"--base: .*{name.name}"):
            adapt_config(str(name), images, "sks box", tmp_path / "run")
    with pytest.raises(ConfigError, match="rank_of"):
        made(root, images, overrides=["lora.rank_of=3"])


def test_other_settings_before_it_has_begun_are_taken(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The answer was no, or the check was broken off: the next call's overrides count. What a person may have changed
    in the file is kept."""
    monkeypatch.setattr("typer.confirm", lambda *a, **k: False)
    images, where, file = folder(tmp_path / "p"), str(base("sd", root)), tmp_path / "runs/box.yaml"
    for rank in (2, 3):
        how = [f"lora.rank={rank}"]
        assert adapt(where, images, "sks box", out=tmp_path / "runs/box", overrides=how, check=False) is None
        assert f"rank: {rank}" in file.read_text()
    assert "rank: 2" in file.with_name("box.yaml.old").read_text()
    assert "it is kept as box.yaml.old" in capsys.readouterr().out


def test_a_base_that_cannot_show_the_pictures_is_named(root: Path, tmp_path: Path, monkeypatch) -> None:
    """Random weights give noise back; a perfect autoencoder gives all."""
    config = made(root, folder(tmp_path / "p"))
    rows, _ = open_data(config)
    assert shown_by_autoencoder(config, rows).startswith("WARNING: the base's autoencoder gives 5 pictures back at ")

    class Perfect:
        factor = 4

        def eval(self):
            return self

        def encode(self, x):
            return SimpleNamespace(mean=x)

        def decode(self, z):
            return z + 0.1  # 0.05 in [0, 1], where nothing is clamped: 26 dB

    count, decibels = adapt_auto._autoencoder_psnr(config, Grey(), Perfect())
    assert count == 3 and decibels == pytest.approx(-20 * math.log10(0.05), abs=0.1)


class Grey:
    """Three rows of one colour, and one of another shape."""

    bucket = np.array([0, 0, 1, 0])

    def pictures(self, rows: list[int]) -> torch.Tensor:
        assert rows == [0, 1, 3]
        return torch.full((len(rows), 3, 16, 16), 128, dtype=torch.uint8)


def test_it_writes_shows_checks_and_trains(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    images, how = folder(tmp_path / "p"), ["train.images=4", "train.batch_size=2", "train.report_to=none"]
    how += ["sample.num_inference_steps=2", "train.mixed_precision=no", "lora.rank=2"]
    call = dict(trigger="sks box", out=tmp_path / "runs/box", yes=True, overrides=how)
    run = adapt(str(base("sd", root)), images, **call)
    assert (
        run is not None
        and run == tmp_path / "runs/box"
        and (run / "adapter/pytorch_lora_weights.safetensors").is_file()
    )
    file = tmp_path / "runs/box.yaml"
    shown = capsys.readouterr().out
    assert file.read_text() in shown and "instance_prompt: sks box" in shown
    config = load(file)
    assert isinstance(config, AdaptConfig) and written(config) == file.read_text() and "seed" not in file.read_text()
    assert load(run / "config.yaml") == config
    with pytest.raises(ConfigError, match=r"lora.rank: 2 there, 1 here.*`ldm train .*config.yaml` goes on with"):
        adapt(str(base("sd", root)), images, **{**call, "overrides": [*how, "lora.rank=1"]})
    monkeypatch.setattr("training.preflight.rehearse", None)  # nothing is rehearsed again, and nobody is asked
    monkeypatch.setattr("training.loop.train", None)
    assert adapt(str(base("sd", root)), images, **{**call, "yes": False}) == run
    with pytest.raises(ConfigError, match=r"holds a run of 4 images\. Its optimizer\.lr_scheduler cosine"):
        adapt(str(base("sd", root)), images, **{**call, "overrides": [*how, "train.images=8"]})
