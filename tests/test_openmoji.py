"""The OpenMoji data set: names, captions, a split that never moves, and a folder that is whole or not there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training import openmoji
from training.data import open_rows

CONFIG = Path(__file__).parent.parent / "configs" / "openmoji" / "concepts.txt"
FEW = ["red apple", "octopus", "fire", "crown"]  # a crown is held out


def content(folder: Path) -> dict[str, str]:
    files = sorted(x for x in folder.rglob("*") if x.is_file())
    return {str(x.relative_to(folder)): hashlib.sha256(x.read_bytes()).hexdigest() for x in files}


def test_about_1900_concepts_without_skin_tones():
    all_of_them = openmoji.concepts()
    assert 1850 < len(all_of_them) < 2000
    assert not any(tone in c.code for c in all_of_them.values() for tone in ("1F3FB", "1F3FD", "1F3FF"))
    assert len({c.code for c in all_of_them.values()}) == len(all_of_them)
    assert all_of_them["red apple"].code == "1F34E"
    assert all_of_them["flag of Bolivia"].code == "1F1E7-1F1F4"
    assert not any("," in name or name.startswith("#") for name in all_of_them)  # both mean something in --concepts


def test_the_split_is_fixed():
    """Golden: another hash would make yesterday's models have seen today's held-out pictures."""
    all_of_them = openmoji.concepts()
    held_out = {c.name for c in all_of_them.values() if c.split == "test"}
    assert {"crown", "sunflower", "watermelon", "camel"} <= held_out
    assert not {"red apple", "cat face", "octopus", "rocket"} & held_out
    assert 0.03 < len(held_out) / len(all_of_them) < 0.07


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("red apple", "a red apple"), ("octopus", "an octopus"), ("unicorn", "a unicorn"), ("grapes", "grapes"),
        ("hourglass done", "an hourglass done"), ("bread", "bread"), ("glass of milk", "a glass of milk"),
        ("soft ice cream", "a soft ice cream"), ("smiling face with sunglasses", "a smiling face with sunglasses"),
        ("bus", "a bus"), ("Santa Claus", "Santa Claus"), ("flag of Bolivia", "the flag of Bolivia"),
        ("e-mail", "an e-mail"), ("money with wings", "money with wings"), ("compass", "a compass"),
    ],
)  # fmt: skip
def test_captions_are_what_a_person_types(name: str, prompt: str):
    assert openmoji.caption(name) == prompt


def test_captions_are_different():
    names = list(openmoji.concepts())
    assert len({openmoji.caption(name) for name in names}) == len(names)


def test_the_list_of_the_demo():
    names = openmoji.read_names(str(CONFIG))
    chosen = openmoji.choose(names)
    assert len(set(names)) == len(names) == len(chosen)
    assert sum(c.split == "train" for c in chosen) >= 165
    assert sum(c.split == "test" for c in chosen) >= 8


def test_render_opens_as_an_imagefolder(tmp_path: Path):
    out = tmp_path / "data" / "openmoji"
    summary = openmoji.render(out, 32, FEW)
    assert (summary.train, summary.test, summary.reused) == (3, 1, False)
    assert os.listdir(out.parent) == ["openmoji"]  # nothing is left beside
    train = open_rows(out, split="train", resolution=32)
    assert train.captions == ["a red apple", "an octopus", "fire"]
    assert open_rows(out, split="test", resolution=32).captions == ["a crown"]
    apple, corner = train.pictures([0])[0, :, 18, 14].tolist(), train.pictures([0])[0, :, 0, 0].tolist()
    assert apple[0] > 180 and apple[0] > apple[1] + 60 and corner == [255, 255, 255]  # red, on white
    notice = (out / "ATTRIBUTION.md").read_text()
    for word in ("OpenMoji 17", "CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/", "32 × 32"):
        assert word in notice


def test_a_plain_load_dataset_finds_both_splits(tmp_path: Path):
    import datasets

    openmoji.render(tmp_path / "o", 16, FEW)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "o"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 3 and loaded["test"].num_rows == 1
    assert loaded["train"].column_names == ["image", "text", "concept", "code"]
    assert loaded["test"][0]["concept"] == "crown" and loaded["test"][0]["image"].size == (16, 16)


def test_the_same_call_writes_the_same_bytes(tmp_path: Path):
    openmoji.render(tmp_path / "a", 24, FEW)
    openmoji.render(tmp_path / "b", 24, [*reversed(FEW), "Red_Apple"])  # order, case and doubles play no part
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_subset_has_the_split_and_the_pictures_of_the_whole(tmp_path: Path):
    openmoji.render(tmp_path / "a", 16, FEW)
    openmoji.render(tmp_path / "b", 16, [*FEW, "sunflower", "rocket", "pizza"])
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    pictures = [x for x in a if x.endswith(".png")]
    assert len(pictures) == 4 and all(a[x] == b[x] for x in pictures)


def test_what_is_there_is_taken_up(tmp_path: Path):
    out = tmp_path / "o"
    openmoji.render(out, 16, FEW)
    before = {x: x.stat().st_mtime_ns for x in out.rglob("*")}
    again = openmoji.render(out, 16, FEW)
    assert again.reused and "already" in str(again) and (again.train, again.test) == (3, 1)
    assert {x: x.stat().st_mtime_ns for x in out.rglob("*")} == before


def test_other_content_is_refused_and_not_touched(tmp_path: Path):
    out = tmp_path / "o"
    openmoji.render(out, 16, FEW)
    before = content(out)
    with pytest.raises(ValueError, match=r"other settings \(size\)"):
        openmoji.render(out, 24, FEW)
    with pytest.raises(ValueError, match=r"other settings \(captions\)"):
        openmoji.render(out, 16, FEW[:2])
    assert content(out) == before
    (out / "train" / "1F34E.png").unlink()
    with pytest.raises(ValueError, match=r"1 of its files are gone.*1F34E\.png"):
        openmoji.render(out, 16, FEW)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("two years")
    with pytest.raises(ValueError, match="something else"):
        openmoji.render(mine, 16, FEW)
    assert os.listdir(mine) == ["thesis.txt"]
    with pytest.raises(ValueError, match="something else"):
        openmoji.render(mine / "thesis.txt", 16, FEW)
    openmoji.render(tmp_path / "mine2", 16, FEW)


def test_an_empty_folder_is_filled(tmp_path: Path):
    assert openmoji.render(tmp_path, 16, FEW).train == 3


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []

    def full(svg: str, size: int) -> bytes:
        drawn.append(svg)
        if len(drawn) == 3:
            raise OSError("No space left on device")
        return b"png"

    monkeypatch.setattr(openmoji, "draw", full)
    with pytest.raises(OSError, match="No space"):
        openmoji.render(tmp_path / "o", 16, FEW)
    assert os.listdir(tmp_path) == []


def test_unknown_names_and_sizes_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no 'red aple' \(did you mean 'red apple'"):
        openmoji.render(tmp_path / "o", 16, ["octopus", "red aple"])
    with pytest.raises(ValueError, match="empty"):
        openmoji.render(tmp_path / "o", 16, [])
    for size in (0, 7, 4096, 16.0, True):
        with pytest.raises(ValueError, match="size"):
            openmoji.render(tmp_path / "o", size, FEW)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_read_names(tmp_path: Path):
    file = tmp_path / "list.txt"
    file.write_text("# fruit\nred apple\n\n  grapes   # purple\nkeycap #\n")
    assert openmoji.read_names(str(file)) == ["red apple", "grapes", "keycap #"]
    assert openmoji.read_names("red apple, octopus") == ["red apple", "octopus"]
    with pytest.raises(FileNotFoundError, match="no such list"):
        openmoji.read_names(str(tmp_path / "lost.txt"))


def test_no_torch_is_needed(tmp_path: Path):
    code = (
        "import sys; from training import openmoji; openmoji.render(sys.argv[1], 16, ['fire']); "
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "o")], check=True, cwd=root)
