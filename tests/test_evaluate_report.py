"""Contact sheets, the judge over a whole run, and the report: what they show is what there is."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.paths import RectifiedFlow
from ldm.prediction import Flow
from pipelines.folder import export
from pipelines.text_to_image import TextToImagePipeline
from tests import tiny
from training.evaluate.features import to_unit
from training.evaluate.grids import pairs_grid, picture_grid, to_pil
from training.evaluate.report import _smooth, read_log, write_report
from training.evaluate.retrieval import evaluate_retrieval, judge

# ---------------------------------------------------------------- contact sheets


def test_grid_places_pictures_in_reading_order():
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    sheet = picture_grid(colours[:, :, None, None].expand(3, 3, 8, 8), columns=2, cell=40)
    assert sheet.size == (8 + 2 * 48, 8 + 2 * 48)
    centres = [sheet.getpixel(p) for p in ((28, 28), (76, 28), (28, 76), (76, 76))]
    assert centres == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_grid_captions_stay_in_their_cell():
    pictures = torch.ones(2, 3, 8, 8)
    long = "a very long caption of many words that no cell of this width could ever hold " * 3
    sheet = picture_grid(pictures, [long, ""], cell=64).convert("L")
    ink = [i % sheet.width for i, v in enumerate(sheet.tobytes()) if v < 200]
    assert ink  # something is written
    assert min(ink) >= 8 - 1 and max(ink) <= 8 + 64 + 1  # under the first picture, a pixel of smoothing allowed
    single = picture_grid(pictures, ["w" * 80, "été — 𝄞 <b>"], cell=64)  # one word without a space, odd characters
    assert single.size == sheet.size
    with pytest.raises(ValueError, match="1 captions for 2 pictures"):
        picture_grid(pictures, ["one"])
    with pytest.raises(ValueError, match="no pictures"):
        picture_grid([])


def test_pairs_stand_side_by_side():
    black, white = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    sheet = pairs_grid(black, white, columns=1, cell=40)
    assert sheet.getpixel((28, 28)) == (0, 0, 0)
    assert sheet.getpixel((76, 28)) == (255, 255, 255)
    assert sheet.getpixel((28, sheet.height - 60)) == (0, 0, 0)
    with pytest.raises(ValueError, match="same shape"):
        pairs_grid(black, white[:1])


def test_to_pil_rounds_and_keeps_bytes():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert list(to_pil(pixels)[0].getchannel("G").tobytes()) == list(range(256))


# ---------------------------------------------------------------- the measure over a data set


class Pictures:
    """Random pictures, of which the last repeats the caption of the first."""

    def __init__(self, count: int = 20):
        self.captions = [f"thing {i}" for i in range(count)] + ["thing 0"]
        g = torch.Generator().manual_seed(3)
        self.all = torch.randint(0, 256, (count + 1, 3, 4, 4), generator=g, dtype=torch.uint8)

    def pictures(self, indices):
        return self.all[indices]


class Flatten(torch.nn.Module):
    def forward(self, x):
        return to_unit(x).flatten(1)


def test_judge_over_a_data_set():
    rows, calls, told = Pictures(), [], []

    def right(prompts, seeds):
        calls.append((prompts, seeds))
        return rows.all[[rows.captions.index(p) for p in prompts]].float() / 255

    options = {"samples_per_prompt": 2, "batch_size": 7, "progress": lambda *counts: told.append(counts)}
    judged = judge(right, rows, Flatten(), seed=7, **options)
    assert judged.retrieval.top1 == 1 and judged.blank == 0
    assert len(judged.prompts) == 20  # equal captions are one concept
    assert [s for _, seeds in calls for s in seeds] == list(range(7, 47))
    assert [p for prompts, _ in calls for p in prompts][:4] == ["thing 0", "thing 0", "thing 1", "thing 1"]
    assert told[-1] == (40, 40) and len(told) == 6
    assert judged.drawings.shape == (16, 3, 4, 4)
    for i, drawing in zip(judged.shown, judged.drawings, strict=True):
        assert torch.equal(drawing, rows.all[i].float() / 255)
    other = judge(right, rows, Flatten(), seed=8)
    assert other.shown != judged.shown  # the seed chooses what is shown

    def blank(prompts, seeds):
        return torch.ones(len(prompts), 3, 4, 4)

    empty = judge(blank, rows, Flatten(), seed=7)
    assert empty.blank == 20 and empty.retrieval.top1 <= 1 / 20


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> tuple[Path, Path]:
    """A pipeline folder with random weights, and an imagefolder of 12 pictures of 10 captions."""
    place = tmp_path_factory.mktemp("retrieval")
    folder = export(
        place / "pipeline", net=tiny.unet(), vae=tiny.vae(), text=tiny.text(), path=RectifiedFlow(), prediction=Flow(),
        shift=1.0,
    )  # fmt: skip
    data = place / "data" / "train"
    data.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    rows = []
    for i, picture in enumerate(to_pil(torch.rand(12, 3, 16, 16, generator=g))):
        picture.save(data / f"{i:02}.png")
        rows.append(json.dumps({"file_name": f"{i:02}.png", "text": tiny.CAPTIONS[i % 10]}) + "\n")
    (data / "metadata.jsonl").write_text("".join(rows))
    (place / "data" / "test").mkdir()
    to_pil(torch.rand(1, 3, 16, 16, generator=g))[0].save(place / "data" / "test" / "one.png")
    line = json.dumps({"file_name": "one.png", "text": "a red car"})
    (place / "data" / "test" / "metadata.jsonl").write_text(line + "\n")
    return Path(folder), place / "data"


def test_evaluate_retrieval_draws_every_prompt(tiny_run, tmp_path):
    folder, data = tiny_run
    options: dict = {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 5}
    found = evaluate_retrieval(folder, data, **options, batch_size=4, out=tmp_path / "a" / "b")
    assert found["prompts"] == 10 and found["chance_top1"] == 0.1 and found["judge"] == "mobilenetv2"
    low, high = found["top1_interval"]
    assert 0 <= low <= found["top1"] <= high <= 1 and found["top1"] <= found["top5"]
    saved = json.loads((tmp_path / "a" / "b" / "evaluation.json").read_text(encoding="utf-8"))
    ranks = saved.pop("ranks")
    assert saved == found
    assert list(ranks) == tiny.CAPTIONS[:10] and all(1 <= r <= 10 for (r,) in ranks.values())
    assert sum(r == 1 for (r,) in ranks.values()) == round(10 * found["top1"])
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "evaluation.json",
        "samples.png",
        "samples_unlabelled.png",
    ]
    # the third cell of the unlabelled grid is what the pipeline draws of the third prompt by itself, with seed 5 + 2
    pipeline = TextToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(7)
    alone = pipeline(tiny.CAPTIONS[2], num_inference_steps=2, guidance_scale=2.0, generator=g, output_type="pt").images
    with Image.open(tmp_path / "a" / "b" / "samples_unlabelled.png") as sheet:
        cell = sheet.crop((8 + 2 * 136, 8, 8 + 2 * 136 + 128, 8 + 128))
    expected = to_pil(alone)[0].resize((128, 128), Image.Resampling.BICUBIC)
    difference = [abs(p - q) for p, q in zip(cell.tobytes(), expected.tobytes(), strict=True)]
    assert max(difference) <= 2  # a float32 batch of 4 against one of 1 may round another way, bicubic adds one
    assert max(max(band) - min(band) for band in expected.getextrema()) > 20  # not a flat picture
    # the same asked again is taken up, anything else is drawn anew
    written = (tmp_path / "a" / "b" / "evaluation.json").stat().st_mtime_ns
    assert evaluate_retrieval(folder, data, **options, batch_size=4, out=tmp_path / "a" / "b") == found
    assert (tmp_path / "a" / "b" / "evaluation.json").stat().st_mtime_ns == written
    other = evaluate_retrieval(folder, data, **options | {"seed": 6}, batch_size=4, out=tmp_path / "a" / "b")
    assert other["seed"] == 6 and (tmp_path / "a" / "b" / "evaluation.json").stat().st_mtime_ns != written
    # the batch size changes nothing but rounding
    again = evaluate_retrieval(folder, data, **options, batch_size=3, out=tmp_path / "c")
    assert again["median_rank"] == pytest.approx(found["median_rank"], abs=1)


def test_evaluate_retrieval_refuses_before_it_draws(tiny_run, tmp_path):
    folder, data = tiny_run
    options: dict = {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 5, "out": tmp_path / "out"}
    with pytest.raises(ValueError, match="nowhere"):
        evaluate_retrieval(tmp_path / "nowhere", data, **options)
    with pytest.raises(ValueError, match="nowhere"):
        evaluate_retrieval(folder, tmp_path / "nowhere", **options)
    with pytest.raises(ValueError, match="title"):
        evaluate_retrieval(folder, data, caption_column="title", **options)
    with pytest.raises(ValueError, match="'vgg' is not known"):
        evaluate_retrieval(folder, data, features="vgg", **options)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the report


class Page(HTMLParser):
    """Collects what a browser would do with a page."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def make_run(folder: Path, lines: int = 100, sheets: int = 3) -> Path:
    (folder / "log").mkdir(parents=True)
    (folder / "samples").mkdir()
    rows = [{"images": 32 * i, "loss": 1 / (i + 1) + 0.1, "lr": 1e-3, "time": "noon"} for i in range(lines)]
    rows += [{"images": 32 * lines, "held_out_loss": 0.6}]
    (folder / "log" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for i in range(sheets):
        picture_grid(torch.rand(2, 3, 16, 16)).save(folder / "samples" / f"images_{1000 * (i + 1):09d}.png")
    (folder / "config.yaml").write_text("task: diffusion\nprompt: <script>alert(1)</script> & co\n")
    return folder


def test_report_is_one_file_that_needs_nothing_else(tmp_path):
    run = make_run(tmp_path / "unet")
    path = write_report(
        run,
        title="A <b>bold</b> & title",
        metrics={"retrieval": {"top1": 0.71234567, "top1_interval": [0.6, 0.8]}, "pictures": 1234},
        data={"source": "<img src=x>"},
        attribution="By <them>\nCC BY-SA 4.0",
    )
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open  # every tag is closed
    assert all(s.startswith("data:") for s in page.sources)
    assert "script" not in page.tags and "b" not in page.tags
    for words in ("A <b>bold</b> & title", "<script>alert(1)</script> & co"):
        assert words in page.words
    for words in ("retrieval.top1", "0.7123", "0.6, 0.8", "1,234"):
        assert words in page.words
    for words in ("By <them>", "<img src=x>", "after 3,000 images", "torch", metadata.version("diffusers")):
        assert words in page.words
    pictures = [base64.b64decode(s.split(",", 1)[1]) for s in page.sources if s.startswith("data:image/png")]
    assert len(pictures) == 3
    assert pictures[0] == (run / "samples" / "images_000003000.png").read_bytes()  # the newest first
    curves = [base64.b64decode(s.split(",", 1)[1]) for s in page.sources if s.startswith("data:image/svg")]
    assert len(curves) == 2  # loss with held_out_loss, lr; not the text
    assert not list(run.glob(".report*"))


def test_report_of_several_runs(tmp_path):
    runs = [make_run(tmp_path / name, sheets=1) for name in ("clip", "vae", "unet")]
    picture_grid(torch.rand(4, 3, 16, 16)).save(tmp_path / "samples.png")
    with pytest.raises(ValueError, match="3 runs need `out`"):
        write_report(runs, title="demo")
    with pytest.raises(ValueError, match="0 runs need `out`"):
        write_report([], title="demo")
    pictures = {"16 prompts": tmp_path / "samples.png"}
    path = write_report(runs, title="demo", out=tmp_path / "report.html", pictures=pictures)
    page = Page(path.read_text(encoding="utf-8"))
    order = re.findall(r"16 prompts|clip|vae|unet", page.words)
    assert list(dict.fromkeys(order)) == ["16 prompts", "clip", "vae", "unet"]
    assert sum(s.startswith("data:image/png") for s in page.sources) == 4


def test_report_of_a_run_that_was_killed(tmp_path):
    """Half a line, half a picture, no config; then nothing at all."""
    run = make_run(tmp_path / "run", sheets=2)
    with (run / "log" / "metrics.jsonl").open("a") as log:
        log.write('{"images": 5000, "loss": NaN}\n[1]\n{"images": 6000, "lo')
    newest = run / "samples" / "images_000002000.png"
    newest.write_bytes(newest.read_bytes()[:200])
    (run / "config.yaml").unlink()
    page = Page(write_report(run, title="killed").read_text(encoding="utf-8"))
    assert "2 lines of log/metrics.jsonl could not be read" in page.words
    assert "images_000002000.png is missing or broken" in page.words
    assert "No config.yaml" in page.words
    assert sum(s.startswith("data:image/png") for s in page.sources) == 1
    (tmp_path / "empty").mkdir()
    page = Page(write_report(tmp_path / "empty", title="empty").read_text(encoding="utf-8"))
    assert "No log/metrics.jsonl" in page.words and not page.sources


def test_a_resumed_run_overwrites_what_it_went_back_over(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [(0, 1.0), (10, 0.9), (20, 0.8), (30, 0.7), (20, 0.81), (20, 0.82), (30, 0.71)]
    log.write_text("".join(json.dumps({"images": i, "loss": v}) + "\n" for i, v in rows))
    kept, broken = read_log(log)
    assert [(r["images"], r["loss"]) for r in kept] == rows[:3] + rows[4:]
    assert broken == 0


def test_running_mean_keeps_a_line_and_averages_noise():
    line = [3.0 * i for i in range(50)]
    assert _smooth(line, 5) == pytest.approx(line)
    assert _smooth([0.0, 3.0, 0.0, 3.0, 0.0], 1) == pytest.approx([0, 1, 2, 1, 0])


def test_a_constant_is_a_line_in_the_middle(tmp_path: Path):
    """Running means round: 1.2 in the last place must not become the whole panel."""
    folder = make_run(tmp_path / "run", 1)
    lines = (json.dumps({"images": i, "tflops": 1.2, "held_out_loss_at_0.5": 0.3}) for i in range(1, 100))
    (folder / "log" / "metrics.jsonl").write_text("\n".join(lines))
    page = write_report(folder, title="a run").read_text()
    assert "TFLOP/s 1.2" in page and "_at_0.5 0.3" not in page
    svgs = [base64.b64decode(x).decode() for x in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    (drawn,) = [x for x in svgs if "<!-- TFLOP/s -->" in x]
    assert "<!-- 1.2 -->" in drawn or "<!-- 1.25 -->" in drawn, re.findall(r"<!-- (.*?) -->", drawn)
    assert "1e" not in "".join(re.findall(r"<!-- (.*?) -->", drawn))


def test_a_long_run_stays_a_small_file(tmp_path):
    run = make_run(tmp_path / "long", lines=20_000, sheets=30)
    path = write_report(run, title="long")
    page = Page(path.read_text(encoding="utf-8"))
    assert sum(s.startswith("data:image/png") for s in page.sources) == 6
    assert path.stat().st_size < 1_000_000


def test_sample_sheets_open_as_pictures(tmp_path):
    run = make_run(tmp_path / "run", sheets=1)
    page = Page(write_report(run, title="t").read_text(encoding="utf-8"))
    source = next(s for s in page.sources if s.startswith("data:image/png"))
    with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as picture:
        assert picture.size == (8 + 2 * 136, 8 + 136)
