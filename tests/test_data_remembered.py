"""What was found out about a large source is kept, and forgotten as soon as a file of it changes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import training.index
from tests.datasets_made import encoded, flat, noise, parquet, tar
from training.data import Rows, open_rows
from training.index import look
from training.remembered import remembered
from training.schema import Data


@pytest.fixture
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each look was at; any source counts as large."""
    import datasets

    seen: list[int] = []

    def counted(table, rows, *args, **keys):
        seen.append(len(rows))
        return look(table, rows, *args, **keys)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(training.index, "REMEMBERED", 2)
    monkeypatch.setattr(training.index, "look", counted)
    return seen


def folder(root: Path) -> Path:
    root.mkdir()
    for i in range(12):
        (root / f"{i}.png").write_bytes(encoded(noise(i, 16 + 8 * (i % 3), 16)))
        (root / f"{i}.txt").write_text(f"number {i}")
    (root / "7.png").write_bytes(b"broken")
    return root


def rows_of(path: Path, **keys) -> Rows:
    return open_rows(Data(path=str(path), resolution=16, bucket_step=4, max_skipped=0.2, **keys), in_memory=0)


def test_the_second_time_nothing_is_read(tmp_path: Path, looks: list[int]):
    root = folder(tmp_path / "a")
    first = rows_of(root)
    assert len(looks) == 1
    second = rows_of(root)
    assert len(looks) == 1  # from disk
    assert first.fingerprint == second.fingerprint and first.skipped == second.skipped and len(first.skipped) == 1
    assert (first.sizes == second.sizes).all() and [first.digest(i) for i in range(5)] == [
        second.digest(i) for i in range(5)
    ]
    open_rows(Data(path=str(root), resolution=16, bucket_step=4, max_skipped=0.2))
    assert len(looks) == 2  # pictures that are held are decoded each time


@pytest.mark.parametrize("what", ["picture", "caption", "new", "gone", "keys"])
def test_any_change_is_seen(tmp_path: Path, looks: list[int], what: str):
    root = folder(tmp_path / "a")
    before = rows_of(root, held_out=0.01).fingerprint
    if what == "picture":
        (root / "3.png").write_bytes(encoded(noise(99, 16, 16)))
    elif what == "caption":
        (root / "3.txt").write_text(" ")
    elif what == "new":
        (root / "x.png").write_bytes(encoded(noise(50)))
        (root / "x.txt").write_text("new")
    elif what == "gone":
        (root / "3.png").unlink()
    after = rows_of(root, held_out=0.01, **({"center_crop": False, "max_aspect_ratio": 1.2} if what == "keys" else {}))
    assert len(looks) == 2 and after.fingerprint != before


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_parquet_and_tars(tmp_path: Path, looks: list[int], kind: str, monkeypatch: pytest.MonkeyPatch):
    pictures = [encoded(flat(i)) for i in range(12)]
    file = tmp_path / f"a.{kind}"

    def write(captions: list[str]) -> None:
        if kind == "parquet":
            parquet(file, {"image": pictures, "text": captions})
        else:
            pairs = zip(pictures, captions, strict=True)
            tar(file, [x for i, (p, c) in enumerate(pairs) for x in ((f"{i}.png", p), (f"{i}.txt", c.encode()))])

    write([f"number {i}" for i in range(12)])
    read = []
    real = training.index.keys_of
    monkeypatch.setattr(training.index, "keys_of", lambda *args: (read.append(1), real(*args))[1])
    first, second = rows_of(file), rows_of(file)
    assert len(looks) == 1 and first.fingerprint == second.fingerprint
    assert len(read) == (1 if kind == "parquet" else 2)  # contents are kept too; names are at hand
    write([f"another {i}" for i in range(12)])
    os.utime(file, ns=(1, 1))
    assert rows_of(file).captions[0].startswith("another") and len(looks) == 2


def test_a_file_that_was_cut_is_made_anew(tmp_path: Path, looks: list[int], caplog: pytest.LogCaptureFixture):
    calls: list[int] = []

    def make() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"a": np.arange(1000)}

    for _ in range(2):
        assert (remembered("x", make)["a"] == np.arange(1000)).all()
    assert len(calls) == 1
    (kept,) = (tmp_path / "cache" / "latent_t2i_index").glob("*.npz")
    for content in (b"", kept.read_bytes()[:700]):
        kept.write_bytes(content)
        assert (remembered("x", make)["a"] == np.arange(1000)).all()
    assert len(calls) == 3 and "made anew" in caplog.text
    assert not list(kept.parent.glob("*.partial"))


def test_a_place_that_cannot_be_written(tmp_path: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch, caplog):
    import datasets

    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    assert len(remembered("x", lambda: {"a": np.arange(3)})["a"]) == 3 and "is not kept" in caplog.text
