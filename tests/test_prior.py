"""DreamBooth: one caption for all pictures of a source, what each counts, and class pictures that the base draws."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, get_ident
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from ldm.cond import Cond
from ldm.denoiser import Denoiser
from pipelines.core import Parts, generate
from pipelines.stock import from_stock_pipeline
from tests import families
from tests.datasets_made import encoded, flat, parquet, tar
from training.batches import LatentBatches
from training.data import DataError, open_rows
from training.fit import ConfigError
from training.prior import class_pictures, given, with_prior
from training.schema import AdaptConfig
from training.schema.adapt import Hint
from training.schema.data import Data
from training.streams import RowStream

SQUARE: dict[str, Any] = dict(resolution=16, buckets=False)


def pictures(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"mine_{i}.png")
    return folder


def configured(tmp_path: Path, seed: int = 0, data: dict[str, Any] | None = None, **prior: Any) -> AdaptConfig:
    own = data or {"path": str(tmp_path / "own"), "instance_prompt": "sks face"}
    return AdaptConfig.model_validate(
        {
            "task": "adapt",
            "output_dir": str(tmp_path / "run"),
            "seed": seed,
            "base": "nowhere",
            "data": {**SQUARE, **own},
            "train": {"images": 8, "batch_size": 4},
            "prior": {"class_prompt": "a face", "num_class_images": 6, "num_inference_steps": 2, **prior},
        }
    )


@pytest.fixture(scope="module")
def parts() -> Parts:
    return from_stock_pipeline(families.sd())


# --- one caption, and what a row counts ------------------------------------------------------------------------------


def test_an_instance_prompt_is_the_caption_of_every_picture(tmp_path):
    folder = pictures(tmp_path / "own", 5)
    (folder / "mine_0.txt").write_text("its own")
    with pytest.raises(DataError, match=r"no captions found .* as data\.instance_prompt"):
        open_rows(Data(path=str(pictures(tmp_path / "bare", 5)), **SQUARE))
    rows = open_rows(Data(path=str(folder), instance_prompt=" a photo of sks dog ", **SQUARE))
    assert len(rows) == 4 and set(rows.texts) == {("a photo of sks dog",)}  # one is held out
    other = open_rows(Data(path=str(folder), instance_prompt="another", **SQUARE))
    assert other.fingerprint != rows.fingerprint and rows.loss_weights([0]) is None
    assert open_rows(Data(path=str(folder), instance_prompt="a photo of sks dog", **SQUARE)).fingerprint == (
        rows.fingerprint
    )


def test_sources_have_their_own_captions_and_weights(tmp_path):
    own, others = pictures(tmp_path / "own", 4), pictures(tmp_path / "others", 4, 4)
    for i in range(4, 8):
        (others / f"mine_{i}.txt").write_text(f"number {i}")
    weights = [dict(path=str(own), instance_prompt="sks", loss_weight=0.25), dict(path=str(others))]
    data = Data(sources=weights, caption_templates=("a drawing of {}",), **SQUARE)
    rows = open_rows(data)
    n = len(rows)
    captions = [rows.captions[i] for i in range(n)]
    counts = rows.loss_weights(range(n))
    assert counts is not None and counts.dtype == torch.float32 and counts.tolist() == [0.25] * 3 + [1.0] * (n - 3)
    assert captions[:3] == ["sks"] * 3 and all(x.startswith("a drawing of number ") for x in captions[3:])
    assert rows.loss_weights([n - 1, 0, 0]).tolist() == [1.0, 0.25, 0.25]  # type: ignore[union-attr]
    assert rows.head(2).loss_weights([1]).tolist() == [0.25]  # type: ignore[union-attr]
    weights[0]["loss_weight"] = 0.5
    assert (
        open_rows(Data(sources=weights, **SQUARE)).fingerprint
        != open_rows(Data(sources=[{**weights[0], "loss_weight": 1.0}, weights[1]], **SQUARE)).fingerprint
    )
    batch = LatentBatches(open_rows(Data(sources=weights, **SQUARE)), 0).__getitems__([(0, n - 1), (1, 0)])
    assert batch["loss_weight"].tolist() == [1.0, 0.5] and batch["captions"][1] == "sks"


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_tars_and_streams_may_have_one_caption_too(tmp_path, kind, streaming):
    encoded_ones = [encoded(flat(n)) for n in range(6)]
    for part, name in enumerate(("train-0", "test-0")):
        some = encoded_ones[3 * part : 3 * part + 3]
        if kind == "parquet":
            parquet(tmp_path / f"{name}.parquet", {"image": some})
        else:
            tar(tmp_path / f"{name}.tar", [(f"{i}.png", x) for i, x in enumerate(some)])
    data = Data(path=str(tmp_path), streaming=streaming, instance_prompt="sks", **SQUARE)
    if streaming:
        assert next(iter(RowStream(data, seed=0, batch=2)))["captions"] == ["sks", "sks"]
        assert list(open_rows(data, split="test").texts) == [("sks",)] * 3
    else:
        assert list(open_rows(data).texts) == [("sks",)] * 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "x", "instance_prompt": "  "}, "at least 1 character"),
        ({"path": "x", "instance_prompt": "a", "caption_column": "label"}, "leave caption_column out"),
        ({"path": "x", "instance_prompt": "a", "caption_templates": ["a {}"]}, "leave caption_templates out"),
        ({"sources": [{"path": "x", "instance_prompt": "a", "caption_column": "text"}]}, "leave caption_column out"),
        ({"sources": [{"path": "x", "loss_weight": -1}]}, "greater than or equal to 0"),
        ({"sources": [{"path": "x", "loss_weight": float("inf")}]}, "finite"),
        ({"sources": [{"path": "x", "loss_weight": 0}]}, "nothing would be learned"),
        ({"sources": [{"path": "x", "loss_weight": 2}], "streaming": True}, "not for streaming"),
        ({"sources": [{"path": "x", "instance_prompt": "a"}], "streaming": True}, "not for streaming"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        Data.model_validate(keys)


@pytest.mark.parametrize("broken", range(5))
def test_one_broken_picture_of_five_is_named_before_anything_runs(tmp_path, broken):
    folder = pictures(tmp_path / "own", 5)
    file = folder / f"mine_{broken}.png"
    file.write_bytes(file.read_bytes()[:400])
    data = Data(path=str(folder), instance_prompt="sks", **SQUARE)
    with pytest.raises(DataError, match=rf"1 of (4 rows|1 row) .*{file.name}.*max_skipped\); mend or remove them"):
        for split in ("train", "test"):
            open_rows(data, split=split)
    assert file.is_file()


# --- class pictures --------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in folder.glob("*.png")}


def test_what_is_missing_is_drawn_and_the_seed_and_the_number_decide(tmp_path, parts, monkeypatch):
    config = configured(tmp_path)
    state = torch.get_rng_state()
    folder = class_pictures(config, parts)
    assert torch.equal(torch.get_rng_state(), state)
    assert names(folder) == [f"{i:05d}.png" for i in range(6)] + ["manifest.json"]
    first = contents(folder)
    assert len(set(first.values())) == 6
    with Image.open(folder / "00000.png") as picture:
        assert picture.size == (16, 16) == parts.size
    about = json.loads((folder / "manifest.json").read_text())
    assert (about["class_prompt"], about["num_inference_steps"], about["guidance_scale"]) == ("a face", 2, 7.5)

    # after a kill the rest is drawn, by however many processes, in whatever batch, and is what it would have been
    for i in (1, 4):
        (folder / f"{i:05d}.png").unlink()
    (folder / ".00004.png.abc").write_bytes(b"half")  # of the killed one
    class_pictures(config, parts)
    assert contents(folder) == first
    there = class_pictures(configured(tmp_path / "elsewhere", num_class_images=2), parts)
    assert contents(there) == {name: first[name] for name in ("00000.png", "00001.png")}

    monkeypatch.setattr("training.prior.generate", None)  # nothing is drawn twice
    assert class_pictures(config, parts) == folder and contents(folder) == first


def test_processes_share_the_work(tmp_path, parts, monkeypatch):
    alone = class_pictures(configured(tmp_path / "alone", num_class_images=10), parts)
    config, barrier, drawn = configured(tmp_path / "shared", num_class_images=10), Barrier(2), Counter[int]()

    def counted(*args: Any, **kw: Any) -> torch.Tensor:
        drawn[get_ident()] += 1
        return generate(*args, **kw)

    monkeypatch.setattr("training.prior.generate", counted)

    def run(rank: int) -> Path:
        return class_pictures(config, parts, rank=rank, world=2, wait=lambda: barrier.wait(60))

    with ThreadPoolExecutor(2) as pool:  # two processes, as far as this function can tell
        folders = list(pool.map(run, range(2)))
    assert folders[0] == folders[1] and contents(folders[0]) == contents(alone)
    assert sorted(drawn.values()) == [1, 2]  # 4, 4 and 2 pictures; nobody draws what the other one does


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"class_prompt": "a dog"},
        {"num_inference_steps": 3},
        {"guidance_scale": 2.0},
    ],
)
def test_pictures_of_another_prompt_are_not_taken_for_them(tmp_path, parts, change):
    one = class_pictures(configured(tmp_path, num_class_images=1), parts)
    other = class_pictures(configured(tmp_path, num_class_images=1, **change), parts)
    assert one != other and contents(one) != contents(other) and len(contents(one)) == 1


def test_pictures_of_another_base_are_not_taken_for_them(tmp_path, parts):
    one = class_pictures(configured(tmp_path, num_class_images=1), parts)
    other = from_stock_pipeline(families.sd())
    other.net.conv_in.bias.data += 0.1  # type: ignore[union-attr, operator]
    two = class_pictures(configured(tmp_path, num_class_images=1), other)
    assert one != two and contents(one) != contents(two)


def test_given_pictures_count_and_stay(tmp_path, parts):
    theirs = pictures(tmp_path / "class", 4)
    before = contents(theirs)
    config = configured(tmp_path, class_data_dir=str(theirs))
    drawn = class_pictures(config, parts)
    assert len(contents(drawn)) == 2 and drawn.parent == theirs
    assert contents(theirs) == before and len(given(config)) == 4  # the drawn ones are no given ones
    enough = configured(tmp_path, class_data_dir=str(theirs), num_class_images=3, guidance_scale=3.0)
    assert not class_pictures(enough, parts).exists()


def test_a_base_that_cannot_draw_them_is_refused(tmp_path, parts):
    with pytest.raises(ConfigError, match=r"prior.class_prompt: '  ' says nothing"):
        class_pictures(configured(tmp_path, class_prompt="  "), parts)
    nan = from_stock_pipeline(families.sd())
    nan.net.conv_in.bias.data[:] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(ConfigError, match="what is no number"):
        class_pictures(configured(tmp_path), nan)
    assert not list((tmp_path / "run").rglob("*.png"))


# --- both together ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "classes"), [(5, 30), (30, 5), (9, 31)])
def test_an_epoch_shows_as_many_of_each(tmp_path, own, classes):
    pictures(tmp_path / "own", own)
    theirs = pictures(tmp_path / "class", classes, 100)
    config = configured(tmp_path, class_data_dir=str(theirs), prior_loss_weight=0.5)
    both = with_prior(config, tmp_path / "run" / "nothing_drawn")
    rows = open_rows(both.data)
    texts = [rows.captions[i] for i in range(len(rows))]
    kinds, counts = np.unique(texts, return_counts=True)
    assert kinds.tolist() == ["a face", "sks face"] and abs(counts[0] - counts[1]) <= 0.5
    weights = rows.loss_weights(range(len(rows)))
    assert weights is not None
    assert {(t, w) for t, w in zip(texts, weights.tolist(), strict=True)} == {("a face", 1.0), ("sks face", 2.0)}


def test_sources_of_ones_own_keep_their_shares(tmp_path, parts):
    one, two = pictures(tmp_path / "one", 6), pictures(tmp_path / "two", 6, 6)
    for i in range(6, 12):
        (two / f"mine_{i}.txt").write_text("with its caption")
    sources = [dict(path=str(one), instance_prompt="sks", repeats=3), dict(path=str(two), loss_weight=0.5)]
    config = configured(tmp_path, data={"sources": sources}, num_class_images=8)
    both = with_prior(config, class_pictures(config, parts))
    rows = open_rows(both.data)
    weights = rows.loss_weights(range(len(rows))).tolist()  # type: ignore[union-attr]
    seen = [(rows.captions[i], weights[i]) for i in range(len(rows))]
    assert set(seen) == {("sks", 2.0), ("with its caption", 1.0), ("a face", 2.0)}
    counts = {text: sum(x == text for x, _ in seen) for text in ("sks", "with its caption", "a face")}
    n = {x.path: len(open_rows(Data(path=x.path, instance_prompt="x", **SQUARE))) for x in config.data.sources}
    assert counts["sks"] == 3 * n[str(one)] and counts["with its caption"] == n[str(two)]
    assert abs(counts["a face"] - counts["sks"] - counts["with its caption"]) <= 1
    assert AdaptConfig.model_validate(both.model_dump()) == both  # it can be written down and read again


def test_what_has_no_numbers_or_no_pictures_is_refused(tmp_path):
    pictures(tmp_path / "own", 3)
    with pytest.raises(ConfigError, match="no class pictures"):
        with_prior(configured(tmp_path), tmp_path / "none")
    streamed = configured(tmp_path, data={"path": "x", "streaming": True, "instance_prompt": "sks"})
    with pytest.raises(ConfigError, match=r"data\.streaming"):
        with_prior(streamed, tmp_path / "none")
    shown = configured(tmp_path).model_copy(update={"conditioning": Hint(name="image")})
    with pytest.raises(ConfigError, match="no second picture"):
        with_prior(shown, tmp_path / "none")


def test_the_loss_is_diffusers(tmp_path, parts):
    """``loss = mse(own) + prior_loss_weight * mse(class)`` of train_dreambooth.py, for a batch of half each."""
    pictures(tmp_path / "own", 5)
    theirs = pictures(tmp_path / "class", 5, 100)
    config = configured(tmp_path, class_data_dir=str(theirs), prior_loss_weight=0.3)
    rows = open_rows(with_prior(config, tmp_path / "none").data)
    own = [i for i in range(len(rows)) if rows.captions[i] == "sks face"][:3]
    classes = [i for i in range(len(rows)) if rows.captions[i] == "a face"][:3]
    batch = LatentBatches(rows, 0).__getitems__(list(enumerate(own + classes)))
    s = parts.schedule
    denoiser = Denoiser(parts.net, s.path, s.prediction, s.time_input)
    z, eps, t = families.waves(6, 4, 8, 8), families.waves(6, 4, 8, 8).flip(0), torch.linspace(0.1, 0.9, 6)
    with torch.no_grad():
        cond: Cond = parts.text.encode(batch["captions"])
        ours = (denoiser.loss(z, t, cond, eps=eps) * batch["loss_weight"]).mean()
        c = s.path.coeffs(t, 4)
        predicted = denoiser(c.alpha * z + c.sigma * eps, t, cond).output
    error = (predicted.float() - eps).square()
    truth = error[:3].mean() + 0.3 * error[3:].mean()
    assert abs(ours / truth - 1) < 1e-5  # float32
