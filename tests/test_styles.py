"""Pictures of a new style and of one subject: the same bytes each time, with the columns that judging needs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from training import styles
from training.data import open_rows
from training.openmoji import choose
from training.styles import STYLES, restyled, style_pictures, subject_pictures


def tree(folder: Path) -> dict[str, bytes]:
    return {str(x.relative_to(folder)): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    """Of all concepts twelve, so that little is rendered."""
    known = styles._ordered()[:12]
    monkeypatch.setattr(styles, "_ordered", lambda: known)


def test_a_style_is_made_taken_up_and_the_same_each_time(tmp_path: Path) -> None:
    made = style_pictures(tmp_path / "a", size=16, count=5)
    style_pictures(tmp_path / "b", size=16, count=5)
    assert (made.train, made.test) == (5, 7) and tree(tmp_path / "a") == tree(tmp_path / "b")
    before = {x: x.stat().st_mtime_ns for x in (tmp_path / "a").rglob("*")}
    assert style_pictures(tmp_path / "a", size=16, count=5) == made
    assert before == {x: x.stat().st_mtime_ns for x in (tmp_path / "a").rglob("*")}
    rows = open_rows(tmp_path / "a", split="train", resolution=16)
    assert len(rows) == 5 and {"a tangerine", "fire"} < set(rows.captions)
    pixels = rows.pictures([0])
    assert torch.equal(pixels[:, 0], pixels[:, 1]) and pixels.amin() < 100 and pixels.amax() == 255  # black on white
    listed = [json.loads(x) for x in (tmp_path / "a/test/metadata.jsonl").read_text().splitlines()]
    assert {x["concept"] for x in listed}.isdisjoint(
        json.loads(x)["concept"] for x in (tmp_path / "a/train/metadata.jsonl").read_text().splitlines()
    )
    assert "CC BY-SA 4.0" in (tmp_path / "a/ATTRIBUTION.md").read_text()


def test_the_order_of_the_concepts_is_a_hash_alone(monkeypatch) -> None:
    monkeypatch.undo()
    names = [concept.name for concept in styles._ordered()]
    assert len(names) == 166 and names != sorted(names)


def test_colours_become_the_styles(tmp_path: Path) -> None:
    (apple,) = choose(["red apple"])
    svg = restyled(apple.file.read_text(), STYLES["poster"])
    assert set(re.findall(r"#\w{3,6}", svg)) == {"#fcea2b", "#000000", "#d22f27", "#ffffff"}
    assert 'stroke-width="2.4"' in svg


def test_a_subject_has_five_views_and_eight_to_judge_by(tmp_path: Path) -> None:
    made = subject_pictures(tmp_path / "lemon", size=32)
    assert (made.train, made.test) == (5, 8) and not list((tmp_path / "lemon").rglob("metadata.jsonl"))
    files = sorted((tmp_path / "lemon").rglob("*.png"))
    assert len({x.read_bytes() for x in files}) == 13
    rows = open_rows(tmp_path / "lemon", split="train", resolution=32, instance_prompt="a sks lemon")
    assert len(rows) == 5 and set(rows.captions) == {"a sks lemon"}
    blue = rows.pictures([0]).float()[0, :, 12:20, 12:20].mean((1, 2))
    assert blue[2] > blue[0] + 50


def test_any_drawing_can_be_the_subject(tmp_path: Path) -> None:
    subject_pictures(tmp_path / "fox", size=16, concept="fox")
    subject_pictures(tmp_path / "bear", size=16, concept="teddy bear")
    one, other = ((tmp_path / name / "train/1.png").read_bytes() for name in ("fox", "bear"))
    assert one != other
    with pytest.raises(ValueError, match="made otherwise"):
        subject_pictures(tmp_path / "fox", size=16, concept="teddy bear")
    with pytest.raises(ValueError, match="foxx"):
        subject_pictures(tmp_path / "foxx", size=16, concept="foxx")
    assert not (tmp_path / "foxx").exists()


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        style_pictures(tmp_path / "mine", count=5)
    style_pictures(tmp_path / "a", size=16, count=5)
    with pytest.raises(ValueError, match="made otherwise"):
        style_pictures(tmp_path / "a", size=16, count=6)
    next((tmp_path / "a/train").glob("*.png")).unlink()
    with pytest.raises(ValueError, match="are gone"):
        style_pictures(tmp_path / "a", size=16, count=5)
    assert (tmp_path / "mine/a.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"source": "oil"}, "'oil' is not one of ink, poster"),
        ({"count": 12}, "from 1 to 11"),
        ({"size": 4}, "8 to 2048"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, how: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        style_pictures(tmp_path / "x", **({"count": 5} | how))
    assert not (tmp_path / "x").exists()


def test_npm_packages(tmp_path: Path, monkeypatch) -> None:
    """A package as npm packs it; and what is said where there is none."""
    body = '<circle cx="8" cy="8" r="7" fill="#12ab34"/>'
    names = [concept.name.replace(" ", "-").lower() for concept in styles._ordered()]
    icons = json.dumps({"width": 16, "height": 16, "icons": {name: {"body": body} for name in names}}).encode()

    def pack(command: list[str], cwd: str, **_: object) -> None:
        assert command == ["npm", "pack", "@iconify-json/noto@1.2.9"]
        with tarfile.open(Path(cwd) / "x.tgz", "w:gz") as tar:
            info = tarfile.TarInfo("package/icons.json")
            info.size = len(icons)
            tar.addfile(info, io.BytesIO(icons))

    monkeypatch.setattr(subprocess, "run", pack)
    style_pictures(tmp_path / "noto", size=16, count=5, source="noto")
    rows = open_rows(tmp_path / "noto", split="train", resolution=16)
    assert rows.pictures([0])[0, :, 8, 8].tolist() == [0x12, 0xAB, 0x34]
    assert "Apache-2.0" in (tmp_path / "noto/ATTRIBUTION.md").read_text()

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("npm")

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(ValueError, match="npm is not installed; the styles ink and poster need no network"):
        style_pictures(tmp_path / "none", size=16, count=5, source="noto")
