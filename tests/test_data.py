"""Sources -> rows: decoding has one defined result, splits never meet, and bad data is refused by name."""

from __future__ import annotations

import copy
import io
import json
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from training.data import DataError, check_rows, open_rows
from training.pictures import decode


def noise(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def imagefolder(root: Path, n: int, captions: dict[int, object] | None = None) -> Path:
    root.mkdir(parents=True)
    lines = []
    for i in range(n):
        (root / f"{i}.png").write_bytes(png(noise(i)))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": (captions or {}).get(i, f"picture {i}")}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def parquet(file: Path, rows: dict) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), file)
    return file


def content(root: Path) -> dict[str, bytes]:
    return {str(x): x.read_bytes() for x in root.rglob("*") if x.is_file()}


# ---- pictures


def test_centre_crop_by_position():
    """24 × 16 at 16: columns 4 to 19 as they are, nothing resampled."""
    picture = noise(1)
    assert np.array_equal(decode(png(picture), 16).transpose(1, 2, 0), np.asarray(picture)[:, 4:20])


def test_resize_is_pillows_lanczos_then_crop():
    """Against the two steps in their plain order; one step of rounding in 8 bits apart."""
    picture = noise(2, 60, 40)
    plain = picture.resize((30, 20), Image.Resampling.LANCZOS).crop((5, 0, 25, 20))
    got = decode(png(picture), 20).transpose(1, 2, 0)
    assert np.abs(got.astype(int) - np.asarray(plain)).max() <= 1


def test_without_crop_the_whole_is_squeezed():
    picture = Image.new("RGB", (30, 10), "black")
    picture.paste("white", (15, 0, 30, 10))
    got = decode(png(picture), 10, center_crop=False)
    assert got[:, :, :4].max() < 10 and got[:, :, 6:].min() > 245


def test_antialiasing_keeps_the_mean():
    """A checkerboard of single pixels becomes grey, where nearest neighbour would give stripes."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    got = decode(png(board), 16)[:, 2:-2, 2:-2].astype(float)
    assert np.abs(got - 127.5).max() < 2


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("RGBA", (8, 8), (200, 0, 0, 0)), (255, 255, 255)),  # wholly transparent: white, not black
        (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)),
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 257 * 40, np.uint16)), (40, 40, 40)),  # Pillow alone would clip to 255
        (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
        (Image.new("RGB", (2, 300), (9, 8, 7)), (9, 8, 7)),
    ],
)
def test_every_mode_has_a_defined_result(picture: Image.Image, expected: tuple[int, int, int]):
    got = decode(png(picture), 8)
    assert got.shape == (3, 8, 8) and got.dtype == np.uint8
    assert (np.abs(got.reshape(3, -1).astype(int) - np.array(expected)[:, None]) <= 1).all()


def test_palette_with_a_transparent_colour():
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    assert decode(png(picture), 8)[:, 0, 0].tolist() == [255, 0, 0]
    assert decode(png(picture, transparency=1), 8)[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("kind", "tolerance"), [("TIFF", 0), ("JPEG", 2)])  # JPEG is lossy
def test_cmyk_and_float(kind: str, tolerance: int):
    got = decode(png(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind), 8)  # no cyan: red
    assert np.abs(got[:, 0, 0].astype(int) - [255, 0, 0]).max() <= tolerance
    if kind == "TIFF":
        assert decode(png(Image.new("F", (8, 8), 0.2), kind), 8)[:, 0, 0].tolist() == [51, 51, 51]


def test_exif_rotation_is_applied():
    """Orientation 6: the camera was turned; the file's left edge is the picture's top."""
    picture = Image.new("RGB", (32, 32), "blue")
    picture.paste("red", (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    got = decode(png(picture, "JPEG", exif=exif, quality=95), 8)
    assert got[0, :3].min() > 200 and got[2, :3].max() < 60  # top red
    assert got[2, 5:].min() > 200 and got[0, 5:].max() < 60


def test_a_large_jpeg_is_decoded_small(monkeypatch: pytest.MonkeyPatch):
    """With draft the answer is that of a full decode to a few grey levels, on a smooth picture."""
    ramp = np.linspace(0, 255, 512).round().astype(np.uint8)
    across = np.tile(ramp, (512, 1))
    smooth = Image.fromarray(np.stack([across, across.T, np.full_like(across, 90)], 2))
    sizes, real = [], Image.Image.resize

    def spy(self, *args, **kwargs):
        sizes.append(self.size)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spy)
    got = decode(png(smooth, "JPEG", quality=95), 60)
    assert sizes == [(64, 64)]  # an eighth, still at least 60
    full = decode(png(smooth), 60)
    assert sizes[1] == (512, 512)
    assert np.abs(got.astype(int) - full).max() <= 4


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises a picture, and nothing after it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    body = struct.pack(">I", len(head)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    idat = b"IDAT" + zlib.compress(b"\0")
    return b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))


@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow warns of the first and raises for the second
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_from_its_header(side: int):
    with pytest.raises(ValueError, match="decompression bomb"):
        decode(bomb(side, side), 8)


@pytest.mark.parametrize("broken", [b"", b"GIF89a", b"no picture", png(noise(0, 200, 200))[:3000], bomb(50, 50)])
def test_what_does_not_decode(broken: bytes):
    with pytest.raises(ValueError, match=r"does not decode|is empty"):
        decode(broken, 8)


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
    assert sorted(one.captions + held.captions) == sorted(captions)
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
    assert copy.deepcopy(rows).captions == rows.captions


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
    with pytest.raises(DataError, match=r"expected a folder or a \.parquet"):
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
    with pytest.raises(DataError, match=r"no column 'text'.*metadata\.jsonl"):
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
        and "left out: 1 picture(s)" in caplog.text
        and "stray.jpg" in caplog.text
    )


@pytest.mark.parametrize(
    ("options", "key"),
    [({"resolution": 0}, "resolution"), ({"held_out": 0.0}, "held_out"), ({"held_out": 1.0}, "held_out"),
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
