"""The measures of an adaptation: the distances against their definitions, and both judgements on tiny runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from pipelines.lora.live import active_adapters
from tests.adapting import trained
from training import styles
from training.evaluate import adapted
from training.evaluate.adapted import (
    judge_style,
    judge_subject,
    kernel_distance,
    mean_distance,
    read_gallery,
)
from training.styles import style_pictures, subject_pictures


class Colours(nn.Module):
    """Mean of each quarter of a picture, (B, 12): a judge that costs nothing."""

    num_features = 12

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def test_the_distance_of_means_is_the_closed_form() -> None:
    """|m|² less what is due to the samples being few, of diagonal covariances a², b²."""
    g = torch.Generator().manual_seed(0)
    a, b, m = torch.tensor([[1.0, 2.0, 0.5], [2.0, 2.0, 1.5], [1.0, 0.0, -2.0]], dtype=torch.float64)

    def sample(count: int) -> torch.Tensor:
        """Mean 0 and covariance 1, exactly."""
        x = torch.randn(count, 3, generator=g, dtype=torch.float64)
        x = x - x.mean(0)
        return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov()).T)

    x, y = sample(2000) * a, sample(500) * b + m
    assert mean_distance(x, y) == pytest.approx(
        float(m.square().sum() - a.square().sum() / 2000 - b.square().sum() / 500), rel=1e-9
    )


def test_the_kernel_distance_is_torchmetrics() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 3, 8, 8, generator=g), torch.rand(40, 3, 8, 8, generator=g) ** 2
    metric = KernelInceptionDistance(feature=Colours(), subsets=1, subset_size=40)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert kernel_distance(Colours()(x), Colours()(y)) == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def test_the_kernel_distance_has_no_bias() -> None:
    """Where both are discrete the true distance is a finite sum; and the mean of many small samples is that."""
    g = torch.Generator().manual_seed(0)
    points = torch.randn(5, 4, generator=g, dtype=torch.float64)
    p, q = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.2, 0.4]], dtype=torch.float64)
    truth = float((p - q) @ (points @ points.T / 4 + 1) ** 3 @ (p - q))

    def distance(of: torch.Tensor, n: int = 6, m: int = 9) -> float:
        x, y = (points[w.multinomial(k, replacement=True, generator=g)] for w, k in ((of, n), (q, m)))
        return kernel_distance(x, y)

    for weights, expected in ((p, truth), (q, 0), ((p + q) / 2, truth / 4)):  # p² of a mixture
        many = torch.tensor([distance(weights) for _ in range(4000)])
        assert abs(float(many.mean()) - expected) < 4 * float(many.std()) / 4000**0.5
        assert expected == 0 or float(many.std()) / 4000**0.5 < 0.1 * truth


def test_pairs_that_show_the_same_do_not_count() -> None:
    """Equal sets are at 0 exactly, in any order; without the numbers the equal rows draw them together."""
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    shows, order = torch.arange(12), torch.randperm(12)
    assert kernel_distance(x, x[order], shows, shows[order]) == pytest.approx(0, abs=1e-12)
    assert kernel_distance(x, x[order]) < -1e-3


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("judged")


@pytest.fixture
def few(monkeypatch) -> None:
    known = styles._ordered()
    subject_first = sorted(known, key=lambda c: c.name != "lemon")
    monkeypatch.setattr(styles, "_ordered", lambda: subject_first[:10])
    monkeypatch.setattr(adapted, "load_features", lambda: Colours())
    monkeypatch.setattr(adapted, "PER_PROMPT", 3)


@pytest.fixture
def style_run(root: Path, few: None) -> Path:
    """Made once, by whichever test comes first."""
    if not (root / "known").is_dir():
        style_pictures(root / "style", size=16, count=4)
        style_pictures(root / "known", size=16, count=9, source="poster")
        trained("sd", root, "style_run", lora={"rank": 2})
    return root / "style_run"


def test_a_style_is_judged(root: Path, style_run: Path) -> None:
    run = style_run
    found = judge_style(run, root / "style", root / "known", steps=2)
    assert json.loads((run / "judged/adapted.json").read_text()) == found
    assert found["prompts"] == 5 or found["prompts"] == 6
    assert found["before"] != found["after"]  # the LoRA draws otherwise
    ratio = found["after"]["kernel"] / found["before"]["kernel"]
    assert found["ratios"]["kernel"] == pytest.approx(ratio) and found["learnt"] == (ratio <= 0.5)
    assert found["kept"] == (found["after"]["concepts"] >= found["before"]["concepts"] - 0.1)
    assert set(found["style_itself"]) == set(found["ratios"]) == {"kernel", "frechet", "mean"}
    assert (run / "judged/adapted.png").is_file() and "Before and after" in (run / "judged/report.html").read_text()


def test_the_run_s_own_report_shows_it(root: Path, style_run: Path) -> None:
    """Once, however often it is judged; and what it told before is still there."""
    run = style_run
    judge_style(run, root / "style", root / "known", steps=1)
    plain = (run / "report.html").read_text()
    plain = plain[: plain.index(adapted.BEGIN)] + plain[plain.index(adapted.END) + len(adapted.END) + 1 :]
    assert "<h2>Data</h2>" in plain and "Before and after" not in plain
    (run / "report.html").write_text(plain)
    for steps in (1, 2):
        judge_style(run, root / "style", root / "known", steps=steps)
        page = (run / "report.html").read_text()
        assert page.count("<h2>Before and after</h2>") == 1 == page.count("<th>after.kernel</th>")
        assert f"<th>steps</th><td>{steps}</td>" in page
        part = page[page.index(adapted.BEGIN) : page.index(adapted.END) + len(adapted.END) + 1]
        assert page.replace(part, "") == plain
    (run / "report.html").unlink()
    judge_style(run, root / "style", root / "known", steps=1)
    assert "<h2>Before and after</h2>" in (run / "report.html").read_text()


def test_a_lora_sets_in_where_it_is_told_to(style_run: Path) -> None:
    """Of four steps the first is the base's alone, in each batch."""
    run = style_run
    base = adapted._settings(run)[0].base
    painter = adapted.Painter(base, run, 4, 1.0, lora_from=0.25)
    acting: list[float] = []
    net = painter.pipeline.parts.net
    net.register_forward_pre_hook(lambda *_: acting.append(sum(active_adapters(net).values())))
    pictures = painter.draw(["a box", "fire", "a box"], [0, 1, 2], batch_size=2)
    assert acting == [0, 1, 1, 1] * 2
    plain, whole = (adapted.Painter(base, x, 4, 1.0).draw(["a box"], [0]) for x in (None, run))
    assert not torch.equal(pictures[:1], plain) and not torch.equal(pictures[:1], whole)
    assert active_adapters(net) == {"default_0": 1.0}  # afterwards they are as they were


def test_where_it_sets_in_is_checked_before_anything_is_drawn(root: Path, style_run: Path, monkeypatch) -> None:
    monkeypatch.setattr(adapted.Painter, "draw", lambda *_: pytest.fail("drawn"))
    how = {"style": root / "style", "data": root / "known"}
    with pytest.raises(ValueError, match="from 0 to below 1, got 1"):
        judge_style(style_run, **how, lora_from=1.0)
    words = trained("sd", root, "words_run", new_tokens=[{"token": "<toy>"}], train_denoiser=False,
                    data={"instance_prompt": "a <toy>"})  # fmt: skip
    with pytest.raises(ValueError, match="words_run has no LoRA"):
        judge_style(words, **how, lora_from=0.3)


def test_a_subject_is_judged(root: Path, few: None) -> None:
    subject_pictures(root / "subject", size=16)
    style_pictures(root / "all", size=16, count=9, source="poster")
    listed = read_gallery(root / "all", ["train", "test"])
    run = trained("sd", root, "subject_run", lora={"rank": 2})
    how: dict[str, Any] = {"prompt": "a sks box", "steps": 2}
    with pytest.raises(ValueError, match="no instance_prompt: say by --prompt"):
        judge_subject(run, root / "subject", root / "all")
    with pytest.raises(ValueError, match="say the subject's class by --concept"):
        judge_subject(run, root / "all", root / "all", **how)
    with pytest.raises(ValueError, match="shows no such concept"):
        judge_subject(run, root / "subject", root / "all", concept="unheard of", **how)
    concept = read_gallery(root / "all").concepts[0]
    found = judge_subject(run, root / "subject", root / "all", concept=concept, **how)
    assert found["before"] != found["after"] and 0 <= found["after"]["subject"] <= 1
    assert found["ratio"] == pytest.approx(found["after"]["distance"] / found["before"]["distance"])
    assert found["learnt"] == (found["ratio"] <= 0.5 and found["after"]["subject"] >= 0.5)
    assert len(listed.concepts) == 10 and found["guidance_scale"] == adapted._settings(run)[0].sample.guidance_scale
    assert found["subject_itself"]["similarity"] <= 1
    assert (run / "judged/adapted.png").is_file() and "Before and after" in (run / "report.html").read_text()


def test_what_the_autoencoder_gives_back_is_the_floor(root: Path, few: None, monkeypatch) -> None:
    """Drawings that are the training pictures through the base's autoencoder are at that distance, class and prompt
    taken from the pictures' folder and the run."""
    subject_pictures(root / "blue", size=16)
    style_pictures(root / "yellow", size=16, count=9, source="poster")
    run = trained("sd", root, "floor_run", lora={"rank": 2}, data={"instance_prompt": "a sks lemon"})
    files = sorted((root / "blue/train").glob("*.png"))
    asked = []

    def draw(painter: adapted.Painter, prompts: list[str], seeds: object) -> torch.Tensor:
        asked.append(prompts)
        return painter.given_back(adapted._open(files))[torch.arange(len(prompts)) % len(files)]

    monkeypatch.setattr(adapted.Painter, "draw", draw)
    monkeypatch.setattr(adapted, "PER_PROMPT", len(files))
    found = judge_subject(run, root / "blue", root / "yellow")
    assert found["class"] == "lemon" and found["prompt"] == "a sks lemon" and asked[1][0] == "a sks lemon"
    itself = found["subject_itself"]
    assert found["after"]["distance"] == pytest.approx(itself["through_autoencoder"], abs=1e-6)
    assert itself["through_autoencoder"] != pytest.approx(itself["distance"], abs=1e-6)


def test_shapeless_drawings_that_come_nearer_are_not_learnt(root: Path, few: None, monkeypatch) -> None:
    """The distance has fallen to nothing, and none of the drawings is the subject to the judge: some other concept."""
    subject_pictures(root / "meant", size=16)
    style_pictures(root / "rest", size=16, count=9, source="poster")
    run = trained("sd", root, "shapeless_run", lora={"rank": 2})
    distances = iter([1.0, 0.0, 0.0, 1.0])
    monkeypatch.setattr(adapted, "kernel_distance", lambda *_: next(distances))
    known = read_gallery(root / "rest")
    other = (known.pictures[1:2].float() / 255).expand(60, -1, -1, -1)
    monkeypatch.setattr(adapted.Painter, "draw", lambda painter, prompts, seeds: other[: len(prompts)])
    found = judge_subject(run, root / "meant", root / "rest", prompt="a sks box", concept=known.concepts[0])
    assert found["ratio"] == 0 and found["after"]["subject"] == 0 and not found["learnt"]


def test_pictures_that_are_the_goal_are_perfect(root: Path, few: None, monkeypatch) -> None:
    """A painter that draws the style's own pictures after adapting, and the known ones before."""
    style_pictures(root / "goal", size=16, count=4)
    style_pictures(root / "start", size=16, count=9, source="poster")
    own, known = read_gallery(root / "goal", ["test"]), read_gallery(root / "start")
    before, after = (dict(zip(x.captions, x.pictures, strict=True)) for x in (known, own))

    class Copy:
        def __init__(self, base: str, run: Path | None, *_: object):
            self.known = after if run else before

        def draw(self, prompts: list[str], seeds: object) -> torch.Tensor:
            return torch.stack([self.known[text] for text in prompts]).float() / 255

    run = trained("sd", root, "goal_run", lora={"rank": 2})
    monkeypatch.setattr(adapted, "Painter", Copy)
    found = judge_style(run, root / "goal", root / "start")
    shown = [i for i, c in enumerate(own.concepts) if c in known.concepts]
    assert found["after"]["concepts"] == 1 and found["learnt"] and found["kept"]
    assert found["after"]["kernel"] == pytest.approx(0, abs=1e-12) and found["ratios"]["frechet"] < 0.5
    assert len(shown) == found["prompts"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`ldm data openmoji`"):
        read_gallery(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    with pytest.raises(ValueError, match="no column concept"):
        read_gallery(tmp_path)
