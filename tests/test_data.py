"""Sources -> rows: decoding has one defined result, splits never meet, and bad data is refused by name."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.datasets_made import bomb, noise, parquet
from tests.datasets_made import encoded as png
from training.data import DataError, check_rows, open_rows
from training.pictures import decode


def imagefolder(root: Path, n: int, captions: dict[int, object] | None = None) -> Path:
    root.mkdir(parents=True)
    lines = []
    for i in range(n):
        (root / f"{i}.png").write_bytes(png(noise(i)))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": (captions or {}).get(i, f"picture {i}")}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def content(root: Path) -> dict[str, bytes]:
    return {str(x): x.read_bytes() for x in root.rglob("*") if x.is_file()}


# ---- rows


def test_imagefolder(tmp_path: Path):
    root = imagefolder(tmp_path / "a [b] *", 40)  # a name that a glob would misread
    rows, held = open_rows(root, resolution=16), open_rows(root, split="test", resolution=16)
    assert len(rows) + len(held) == 40 and 1 <= len(held) <= 8
    assert not set(rows.captions) & set(held.captions)
    for part in (rows, held):
        for i, caption in enumerate(part.captions):  # picture and caption belong together
            n = int(caption.split()[1])
            assert part.name(i) == str(root.resolve() / f"{n}.png")
            assert np.array_equal(part.pictures([i])[0].permute(1, 2, 0).numpy(), np.asarray(noise(n))[:, 4:20])
    batch = rows.pictures([3, 0, 3])
    assert batch.shape == (3, 3, 16, 16) and batch.dtype == torch.uint8
    assert torch.equal(batch[0], batch[2]) and not torch.equal(batch[0], batch[1])
    assert torch.equal(rows[3]["picture"], batch[0]) and rows[3]["caption"] == rows.captions[3]


def test_on_demand_equals_in_memory(tmp_path: Path):
    root = imagefolder(tmp_path / "a", 10)
    held, lazy = (open_rows(root, resolution=12, in_memory=n) for n in (2**30, 0))
    quick = open_rows(root, resolution=12, in_memory=0, verify=False)
    order = [4, 1, 1, 0]
    assert torch.equal(held.pictures(order), lazy.pictures(order))
    assert torch.equal(held.pictures(order), quick.pictures(order))
    assert held.fingerprint == lazy.fingerprint == quick.fingerprint
    (root / Path(lazy.name(1)).name).write_bytes(b"gone bad")
    with pytest.raises(DataError, match=Path(lazy.name(1)).name):
        lazy.pictures(order)


def test_the_held_out_rows_stay_when_others_join(tmp_path: Path):
    """Names decide, each for itself: with 40 more pictures no row of before changes sides."""
    small, large = imagefolder(tmp_path / "s", 40), imagefolder(tmp_path / "l", 80)
    before = {i for i in open_rows(small, split="test", resolution=8, held_out=0.3).captions}
    after = {i for i in open_rows(large, split="test", resolution=8, held_out=0.3).captions}
    assert before and before == {x for x in after if int(x.split()[1]) < 40}
    assert len(open_rows(imagefolder(tmp_path / "two", 2), split="test", resolution=8).captions) == 1


def test_fingerprint_tells_contents_apart(tmp_path: Path):
    root = imagefolder(tmp_path / "a", 6)
    first = open_rows(root, resolution=8).fingerprint
    assert first == open_rows(root, resolution=8).fingerprint
    assert first == open_rows(imagefolder(tmp_path / "b", 6), resolution=8).fingerprint  # of the content, not the place
    assert first != open_rows(root, resolution=9).fingerprint
    assert first != open_rows(root, resolution=8, center_crop=False).fingerprint
    kept = Path(open_rows(root, resolution=8).name(0))
    kept.write_bytes(png(noise(99)))
    second = open_rows(root, resolution=8).fingerprint
    meta = root / "metadata.jsonl"
    meta.write_text(meta.read_text().replace(f"picture {kept.stem}", "another"))
    assert len({first, second, open_rows(root, resolution=8).fingerprint}) == 3


@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_with_splits(tmp_path: Path, shared: bool):
    """Metadata in each folder, or one file above them, of which each split takes its own rows."""
    train, test = imagefolder(tmp_path / "train", 5), imagefolder(tmp_path / "validation", 3)
    if shared:
        names = [f"{x.name}/{i}.png" for x, n in ((train, 5), (test, 3)) for i in range(n)]
        (tmp_path / "metadata.csv").write_text("file_name,text\n" + "\n".join(f"{x},{x}" for x in names))
        for folder in (train, test):
            (folder / "metadata.jsonl").unlink()
    (tmp_path / "test").mkdir()  # empty: no split
    rows, held = (open_rows(tmp_path, split=x, resolution=8) for x in ("train", "test"))
    assert len(rows) == 5 and len(held) == 3
    assert all("train" in rows.name(i) for i in range(5)) and all("validation" in held.name(i) for i in range(3))


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoded = [png(noise(i)) for i in range(20)]
    captions = [f"picture {i}" for i in range(20)]
    structs = [{"bytes": x, "path": None} for x in encoded]
    plain = parquet(tmp_path / "plain.parquet", {"image": encoded, "text": captions})
    nested = parquet(tmp_path / "nested" / "0.parquet", {"image": structs, "text": captions}).parent
    one, two = (open_rows(x, resolution=8) for x in (plain, nested))
    assert one.fingerprint == two.fingerprint and torch.equal(one.pictures([0, 5]), two.pictures([0, 5]))
    assert one.name(0).startswith(f"{plain}, row ")
    held = open_rows(plain, split="test", resolution=8)
    assert sorted([*one.captions, *held.captions]) == sorted(captions)
    turned = parquet(tmp_path / "turned.parquet", {"image": encoded[::-1], "text": captions[::-1]})
    assert sorted(open_rows(turned, resolution=8).captions) == sorted(one.captions)  # order plays no part
    both = tmp_path / "both"
    parquet(both / "data" / "train-00000-of-00001.parquet", {"image": encoded[:15], "text": captions[:15]})
    parquet(both / "data" / "test-00000-of-00001.parquet", {"image": encoded[15:], "text": captions[15:]})
    assert open_rows(both, resolution=8).captions == captions[:15]
    assert open_rows(both, split="test", resolution=8).captions == captions[15:]
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    large = open_rows(plain, resolution=8, in_memory=0)  # too large for memory: mapped from Arrow
    assert (tmp_path / "cache").is_dir()
    assert large.fingerprint == one.fingerprint and torch.equal(large.pictures([3, 2]), one.pictures([3, 2]))
    parquet(both / "more.parquet", {"image": encoded, "text": captions})
    with pytest.raises(DataError, match=r"more\.parquet: belongs to no split"):
        open_rows(both, resolution=8)


def test_no_cache_and_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = imagefolder(tmp_path / "a", 5)
    before = content(root)
    open_rows(root, resolution=8)
    assert content(root) == before
    assert not [x for x in (tmp_path / "cache").rglob("*.arrow")]


def test_without_captions(tmp_path: Path):
    root = imagefolder(tmp_path / "a", 5)
    (root / "metadata.jsonl").unlink()
    rows = open_rows(root, resolution=8, caption_column=None)
    assert set(rows.captions) == {""} and len(rows) == 4


def test_rows_go_into_a_loader(tmp_path: Path):
    rows = open_rows(imagefolder(tmp_path / "a", 9), resolution=8, in_memory=0)
    batch = next(iter(DataLoader(rows, batch_size=4)))
    assert batch["picture"].shape == (4, 3, 8, 8) and batch["caption"] == rows.captions[:4]
    for other in (copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))):
        assert other.captions == rows.captions and torch.equal(other.pictures([3]), rows.pictures([3]))


def test_check_rows(tmp_path: Path):
    root = imagefolder(tmp_path / "a", 12)
    rows = open_rows(root, resolution=20)
    told = check_rows(rows)
    assert told["rows"] == told["looked_at"] == told["enlarged"] == len(rows) and told["skipped"] == 0
    assert told["smallest"] == told["largest"] == (24, 16) and told["longest_caption"] == 2
    assert check_rows(rows, limit=4)["looked_at"] <= 4


# ---- bad input


def test_nothing_there(tmp_path: Path):
    import pyarrow as pa

    with pytest.raises(DataError, match=r"lost: no such folder.*hub:owner/name"):
        open_rows(tmp_path / "lost", resolution=8)
    with pytest.raises(DataError, match="is empty"):
        open_rows(tmp_path, resolution=8)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="is empty"):
        open_rows(tmp_path, resolution=8)
    with pytest.raises(DataError, match=r"expected a folder, a \.parquet or a \.tar"):
        open_rows(tmp_path / "notes.txt", resolution=8)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"cut\.parquet: is no parquet file"):
        open_rows(tmp_path / "cut.parquet", resolution=8)
    with pytest.raises(DataError, match="is empty: no rows"):
        open_rows(
            parquet(tmp_path / "e.parquet", {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}),
            resolution=8,
        )
    assert issubclass(DataError, ValueError)


def test_one_row_cannot_be_parted(tmp_path: Path):
    with pytest.raises(DataError, match="too few"):
        open_rows(imagefolder(tmp_path / "a", 1), resolution=8)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="hub:a/b: could not be had from the hub: Couldn't reach it"):
        open_rows("hub:a/b", resolution=8)


def test_missing_columns_name_those_there(tmp_path: Path):
    root = imagefolder(tmp_path / "a", 4)
    with pytest.raises(DataError, match=r"no column 'caption' \(caption_column\); there are: image.*, text \(str"):
        open_rows(root, resolution=8, caption_column="caption")
    with pytest.raises(DataError, match=r"no column 'picture' \(image_column\)"):
        open_rows(root, resolution=8, image_column="picture")
    with pytest.raises(DataError, match=r"column 'text' \(image_column\) holds no pictures"):
        open_rows(root, resolution=8, image_column="text")
    with pytest.raises(DataError, match=r"column 'text' \(caption_column\) is no text"):
        open_rows(imagefolder(tmp_path / "n", 4, {i: i for i in range(4)}), resolution=8)
    (root / "metadata.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"no captions found for 4 pictures: expected 0\.txt beside 0\.png, or metadata\.jsonl"
    ):
        open_rows(root, resolution=8)


@pytest.mark.parametrize("broken", [b"not a picture", b"", bomb(60_000, 60_000), None], ids=["junk", "0", "bomb", "-"])
def test_a_broken_picture_is_named_and_never_deleted(tmp_path: Path, broken: bytes | None, caplog):
    root = imagefolder(tmp_path / "a", 30)
    victim = Path(open_rows(root, resolution=8).name(3))
    victim.unlink() if broken is None else victim.write_bytes(broken)
    before = content(root)
    with pytest.raises(DataError, match=rf"1 of \d+ rows are of no use: .*{victim.name}.*At most 1\.0%"):
        open_rows(root, resolution=8)
    for in_memory in (2**30, 0):
        with caplog.at_level(logging.WARNING, "training.data"):
            rows = open_rows(root, resolution=8, max_skipped=0.1, in_memory=in_memory)
        assert str(victim) in caplog.text and "skipped" in caplog.text
        assert [Path(x.name) for x in rows.skipped] == [victim.resolve()]
        for i, caption in enumerate(rows.captions):  # the rows after it have moved up together
            expected = decode(png(noise(int(caption.split()[1]))), 8)
            assert np.array_equal(rows.pictures([i])[0].numpy(), expected)
    assert f"picture {victim.stem}" not in rows.captions
    assert content(root) == before


def test_all_broken_is_refused_whatever_is_allowed(tmp_path: Path):
    root = imagefolder(tmp_path / "a", 3)
    for file in root.glob("*.png"):
        file.write_bytes(b"x")
    with pytest.raises(DataError, match="of no use"):
        open_rows(root, resolution=8, max_skipped=1.0)


def test_captions_that_say_nothing(tmp_path: Path):
    root = imagefolder(tmp_path / "a", 30)
    one, two = (open_rows(root, resolution=8).captions[i] for i in (2, 5))
    lines = [json.loads(x) for x in (root / "metadata.jsonl").read_text().splitlines()]
    for row in lines:
        row["text"] = {one: None, two: "  \n"}.get(row["text"], f" {row['text']} ")
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"2 of \d+ rows are of no use: .*png: its caption \(column 'text'\) is empty"):
        open_rows(root, resolution=8)
    rows = open_rows(root, resolution=8, max_skipped=0.2)
    assert len(rows.skipped) == 2 and all(x == x.strip() and x for x in rows.captions)


@pytest.mark.parametrize(
    "text",
    ['{"file_name": "0.png", \n{', '{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": 3}', "é"],
)
def test_metadata_that_cannot_be_read_is_named(tmp_path: Path, text: str):
    root = imagefolder(tmp_path / "a", 2)
    (root / "metadata.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        open_rows(root, resolution=8)


def test_metadata_cannot_point_outside(tmp_path: Path):
    imagefolder(tmp_path / "secret", 2)
    root = imagefolder(tmp_path / "a", 2)
    (root / "metadata.jsonl").write_text('{"file_name": "../secret/0.png", "text": "a"}')
    with pytest.raises(DataError):
        open_rows(root, resolution=8)


def test_pictures_without_a_row_are_told_of(tmp_path: Path, caplog):
    root = imagefolder(tmp_path / "a", 5)
    (root / "stray.jpg").write_bytes(png(noise(1), "JPEG"))
    with caplog.at_level(logging.WARNING, "training.data"):
        assert len(open_rows(root, resolution=8)) == 4
    assert (
        "in no row of its metadata" in caplog.text
        and "left out: 1 picture," in caplog.text
        and "stray.jpg" in caplog.text
    )


@pytest.mark.parametrize(
    ("options", "key"),
    [({"resolution": 0}, "resolution"), ({"held_out": -0.1}, "held_out"), ({"held_out": 1.0}, "held_out"),
     ({"split": "dev"}, "split")],
)  # fmt: skip
def test_options_out_of_range(tmp_path: Path, options: dict, key: str):
    with pytest.raises(DataError, match=key):
        open_rows(imagefolder(tmp_path / "a", 2), **{"resolution": 8, **options})


def test_no_split_of_that_kind(tmp_path: Path):
    for name in ("test", "validation"):
        imagefolder(tmp_path / name, 2)
    with pytest.raises(DataError, match=r"no split for 'train' among .*validation"):
        open_rows(tmp_path, resolution=8)


def test_a_picture_whose_header_alone_was_read_may_turn_out_broken(tmp_path: Path, caplog):
    """It is grey then, named and counted; above the share that may be skipped the run ends."""
    pictures: list[bytes] = [png(noise(i, 60, 60)) for i in range(40)]
    pictures[3] = pictures[3][:3000]
    columns = {"image": pictures, "text": [f"picture {i}" for i in range(40)]}
    parquet(tmp_path / "train.parquet", columns)
    parquet(tmp_path / "test.parquet", {key: some[5:6] for key, some in columns.items()})
    with pytest.raises(DataError, match=r"1 of 40 rows .*row 3: does not decode"):
        open_rows(tmp_path, resolution=8)
    rows = open_rows(tmp_path, resolution=8, in_memory=0, verify=False, max_skipped=0.03)
    with caplog.at_level(logging.WARNING, "training.data"):
        for _ in range(2):
            batch = rows.pictures([2, 3, 4])
    assert (batch[1] == 127).all() and len(torch.unique(batch[0])) > 10 and rows.broken == {3}
    assert caplog.text.count("row 3: does not decode") == 1 and "grey" in caplog.text
    strict = open_rows(tmp_path, resolution=8, in_memory=0, verify=False, max_skipped=0.02)
    with pytest.raises(DataError, match=r"row 3.*data\.verify: true"):
        strict.pictures([3])


def test_many_rows_have_their_headers_read(tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch):
    import training.index

    root = imagefolder(tmp_path / "a", 9)
    monkeypatch.setattr(training.index, "DECODED", 5)
    for verify, told in ((None, True), (True, False)):
        caplog.clear()
        rows = open_rows(root, resolution=8, in_memory=0, verify=verify)
        assert ("only the headers are looked at" in caplog.text) is told
        assert rows.fingerprint == open_rows(root, resolution=8).fingerprint


def test_the_first_rows_alone(tmp_path: Path):
    rows = open_rows(imagefolder(tmp_path / "a", 12), resolution=8)
    few = rows.head(4)
    assert len(few) == 4 and few.captions == rows.captions[:4] and rows.head(99) is rows
    assert torch.equal(few.pictures(range(4)), rows.pictures(range(4))) and few.digest(3) == rows.digest(3)
