"""The measures of an adaptation: the distances against their definitions, and both judgements on tiny runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tests.adapting import trained
from training import styles
from training.evaluate import adapted
from training.evaluate.adapted import frechet, judge_style, judge_subject, mean_distance, read_gallery
from training.styles import style_pictures, subject_pictures


class Colours(nn.Module):
    """Mean of each quarter of a picture, (B, 12): a judge that costs nothing."""

    num_features = 12

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def test_the_frechet_distance_is_torchmetrics() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 3, 8, 8, generator=g), torch.rand(40, 3, 8, 8, generator=g) ** 2
    metric = FrechetInceptionDistance(feature=Colours(), normalize=True, input_img_size=(3, 8, 8)).set_dtype(
        torch.float64
    )
    metric.update((x * 255).byte(), real=True)
    metric.update((y * 255).byte(), real=False)
    judge = Colours()
    ours = frechet(judge((x * 255).byte()), judge((y * 255).byte()))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-3)
    assert frechet(x.flatten(1), x.flatten(1)) == pytest.approx(0, abs=1e-8)


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    """|m|² + Σ (a − b)² for diagonal covariances a², b²."""
    g = torch.Generator().manual_seed(0)
    a, b, m = torch.tensor([[1.0, 2.0, 0.5], [2.0, 2.0, 1.5], [1.0, 0.0, -2.0]], dtype=torch.float64)

    def sample(count: int) -> torch.Tensor:
        """Mean 0 and covariance 1, exactly."""
        x = torch.randn(count, 3, generator=g, dtype=torch.float64)
        x = x - x.mean(0)
        return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov()).T)

    x, y = sample(2000) * a, sample(500) * b + m
    assert frechet(x, y) == pytest.approx(float(m.square().sum() + (a - b).square().sum()), rel=1e-9)
    assert mean_distance(x, y) == pytest.approx(
        float(m.square().sum() - a.square().sum() / 2000 - b.square().sum() / 500), rel=1e-9
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("judged")


@pytest.fixture
def few(monkeypatch) -> None:
    known = styles._ordered()
    bear = [c for c in known if c.name == "teddy bear"]
    monkeypatch.setattr(styles, "_ordered", lambda: known[:9] + bear)
    monkeypatch.setattr(adapted, "load_features", lambda: Colours())
    monkeypatch.setattr(adapted, "PER_PROMPT", 3)


def test_a_style_is_judged(root: Path, few: None) -> None:
    style_pictures(root / "style", size=16, count=4)
    style_pictures(root / "known", size=16, count=9, source="poster")
    run = trained("sd", root, "style_run", lora={"rank": 2})
    found = judge_style(run, root / "style", root / "known", steps=2)
    assert json.loads((run / "judged/adapted.json").read_text()) == found
    assert found["prompts"] == 5 or found["prompts"] == 6
    assert found["before"] != found["after"]  # the LoRA draws otherwise
    ratio = found["after"]["distance"] / found["before"]["distance"]
    assert found["distance_ratio"] == pytest.approx(ratio)
    assert found["learnt"] == (ratio <= 0.5 and found["concepts_change"] >= -0.1)
    assert (run / "judged/adapted.png").is_file() and "Before and after" in (run / "judged/report.html").read_text()


def test_a_subject_is_judged(root: Path, few: None) -> None:
    subject_pictures(root / "subject", size=16)
    style_pictures(root / "all", size=16, count=9, source="poster")
    listed = read_gallery(root / "all", ["train", "test"])
    run = trained("sd", root, "subject_run", lora={"rank": 2})
    how = {"prompt": "a sks box", "steps": 2}
    with pytest.raises(ValueError, match="shows no such concept"):
        judge_subject(run, root / "subject", root / "all", concept="unheard of", **how)
    concept = read_gallery(root / "all").concepts[0]
    found = judge_subject(run, root / "subject", root / "all", concept=concept, **how)
    assert found["before"] != found["after"] and 0 <= found["after"]["subject"] <= 1
    assert found["similarity_of_training_pictures"] <= 1 and len(listed.concepts) == 10
    assert (run / "judged/adapted.png").is_file()


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
    assert found["after"]["concepts"] == 1 and found["learnt"]
    assert found["after"]["distance"] < 0.5 * found["before"]["distance"] and len(shown) == found["prompts"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`ldm data openmoji`"):
        read_gallery(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    with pytest.raises(ValueError, match="no column concept"):
        read_gallery(tmp_path)
