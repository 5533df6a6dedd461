"""Webdataset tars, several sources, and what is left out of each."""

from __future__ import annotations

import json
import logging
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.datasets_made import encoded, flat, imagefolder, noise, parquet, tar
from training import folders
from training.data import DataError, open_rows, repeated
from training.schema import Data
from training.schema.data import Source


def members(numbers: range, **extra: bytes) -> list[tuple[str, bytes]]:
    found = []
    for n in numbers:
        parts = {"png": encoded(flat(n)), "txt": f"number {n}".encode(), **extra}
        found += [(f"part/{n:05}.{ending}", content) for ending, content in parts.items()]
    return found


def value(rows, i: int) -> int:
    red, green = rows.pictures([i])[0, :2, 4, 4].tolist()
    return red + 256 * green


def test_tars(tmp_path: Path):
    tar(tmp_path / "a" / "000.tar", members(range(12)))
    tar(tmp_path / "a" / "001.tar", members(range(12, 20)))
    data = Data(path=str(tmp_path / "a"), resolution=8)
    rows, held, lazy = open_rows(data), open_rows(data, split="test"), open_rows(data, in_memory=0)
    assert len(rows) + len(held) == 20 and len(held) >= 1
    for part in (rows, held, lazy, pickle.loads(pickle.dumps(lazy))):
        assert [x.split()[1] for x in part.captions] == [str(value(part, i)) for i in range(len(part))]
    assert rows.fingerprint == lazy.fingerprint
    assert rows.name(0).endswith(f"000.tar: part/{value(rows, 0):05}")
    pattern = open_rows(Data(path=str(tmp_path / "a" / "*.tar"), resolution=8))
    assert pattern.captions == rows.captions
    single = open_rows(Data(path=str(tmp_path / "a" / "001.tar"), resolution=8))
    assert {int(x.split()[1]) for x in single.captions} <= set(range(12, 20))


def test_tars_are_split_by_their_names(tmp_path: Path):
    tar(tmp_path / "train-0.tar", members(range(4)))
    tar(tmp_path / "val-0.tar", members(range(4, 6)))
    data = Data(path=str(tmp_path), resolution=8)
    assert open_rows(data).captions == [f"number {n}" for n in range(4)]
    assert open_rows(data, split="test").captions == ["number 4", "number 5"]


def test_captions_in_json_other_endings_and_masks(tmp_path: Path):
    about = json.dumps({"caption": "a cat", "n": 3}).encode()
    mask = encoded(flat(0).convert("L"))
    rows = [("x.Y.JPG", encoded(noise(1, 16, 16), "JPEG")), ("a.jpg", encoded(noise(2, 16, 16), "JPEG"))]
    rows = [rows[1], ("a.json", about), ("a.mask.png", mask), ("a.cls", b"3")]
    rows += [("b.jpg", rows[0][1]), ("b.json", about), ("c.json", about)]  # c has no picture
    tar(tmp_path / "train.tar", rows)
    tar(tmp_path / "test.tar", rows)
    found = open_rows(Data(path=str(tmp_path), resolution=8, caption_column="caption", mask_column="mask.png"))
    assert found.captions == ["a cat", "a cat"]
    masks = found.masks([0, 1])
    assert masks is not None and masks[0].max() < 0.1 and masks[1].min() == 1
    with pytest.raises(DataError, match=r"2 of 2 rows are of no use: .*its caption.*is 3, not text"):
        open_rows(Data(path=str(tmp_path), resolution=8, caption_column="n"))
    with pytest.raises(DataError, match="no picture in its 1 tar"):
        open_rows(Data(path=str(tmp_path), resolution=8, image_column="png"))


def evil(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "told"),
    [
        (evil("../out.png", tarfile.REGTYPE), "leads out"),
        (evil("a/../../out.png", tarfile.REGTYPE), "leads out"),
        (evil("/etc/out.png", tarfile.REGTYPE), "leads out"),
        (evil("C:\\out.png", tarfile.REGTYPE), "leads out"),
        (evil("a\\..\\..\\out.png", tarfile.REGTYPE), "leads out"),
        (evil("link.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (evil("hard.png", tarfile.LNKTYPE, "../secret.png"), "is a link"),
        (evil("pipe.png", tarfile.FIFOTYPE), "no plain file"),
        (evil("device.png", tarfile.CHRTYPE), "no plain file"),
    ],
)
def test_members_that_lead_outside_are_refused(tmp_path: Path, member: tarfile.TarInfo, told: str):
    (tmp_path / "secret.png").write_bytes(encoded(flat(1)))
    root = tmp_path / "data"
    tar(root / "a.tar", [*members(range(4)), (member, encoded(flat(9)))])
    before = sorted(str(x) for x in tmp_path.rglob("*"))
    with pytest.raises(DataError, match=rf"a\.tar: member .*{told}.*the tar is not used"):
        open_rows(Data(path=str(root), resolution=8))
    assert sorted(str(x) for x in tmp_path.rglob("*")) == before  # and nothing was unpacked


def test_tars_that_are_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    whole = tar(tmp_path / "a.tar", members(range(6))).read_bytes()
    for content, told in (
        (b"", "is no tar file"),
        (b"x" * 2000, "is no tar file"),
        (whole[:1300], "damaged at byte 1024"),  # within a header
        (whole[:1100], "damaged at byte 1024"),
        (whole[: len(whole) // 2 + 600], "damaged|no tar file"),
        (whole[:3072] + b"rubbish!" * 64 + whole[3584:], "damaged at byte"),
    ):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.tar.*({told})"):
            open_rows(Data(path=str(tmp_path / "a.tar"), resolution=8))
    (tmp_path / "a.tar").write_bytes(whole[: 12 * 1024])  # all members, and no end
    assert len(open_rows(Data(path=str(tmp_path / "a.tar"), resolution=8))) == 5
    assert "has no end" in caplog.text
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as out:
        out.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match="unpack a compressed tar first"):
        open_rows(Data(path=str(tmp_path / "a.tar.gz"), resolution=8))


def test_broken_pictures_in_a_tar_are_counted(tmp_path: Path):
    rows = members(range(12))
    rows[0] = (rows[0][0], b"no picture")
    tar(tmp_path / "train.tar", rows)
    tar(tmp_path / "test.tar", members(range(1)))
    with pytest.raises(DataError, match=r"1 of 12 rows .*train\.tar: part/00000: does not decode"):
        open_rows(Data(path=str(tmp_path), resolution=8))
    assert len(open_rows(Data(path=str(tmp_path), resolution=8, max_skipped=0.1))) == 11


# ---- several sources


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("three")
    imagefolder(root / "folder", [flat(n) for n in range(20)], [f"number {n}" for n in range(20)])
    columns = {"picture": [encoded(flat(n)) for n in range(20, 50)], "about": [f"number {n}" for n in range(20, 50)]}
    parquet(root / "rows.parquet", columns)
    tar(root / "more.tar", members(range(50, 60)))
    return root


def sources(root: Path, *repeats: float) -> Data:
    places = (
        Source(path=str(root / "folder"), repeats=repeats[0]),
        Source(path=str(root / "rows.parquet"), image_column="picture", caption_column="about", repeats=repeats[1]),
        Source(path=str(root / "more.tar"), repeats=repeats[2]),
    )
    return Data(sources=places, resolution=8, held_out=0.1)


def test_several_sources(three: Path):
    rows, held = open_rows(sources(three, 1, 1, 1)), open_rows(sources(three, 1, 1, 1), split="test")
    trained, tested = ([value(part, i) for i in range(len(part))] for part in (rows, held))
    assert sorted(trained + tested) == list(range(60))
    assert {0, 1, 2} == {0 if n < 20 else 1 if n < 50 else 2 for n in tested}  # each is parted for itself
    for part, numbers in ((rows, trained), (held, tested)):
        assert part.captions == [f"number {n}" for n in numbers]
    lazy = open_rows(sources(three, 1, 1, 1), in_memory=0)
    assert lazy.fingerprint == rows.fingerprint and lazy.captions == rows.captions
    assert "rows.parquet, row" in rows.name(trained.index(max(n for n in trained if n < 50)))


def test_repeats(three: Path):
    once = open_rows(sources(three, 1, 1, 1))
    numbers = [value(once, i) for i in range(len(once))]
    rows = open_rows(sources(three, 3, 0.5, 1.25))
    seen = Counter(value(rows, i) for i in range(len(rows)))
    first, second, third = ([n for n in numbers if a <= n < b] for a, b in ((0, 20), (20, 50), (50, 60)))
    assert all(seen[n] == 3 for n in first)
    assert all(seen[n] <= 1 for n in second) and sum(seen[n] for n in second) == round(len(second) / 2)
    assert all(seen[n] in (1, 2) for n in third)
    assert sum(seen[n] for n in third) == len(third) + round(len(third) / 4)
    assert rows.captions == [f"number {value(rows, i)}" for i in range(len(rows))]
    assert Counter(open_rows(sources(three, 3, 0.5, 1.25)).captions) == Counter(rows.captions)
    held = [open_rows(sources(three, *r), split="test") for r in ((1, 1, 1), (3, 0.5, 1.25))]
    assert held[0].captions == held[1].captions  # a repeat is of training alone
    with pytest.raises(DataError, match="no rows are left"):
        open_rows(Data(sources=(Source(path=str(three / "more.tar"), repeats=0.001),), resolution=8))


@pytest.mark.parametrize(("times", "expected"), [(1.0, 7), (2.0, 14), (0.5, 4), (2.3, 16)])
def test_repeated(times: float, expected: int):
    content = np.frombuffer(np.random.default_rng(0).bytes(7 * 16), "V16")
    indices = repeated(content, times)
    counts = np.bincount(indices, minlength=7)
    assert len(indices) == expected and counts.max() - counts.min() <= 1
    turned = repeated(content[::-1].copy(), times)
    assert sorted(6 - turned) == sorted(indices)  # the same rows in any order


def test_parquet_and_tars_in_one_folder(three: Path, tmp_path: Path):
    imagefolder(tmp_path / "a", [flat(1), flat(2)])
    tar(tmp_path / "a" / "backup.tar", members(range(3)))
    with pytest.raises(DataError, match=r"holds pictures and tars \(backup\.tar\)"):
        open_rows(Data(path=str(tmp_path / "a"), resolution=8))
    with pytest.raises(DataError, match=r"parquet files and tars; name one of the two, or both in data\.sources"):
        open_rows(Data(path=str(three), resolution=8))


# ---- names


def tarred(place: Path, names: list[str], **keys) -> list[int]:
    """Numbers of the rows of a tar, from its pictures; each with the caption of its number, which its name holds."""
    folders.log_once.cache_clear()
    contents = []
    for name in names:
        n = int("".join(x for x in name.rpartition("_")[2] if x.isdigit()) or 0)
        picture = name.lower().endswith((".png", ".jpg"))
        contents.append((name, encoded(flat(n)) if picture else f"number {n}".encode()))
    rows = open_rows(Data(path=str(tar(place, contents)), **{"resolution": 8, "held_out": 0.0, **keys}))
    seen = [value(rows, i) for i in range(len(rows))]
    if rows.data.caption_column:
        assert list(rows.captions) == [f"number {n}" for n in seen]
    return seen


@pytest.mark.parametrize("stem", ["img_v.{}", "a.b.c_{}", "img 1.5x_{}", "x.y/{}", "x.y/v2.0_{}", "{}.final.2"])
def test_dots_belong_to_a_name(tmp_path: Path, stem: str):
    """As they do in a folder; mixed with names that have none."""
    stems = [stem.format(n) if n % 3 else f"{n:04}" for n in range(1, 7)]
    if "final" in stem:
        stems = [f"_{n}.final.x" for n in range(1, 7)]
    names = [f"{x}{ending}" for x in stems for ending in (".png", ".txt")]
    assert tarred(tmp_path / "a.tar", names) == list(range(1, 7))
    assert tarred(tmp_path / "b.tar", names, caption_column=None) == list(range(1, 7))


def test_captions_anywhere_in_the_tar(tmp_path: Path):
    """Behind all pictures, before them, in another order, in folders, with dots."""
    stems = [f"a/{n}" if n % 2 else f"v.{n}" for n in range(1, 7)]
    pictures, texts = ([f"{x}{ending}" for x in stems] for ending in (".png", ".txt"))
    for number, names in enumerate((pictures + texts, texts + pictures, pictures + texts[::-1])):
        assert tarred(tmp_path / f"{number}.tar", names) == list(range(1, 7))
    masks = [f"{x}.mask.png" for x in stems]
    rows = open_rows(
        Data(
            path=str(tar(tmp_path / "m.tar", [(x, encoded(flat(7))) for x in pictures + masks[:3]] + [
                (x, b"a") for x in texts])), resolution=8, held_out=0.0, mask_column="mask.png",
        )
    )  # fmt: skip
    assert [rows.masks([i]).mean() < 1 for i in range(6)] == [True] * 3 + [False] * 3


def test_what_webdatasets_names_say_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Other pictures of a sample are no rows; a sample's caption is that of its only picture."""
    caplog.set_level(logging.INFO, "training")
    names = [f"_{n}{x}" for n in range(3) for x in (".depth.png", ".png", ".seg.png", ".txt", ".cls")]
    assert tarred(tmp_path / "a.tar", names) == [0, 1, 2]
    assert "passed over: 3 .cls, 6 .png" in caplog.text
    assert tarred(tmp_path / "b.tar", names, caption_column=None) == [0, 1, 2]
    assert tarred(tmp_path / "c.tar", [f"_{n}{x}" for n in range(3) for x in (".orig.png", ".txt")]) == [0, 1, 2]
    both = [f"_{n}{x}" for n in range(3) for x in (".orig.png", ".seg.png", ".txt")]
    with pytest.raises(DataError, match=r"6 of 6 rows .*_0\.orig: its caption \(.*\) is missing"):
        tarred(tmp_path / "d.tar", both)
    assert tarred(tmp_path / "e.tar", both, image_column="orig.png") == [0, 1, 2]


@pytest.mark.parametrize("added", ["._{}", "__MACOSX/._{}", "__MACOSX/{}", ".DS_Store", "a/._{}"])
def test_members_that_macos_adds_are_no_rows(tmp_path: Path, added: str):
    names = [f"{n}.{ending}" for n in range(4) for ending in ("png", "txt")]
    contents = [(x, encoded(flat(int(x[0]))) if "png" in x else f"number {x[0]}".encode()) for x in names]
    every = [pair for x in contents for pair in ((added.format(x[0]), b"\0\5\x16\7" + bytes(99)), (f"./{x[0]}", x[1]))]
    rows = open_rows(Data(path=str(tar(tmp_path / "a.tar", every)), resolution=8, held_out=0.0))
    assert list(rows.captions) == [f"number {value(rows, i)}" for i in range(4)]
