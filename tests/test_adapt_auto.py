"""`ldm adapt`: from a folder of pictures to a config that fits its base, and to a trained adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.adapting import base
from training import measure
from training.adapt_auto import adapt, adapt_config, written
from training.config import load
from training.fit import ConfigError
from training.preflight import DoesNotFit
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
def test_defaults_are_the_familys(root: Path, tmp_path: Path, family: str, steps: int, weighting: str) -> None:
    config = made(root, folder(tmp_path / "p"), family, "red box")
    assert config.data.resolution == 16  # the base's own
    assert config.sample.num_inference_steps == steps and config.weighting.name == weighting
    assert config.data.instance_prompt == "red box" and config.sample.prompts[0] == "red box"
    assert config.lora is not None and config.lora.rank == 8 and config.train.images == 1_600


def test_the_number_of_pictures_decides_rank_and_length(root: Path, tmp_path: Path) -> None:
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
    images, where = folder(tmp_path / "p"), str(base("sd", root))
    assert adapt_config(where, images, "sks box", tmp_path / "run").train.batch_size == 8
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


def test_it_writes_shows_checks_and_trains(root: Path, tmp_path: Path, capsys) -> None:
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
    with pytest.raises(ConfigError, match=r"box.yaml: is there and says something else"):
        adapt(str(base("sd", root)), images, **{**call, "overrides": [*how, "lora.rank=1"]})
