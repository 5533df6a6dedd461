"""A pipeline is measured from end to end, and pictures that are there already: what is written is what there is."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm import rng
from ldm.paths import RectifiedFlow
from ldm.prediction import Flow
from pipelines.folder import export
from pipelines.text_to_image import TextToImagePipeline
from tests import tiny
from training.batches import Stream
from training.data import open_rows
from training.evaluate import evaluation, measures_data, measures_model
from training.evaluate.evaluation import Asked, evaluate, own_clip
from training.evaluate.features import to_unit
from training.evaluate.grids import to_pil
from training.evaluate.measures_data import Drawn, Prompt, prompt_order
from training.evaluate.measures_draw import device_name, speeds
from training.evaluate.measures_model import held_out_losses, levels
from training.tasks.diffusion import FIXED

NEW = ["a blue whale", "a blue sky", "a blue book", "a blue bird", "a blue car"]  # captions that training has not


class Colours(nn.Module):
    """A judge that is quick: 4 x 4 means of each colour. It counts what it is shown."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.tensor(scale)), 0

    def forward(self, pictures: Tensor) -> Tensor:
        self.seen += len(pictures)
        return self.scale * nn.functional.adaptive_avg_pool2d(to_unit(pictures), 4).flatten(1)


def write_split(folder: Path, captions: list[str], seed: int) -> None:
    folder.mkdir(parents=True)
    generator, lines = torch.Generator().manual_seed(seed), []
    for i, picture in enumerate(to_pil(torch.rand(len(captions), 3, 16, 16, generator=generator))):
        picture.save(folder / f"{i:02}.png")
        lines.append(json.dumps({"file_name": f"{i:02}.png", "text": captions[i]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run: its pipeline, the config that names its CLIP, and data with a held-out part."""
    place = tmp_path_factory.mktemp("measures")
    export(
        place / "run" / "pipeline", net=tiny.unet(), vae=tiny.vae(), text=tiny.text(), path=RectifiedFlow(),
        prediction=Flow(), shift=1.0,
    )  # fmt: skip
    clip = place / "clip" / "pipeline"
    tiny.clip().save_pretrained(clip)
    tiny.tokenizer().save_pretrained(clip)
    (place / "run" / "config.yaml").write_text("text: {pretrained: clip}\n")
    write_split(place / "data" / "train", tiny.CAPTIONS[:10] + tiny.CAPTIONS[:4], 0)
    write_split(place / "data" / "test", [*NEW, tiny.CAPTIONS[0]], 1)
    return place


@pytest.fixture
def judge(monkeypatch, tmp_path) -> Colours:
    net = Colours()
    monkeypatch.setattr(evaluation, "load_features", lambda *_, **__: net)
    monkeypatch.setattr(evaluation, "_cache", lambda: tmp_path / "cache")
    return net


def quiet(*_: object) -> None:
    pass


ASKED = {"samples": 8, "steps": 2, "guidance_scale": 2.0, "seed": 5, "batch_size": 3}


def test_every_measure_of_a_pipeline(run, judge, monkeypatch, tmp_path):
    monkeypatch.setattr(measures_model, "picture_bits", partial(measures_model.picture_bits, steps=5))
    folder, data, out = run / "run" / "pipeline", run / "data", tmp_path / "out"
    asked = Asked(measures=evaluation.MEASURES, likelihoods=2, **ASKED)
    found = evaluate(folder, data, out, asked, quiet)
    saved = json.loads((out / "measures.json").read_text())
    assert saved["measures"] == json.loads(json.dumps(found.figures)) and saved["notes"] == []
    names = ("fid", "kid", "precision", "recall", "density", "coverage", "copying")
    of_prompts = [f"copying_of_{x}_prompts_mobilenetv2" for x in ("held_out", "training")]
    of_model = ["clip_score_own", "held_out_loss", "bits_per_dim", "pictures_per_second"]
    assert set(found.figures) == {*(f"{name}_mobilenetv2" for name in names), *of_prompts, *of_model}
    for name, figure in found.figures.items():
        assert all(np.isfinite(figure[x]) for x in ("value", "low", "high")), name
        assert figure["low"] <= figure["high"] + 1e-9, name
    assert saved["about"]["of held-out prompts"] == 5 and saved["about"]["drawings"] == 8
    # what is in the files is what the pipeline draws of that prompt with that seed
    (drawn,) = (out / "drawn").iterdir()
    lines = [json.loads(x) for x in (drawn / "metadata.jsonl").read_text().splitlines()]
    assert [x["file_name"] for x in lines] == sorted(x.name for x in drawn.glob("*.png"))
    assert {x["text"] for x in lines[:5]} == set(NEW)  # what training never saw comes first
    pipeline = TextToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(5 + 6)
    how = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": g}
    expected = np.asarray(pipeline(lines[6]["text"], **how).images[0])
    got = np.asarray(Image.open(drawn / "000006.png"))
    assert abs(got.astype(int) - expected).max() <= 1 and np.ptp(expected) > 20  # a batch of 3 may round otherwise

    # asked again nothing is drawn, asked for more the rest is; a lost picture comes back; other steps are apart
    times = {x.name: x.stat().st_mtime_ns for x in drawn.glob("*.png")}
    lost = (drawn / "000003.png").read_bytes()
    (drawn / "000003.png").unlink()
    more = evaluate(folder, data, out, Asked(measures=("nearest",), **ASKED | {"samples": 10}), quiet)
    assert list((out / "drawn").iterdir()) == [drawn] and len(list(drawn.glob("*.png"))) == 10
    assert all(
        times[x.name] == x.stat().st_mtime_ns for x in drawn.glob("*.png") if x.name in times and "3" not in x.name
    )
    assert (drawn / "000003.png").read_bytes() == lost and len(more.drawn.files) == 10
    evaluate(folder, data, out, Asked(measures=("throughput",), **ASKED | {"steps": 1}), quiet)
    assert len(list((out / "drawn").iterdir())) == 2


def test_held_out_loss_is_the_loops_triples(run):
    """Flow matching by hand, one row and one time at a time: mean |net((1 − t) z + t ε) − (ε − z)|²."""
    parts = TextToImagePipeline.from_pretrained(run / "run" / "pipeline").parts
    rows = open_rows(run / "data", split="test", resolution=16)
    found = held_out_losses(parts, rows, 7, 4, quiet)
    assert found.shape == (6, 8) and levels()[0] == 1 / 16
    with torch.no_grad():
        for row, level in ((0, 0), (4, 5)):
            index, t = torch.tensor([FIXED + row * 8 + level]), torch.tensor([(level + 0.5) / 8])
            moments = parts.vae.encode(rows.pictures([row]).float() / 127.5 - 1)
            drawn = rng.normal(7, index, moments.mean.shape[1:], Stream.POSTERIOR)
            z = parts.vae.latent_scale.normalize(moments.mean + torch.exp(moments.log_var / 2) * drawn)
            eps = rng.normal(7, index, z.shape[1:], Stream.NOISE)
            cond = parts.text.encode([rows.captions[row]])
            time = parts.schedule.time_input(t, parts.schedule.path)
            output = parts.net((1 - t) * z + t * eps, time, cond)
            expected = (output - (eps - z)).square().mean().item()
            assert found[row, level].item() == pytest.approx(expected, rel=1e-4)


def test_copies_are_told_from_drawings(run, judge, tmp_path):
    """A folder of pictures: training's own are copies; held-out ones are as far away as held-out ones are."""
    data, copies = run / "data", tmp_path / "copies"
    copies.mkdir()
    for file in (data / "train").glob("*.png"):
        (copies / file.name).write_bytes(file.read_bytes())
    found = evaluate(copies, data, tmp_path / "a", Asked(), quiet)
    assert found.figures["copying_mobilenetv2"]["value"] == 1
    assert found.figures["fid_mobilenetv2"]["value"] == pytest.approx(0, abs=1e-6)
    assert found.figures["precision_mobilenetv2"]["value"] == found.figures["recall_mobilenetv2"]["value"] == 1
    assert found.pairs is not None
    assert all(int(found.drawn.files[i].stem) == row and d < 1e-6 for i, row, d in found.pairs)
    assert set(found.figures).isdisjoint({"clip_score_own", "held_out_loss", "pictures_per_second"})
    assert any("clip_score is left out" in note for note in found.notes) and len(found.notes) == 3
    # held-out pictures with their captions in a metadata.jsonl
    clip = str(run / "clip" / "pipeline")
    found = evaluate(data / "test", data, tmp_path / "b", Asked(measures=("nearest", "clip_score"), clip=clip), quiet)
    assert found.figures["copying_mobilenetv2"]["value"] == 0.5
    score = found.figures[f"clip_score:{clip}"]
    assert score["value"] == pytest.approx(score["held_out_pictures"], rel=1e-5)  # they are the same pictures
    assert found.about["of held-out prompts"] == 5


def test_features_of_real_pictures_are_kept_until_something_changes(run, judge, monkeypatch, tmp_path):
    data, asked = tmp_path / "data", Asked(measures=("kid",))
    shutil.copytree(run / "data", data)

    def looked() -> int:
        before = judge.seen
        evaluate(data / "test", data, tmp_path / "out", asked, quiet)
        return judge.seen - before

    assert looked() == 14 + 6 + 6  # training, held out, drawn
    assert looked() == 6
    (data / "train" / "00.png").write_bytes((data / "test" / "01.png").read_bytes())
    assert looked() == 14 + 6  # another picture
    with torch.no_grad():
        judge.scale.mul_(2)
    assert looked() == 26 and looked() == 6  # another network
    for file in (tmp_path / "cache").iterdir():
        assert file.suffix == ".safetensors"
        file.write_bytes(file.read_bytes()[:50])
    assert looked() == 26 and looked() == 6  # broken files are made anew
    monkeypatch.setattr(evaluation, "_cache", lambda: data / "train" / "00.png")  # no folder can be made there
    assert looked() == 26


def test_most_of_a_large_set_is_chosen_by_a_fixed_seed(run, monkeypatch):
    monkeypatch.setattr(measures_data, "MOST", 5)
    rows = open_rows(run / "data", split="train", resolution=16)
    found = measures_data.real(rows, Colours(), "colours", 4, None, quiet)
    assert len(found.features) == 5 and found.chosen == sorted(set(found.chosen))
    assert torch.equal(found.features, Colours()(rows.pictures(found.chosen)))


def test_another_prompt_is_another_however_often_each_is_drawn(run, tmp_path):
    """Six drawings of three prompts, in turn: half way round lies the same prompt again."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    rows = open_rows(run / "data", split="test", resolution=16)
    asked: list[tuple[str, ...]] = []

    def judge(pictures: Tensor, texts: list[str], _: int) -> Tensor:
        asked.append(tuple(texts))
        return torch.ones(len(texts))

    for texts in (["a", "b", "c"] * 2, ["a"] * 3):
        asked.clear()
        drawn = Drawn([tmp_path / "a.png"] * len(texts), [Prompt(x, False) for x in texts])
        found = evaluation.Evaluated({}, {}, [], drawn, rows, 16)
        groups = evaluation._groups(drawn)
        evaluation._take_clip(found, Asked(), cast(Any, judge), rows, groups, quiet)
        own, others, _ = asked
        if len(set(texts)) > 1:
            assert own == tuple(texts) and all(x != y for x, y in zip(own, others, strict=True))
            assert len(groups.unique()) == 3
        else:  # there is no other; and of one prompt its pictures are resampled
            assert "of_another_prompt" not in found.figures["clip_score_own"] and len(groups.unique()) == 3


def test_half_a_line_of_a_log_is_left_out(tmp_path):
    device = torch.device("cpu")
    line = json.dumps({"pictures": 4, "seconds": 2.0, "device": device_name(device), "first": False})
    (tmp_path / "log.jsonl").write_text(f"{line}\n{line[:20]}{line}\n{line}\n{line[:9]}")
    pictures, seconds = speeds(tmp_path, device)
    assert pictures.tolist() == [4, 4] and seconds.tolist() == [2, 2]


def test_features_of_another_kind_of_network_are_not_taken(run, tmp_path):
    """Two CLIPs of the same weights may still see otherwise: by their activation, say."""
    rows, net = open_rows(run / "data", split="test", resolution=16), Colours()
    for kind, files in (("gelu", 1), ("gelu", 1), ("quick_gelu", 2)):
        net.kind = kind
        measures_data.real(rows, net, "colours", 4, tmp_path, quiet)
        assert len(list(tmp_path.iterdir())) == files


def test_prompts_are_held_out_first_and_each_once(run):
    train, held = (open_rows(run / "data", split=s, resolution=16) for s in ("train", "test"))
    order = prompt_order(train, held, 3)
    assert {p.text for p in order[:5]} == set(NEW) and all(p.held_out for p in order[:5])
    assert [p.held_out for p in order[5:]] == [False] * 10 and len({p.text for p in order}) == 15
    assert order == prompt_order(train, held, 3) != prompt_order(train, held, 4)


def test_the_clip_of_a_run_is_found_beside_it(run, tmp_path):
    assert own_clip(run / "run" / "pipeline") == str((run / "clip" / "pipeline").resolve())
    assert own_clip(tmp_path) is None
    (tmp_path / "config.yaml").write_text("text: {pretrained: nowhere}\n")
    assert own_clip(tmp_path / "pipeline") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ("fid", "fit")}, "measures: fit; expected some of fid, kid"),
        ({"measures": ()}, "measures: none; expected"),
        ({"samples": 0}, "samples is 0, expected 1 or more"),
        ({"samples": 1}, "fid needs 2 drawings or more, and there are 1; raise --samples"),
        ({"measures": ("precision_recall",), "samples": 3}, "precision_recall needs 4 drawings"),
        ({"features": "vgg"}, "'vgg' is not known, expected one of mobilenetv2, inception:FILE, clip:FOLDER"),
        ({"features": "inception:no.pth"}, r"no\.pth: no such file"),
        ({"clip": "nowhere"}, "nowhere: no config.json there"),
        ({"sampler": "magic"}, "sampler 'magic' is not one of"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"caption_column": "title"}, "title"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(run / "run" / "pipeline", run / "data", tmp_path / "out", Asked(**options), quiet)
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_nothing_to_measure(run, judge, tmp_path):
    data = run / "data"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pipeline \(model_index.json\) and no pictures"):
        evaluate(tmp_path / "empty", data, tmp_path / "out", Asked(), quiet)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        evaluate(tmp_path / "nowhere", data, tmp_path / "out", Asked(), quiet)
    with pytest.raises(ValueError, match=r"loss cannot be had: .* holds no pipeline"):
        evaluate(data / "test", data, tmp_path / "out", Asked(measures=("loss",)), quiet)
    (tmp_path / "one").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "one" / "a.png")
    (tmp_path / "one" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl: expected file_name and text of every picture"):
        evaluate(tmp_path / "one", data, tmp_path / "out", Asked(), quiet)


def test_without_held_out_pictures_what_needs_them_is_left_out(run, judge, tmp_path):
    write_split(tmp_path / "data" / "train", [f"picture {i}" for i in range(12)], 5)
    (tmp_path / "data" / "test").mkdir()
    one = tmp_path / "data" / "test"
    Image.new("RGB", (16, 16)).save(one / "a.png")
    (one / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    found = evaluate(run / "data" / "test", tmp_path / "data", tmp_path / "out", Asked(cache=tmp_path / "cache"), quiet)
    assert "fid_mobilenetv2" in found.figures and not any(x.startswith("copying") for x in found.figures)
    assert any("nearest is left out: it needs 2 held-out pictures" in note for note in found.notes)
    with pytest.raises(ValueError, match="nearest needs 2"):
        asked = Asked(measures=("nearest",), cache=tmp_path / "cache")
        evaluate(run / "data" / "test", tmp_path / "data", tmp_path / "out", asked, quiet)
