"""Folders as people have them: no picture is left out without a message, and captions are found beside pictures."""

from __future__ import annotations

import json
import logging
import os
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tests.datasets_made import encoded, flat, parquet
from training import folders, pictures
from training.adapt_auto import look
from training.data import DataError, open_rows
from training.schema import Data
from training.sources import files_of


@pytest.fixture(autouse=True)
def _log_all(caplog: pytest.LogCaptureFixture):
    folders.log_once.cache_clear()
    caplog.set_level(logging.INFO, "training")


def fill(folder: Path, numbers: range, ending: str | None = ".txt", kind: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in numbers:
        (folder / f"{n}{kind}").write_bytes(encoded(flat(n)))
        if ending:
            (folder / f"{n}{ending}").write_text(f"number {n}")
    return folder


def numbers(root: Path, **keys) -> list[int]:
    """Of all rows that train, from their pixels; each with its own caption."""
    rows = open_rows(Data(path=str(root), **{"resolution": 8, "held_out": 0.0, **keys}))
    seen = [int(rows.pictures([i])[0, 0, 4, 4]) for i in range(len(rows))]
    if rows.data.caption_column:
        assert list(rows.captions) == [f"number {n}" for n in seen]
    return sorted(seen)


# ---- splits


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize(
    "layout",
    [{"": 4, "test": 2}, {"train": 3, "bus": 2, "car": 1}, {"a/b": 1, "Dev": 2}, {"test": 1, "val": 2, "x": 1}],
    ids=lambda layout: "+".join(layout),
)
def test_a_folder_with_the_name_of_a_split_hides_no_others(tmp_path: Path, layout: dict, metadata: bool, caplog):
    first, lines = 0, []
    for name, count in layout.items():
        fill(tmp_path / name, range(first, first + count), None if metadata else ".txt")
        lines += [
            {"file_name": f"{name}/{n}.png".lstrip("/"), "text": f"number {n}"} for n in range(first, first + count)
        ]
        first += count
    if metadata:
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert numbers(tmp_path) == list(range(first))
    named = [x for x in layout if x.lower() in ("test", "train", "dev", "val")]
    assert all(f"{name}/" in caplog.text for name in named) and "all are used" in caplog.text


def test_splits_with_pictures_in_neither_are_refused(tmp_path: Path):
    fill(tmp_path / "train", range(3))
    fill(tmp_path / "validation", range(3, 5))
    assert numbers(tmp_path) == [0, 1, 2]
    fill(tmp_path / "more", range(5, 7))
    with pytest.raises(
        DataError, match=r"train/ and validation/ are splits .*2 other pictures \(more/5\.png …\) lie in"
    ):
        numbers(tmp_path)


def test_pictures_of_folders_without_metadata_are_counted(tmp_path: Path, caplog):
    """One folder has a metadata file, its neighbour has none."""
    fill(tmp_path / "a", range(3), None)
    (tmp_path / "a" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{n}.png,number {n}\n" for n in range(3))
    )
    fill(tmp_path / "b", range(3, 7), None)
    assert numbers(tmp_path) == [0, 1, 2]
    assert "in no row of its metadata, left out: 4 pictures, the first" in caplog.text and "b/3.png" in caplog.text


def test_pictures_beside_parquet_files_are_named(tmp_path: Path, caplog):
    fill(tmp_path, range(2), None)
    columns = {"image": [encoded(flat(n)) for n in range(3)], "text": [f"number {n}" for n in range(3)]}
    parquet(tmp_path / "rows.PARQUET", columns)
    assert numbers(tmp_path) == [0, 1, 2]
    assert "the pictures beside them (0.png) are left out" in caplog.text


# ---- captions


@pytest.mark.parametrize("ending", [".caption", ".TXT", ".cap", ".Caption", ".txt"])
def test_caption_files_are_found(tmp_path: Path, ending: str, caplog):
    root = fill(tmp_path / "a", range(4), ending)
    fill(root / "deeper", range(4, 6), ending)
    assert numbers(root) == list(range(6))
    said = f"captions: 6 of 6 pictures have a {ending.lower()} file"
    assert said in caplog.text
    caplog.clear()
    assert look(root, "number") == (6, "files", True) and said in caplog.text


def test_endings_that_differ_in_case_or_number(tmp_path: Path, caplog):
    root = fill(tmp_path, range(3), ".TXT")
    fill(root, range(3, 6), ".txt")
    assert numbers(root) == list(range(6))
    (root / "0.caption").write_text("a note")  # fewer pictures have one
    (root / "7.txt").write_text("a caption without a picture")
    assert numbers(root) == list(range(6)) and "passed over: 1 .caption, 1 .txt" in caplog.text
    fill(root, range(6, 7), None)
    with pytest.raises(DataError, match=r"1 of 7 .*6\.png: its caption \(a \.txt file beside it\) is missing"):
        numbers(root)
    with pytest.raises(DataError, match=r"6 of 7 pictures have a caption in a \.txt .*6\.txt is missing"):
        look(root, "number")


def test_an_ending_that_is_asked_for_is_taken_alone(tmp_path: Path):
    root = fill(tmp_path, range(4))
    for n in range(3):
        (root / f"{n}.en.note").write_text(f"number {n}")
    with pytest.raises(DataError, match=r"1 of 4 .*3\.png: its caption \(a \.en\.note file beside it\) is missing"):
        numbers(root, caption_extension=".en.note")
    assert numbers(root, caption_extension="en.note", max_skipped=0.5) == [0, 1, 2]
    with pytest.raises(DataError, match=r"expected 0\.json beside 0\.png, or metadata\.jsonl; .* are 4 \.txt"):
        numbers(root, caption_extension=".json")


def test_no_captions(tmp_path: Path, caplog):
    root = fill(tmp_path, range(3), ".foo")
    told = r"no captions found for 3 pictures: expected 0\.txt beside 0\.png, or metadata\.jsonl; .* are 3 \.foo"
    with pytest.raises(DataError, match=told):
        numbers(root)
    assert look(root, "x") == (3, "none", False)
    assert "no picture has a file beside it, as in 0.txt beside 0.png" in caplog.text and "3 .foo" in caplog.text
    (root / "metadata.json").write_text("{}")  # of another trainer
    assert look(root, "x").captions == "none"


# ---- other files


@pytest.mark.parametrize("stray", ["contract.pdf", "MVI_1.MPG", "0.mp4", "data.h5", "art.eps", "raw.CR2", "README"])
def test_files_that_are_no_pictures_are_counted(tmp_path: Path, stray: str, caplog):
    (fill(tmp_path, range(3)) / stray).write_bytes(b"%PDF-1.4 \0")
    assert numbers(tmp_path) == [0, 1, 2]
    ending = Path(stray).suffix.lower() or "without an ending"
    assert f"passed over: 1 {ending}" in caplog.text


@pytest.fixture
def no_heif(monkeypatch: pytest.MonkeyPatch):
    """As on a machine without pillow-heif."""
    for name in ("_register_heif", "picture_endings"):
        getattr(pictures, name).cache_clear()
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    monkeypatch.setattr(Image, "ID", [x for x in Image.ID if x != "HEIF"])
    yield
    for name in ("_register_heif", "picture_endings"):
        getattr(pictures, name).cache_clear()


HEIC = b"\0\0\0\x24ftypheic" + bytes(200)


@pytest.mark.parametrize("ending", [".HEIC", ".heif", ".hif"])
def test_heif_pictures_that_cannot_be_read_are_counted(tmp_path: Path, ending: str, no_heif, caplog):
    for n in range(5):
        (fill(tmp_path / "a", range(3)) / f"IMG_{n}{ending}").write_bytes(HEIC)
    assert numbers(tmp_path / "a") == [0, 1, 2]
    assert "left out: 5 HEIF pictures; `pip install pillow-heif`" in caplog.text
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f"x{ending}").write_bytes(HEIC)
    with pytest.raises(DataError, match=r"is empty: .*but 1 HEIF picture: `pip install pillow-heif`"):
        numbers(tmp_path / "b")
    (fill(tmp_path / "c", range(3)) / "0.png").write_bytes(HEIC)  # its name says otherwise
    with pytest.raises(DataError, match=r"0\.png: does not decode \(a HEIF picture; `pip install pillow-heif`"):
        numbers(tmp_path / "c")


def test_heif_pictures_are_read(tmp_path: Path):
    heif = pytest.importorskip("pillow_heif")
    root = fill(tmp_path, range(2))
    for n in (40, 200):
        heif.from_pillow(flat(n, 64, 64)).save(root / f"{n}.HEIC", quality=-1, chroma=444)
        (root / f"{n}.txt").write_text(f"number {n}")
    rows = open_rows(Data(path=str(root), resolution=8, held_out=0.0))
    red = {rows.captions[i]: int(rows.pictures([i])[0, 0, 4, 4]) for i in range(len(rows))}
    assert set(red) == {"number 0", "number 1", "number 40", "number 200"}
    assert all(abs(value - int(text.split()[1])) <= 3 for text, value in red.items())  # by way of YCbCr


# ---- links and names


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("metadata", [False, True])
def test_linked_folders_are_followed_without_loops(tmp_path: Path, metadata: bool):
    root, away = fill(tmp_path / "a" / "root", range(4)), fill(tmp_path / "away", range(4, 7))
    fill(tmp_path / "a" / "sibling", range(50, 53))
    fill(root / "z", range(7, 9))
    links = {"more": away, "up": root.parent, "self": root, "same": root / "z", "gone": tmp_path / "nowhere"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (away / "back").symlink_to(root)
    (away / "round").symlink_to(away)
    if metadata:
        named = [*(f"{n}.png" for n in range(4)), *(f"more/{n}.png" for n in range(4, 7)), "z/7.png", "z/8.png"]
        lines = (json.dumps({"file_name": x, "text": f"number {Path(x).stem}"}) for x in named)
        (root / "metadata.jsonl").write_text("\n".join(lines))
    assert numbers(root) == list(range(9))
    assert [Path(x).name for x in folders.pictures_in(root)].count("7.png") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere refuse such names")
def test_a_name_that_is_not_utf8(tmp_path: Path, capsys):
    root = fill(tmp_path / "a", range(3))
    for ending in (".png", ".txt"):
        os.rename(root / f"2{ending}", os.fsencode(root) + b"/caf\xe9" + ending.encode())
    assert numbers(root) == [0, 1, 2]
    assert numbers(root, caption_column=None) == [0, 1, 2]
    assert numbers(root, held_out=0.4) != [0, 1, 2]
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.png")).write_bytes(b"x")
    with pytest.raises(DataError, match=r"caf\\xe9\.png: does not decode") as refused:
        numbers(root)
    str(refused.value).encode()  # can be printed
    (root / "metadata.jsonl").write_text(
        "\n".join(f'{{"file_name": "{n}.png", "text": "number {n}"}}' for n in range(2))
    )
    assert numbers(root) == [0, 1]


def test_split_folders_are_listed_by_files_of(tmp_path: Path):
    fill(tmp_path / "train", range(2))
    fill(tmp_path / "Val", range(2))
    assert files_of(str(tmp_path))[1] == {"train": [tmp_path / "train"], "validation": [tmp_path / "Val"]}


# ---- PNG with much beside its pixels


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", [b"zTXt", b"tEXt", b"iTXt", b"iCCP"])
def test_a_png_with_much_text_or_a_large_profile(kind: bytes, after: bool):
    text = b"x" * 3_000_000
    head = {b"zTXt": b"a\0\0", b"tEXt": b"a\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    large = chunk(kind, head + (text if kind == b"tEXt" else zlib.compress(text)))
    png = encoded(flat(9))
    at = len(png) - 12 if after else 33
    got = pictures.decode(png[:at] + large + png[at:], 8)
    assert (got[0] == 9).all() and pictures.dimensions(png[:at] + large + png[at:]) == (16, 16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 20, "PNG: "),
        (encoded(flat(1), "GIF")[:9], "GIF: "),
        (encoded(flat(1), "BMP")[:20], "Truncated File Read"),
        (b"hello", "not a picture in a known format"),
    ],
)
def test_the_reason_of_a_refusal_is_named(data: bytes, reason: str):
    with pytest.raises(ValueError, match=rf"does not decode \({reason}"):
        pictures.header(data)
