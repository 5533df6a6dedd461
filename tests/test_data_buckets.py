"""Buckets: shapes of one area, the nearest aspect ratio, no more cut off than that asks for, SDXL's sizes, masks."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.datasets_made import encoded, imagefolder, noise, parquet
from training.buckets import cropped, default_step, nearest, shapes, size_ids
from training.clock import ImageClock
from training.config import parse
from training.data import DataError, check_rows, crop_shares, open_rows
from training.fit import ConfigError
from training.pictures import decode, decode_mask
from training.schema import Data

MIXED = [(32, 32), (48, 24), (24, 48), (64, 20), (40, 32), (33, 32), (20, 30)]  # width, height


@pytest.mark.parametrize(("resolution", "step"), [(64, 8), (64, 16), (512, 64), (1024, 64), (96, 32), (8, 8)])
def test_shapes(resolution: int, step: int):
    found = shapes(resolution, step)
    assert (resolution, resolution) in found and len(set(found)) == len(found)
    for h, w in found:
        assert h % step == 0 and w % step == 0 and (w, h) in found
        assert h * w <= resolution**2 and max(h, w) <= 2 * min(h, w)
        longer = max(h, w) + step
        assert min(h, w) * longer > resolution**2 or longer > 2 * min(h, w)  # the next longer one does not fit
    assert found[0] == min(found, key=lambda s: s[0] / s[1])
    ratios = [h / w for h, w in found]
    assert ratios == sorted(ratios)


def test_the_longest_ratio_has_a_shape():
    assert shapes(1024, 64)[0] == (704, 1408) and shapes(64, 8)[-1] == (80, 40)
    assert shapes(512, 64, 1.0) == [(512, 512)] and shapes(16, 8) == [(16, 16)]  # 8 × 16 is half the area
    assert shapes(1024, 64, 1.5)[0] == (768, 1152)


def test_sdxls_own_buckets_are_among_ours():
    """Podell et al. 2023, appendix I, as far as they are multiples of 64 with a ratio of at most 2."""
    known = {(768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832), (1344, 768)}
    assert known <= set(shapes(1024, 64))


def test_nearest_is_nearest():
    among = shapes(256, 16)
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 900, 500), rng.integers(1, 900, 500)
    for h, w in zip(heights.tolist(), widths.tolist(), strict=True):
        k = nearest(h, w, among)
        apart = [abs(math.log((h / w) / (a / b))) for a, b in among]
        assert apart[k] == pytest.approx(min(apart), abs=1e-12)


@pytest.mark.parametrize(("resolution", "step"), [(64, 64), (512, 64), (96, 32), (100, 4), (30, 2), (768, 64)])
def test_default_step(resolution: int, step: int):
    assert default_step(resolution) == step
    assert (resolution, resolution) in shapes(resolution, step)


def test_what_is_cropped():
    """300 × 200 to a square: a third; a picture of the shape's own ratio: nothing."""
    assert cropped(np.array([200]), np.array([300]), (64, 64))[0] == pytest.approx(1 / 3)
    assert cropped(np.array([200]), np.array([300]), (64, 96))[0] == pytest.approx(0)
    assert cropped(np.array([7]), np.array([5]), (70, 50))[0] == pytest.approx(0)


def test_a_picture_of_a_buckets_own_shape_is_whole():
    """Nothing is cut, nothing resampled; and of a longer one only what is over, on both sides alike."""
    picture = noise(1, 40, 24)
    assert np.array_equal(decode(encoded(picture), (24, 40)).transpose(1, 2, 0), np.asarray(picture))
    assert np.array_equal(decode(encoded(picture), (24, 32)).transpose(1, 2, 0), np.asarray(picture)[:, 4:36])
    assert np.array_equal(decode(encoded(picture), (20, 40)).transpose(1, 2, 0), np.asarray(picture)[2:22])


def mixed(root: Path, count: int = 42) -> Path:
    return imagefolder(root, [noise(i, *MIXED[i % len(MIXED)]) for i in range(count)])


def test_rows_in_buckets(tmp_path: Path):
    root = mixed(tmp_path / "a")
    data = Data(path=str(root), resolution=32, bucket_step=4)
    rows, lazy = open_rows(data), open_rows(data, in_memory=0)
    among = shapes(32, 4)
    assert len(rows.shapes) >= 4 and set(rows.shapes) < set(among)
    assert rows.bucket.dtype == np.uint16 and set(rows.bucket) == set(range(len(rows.shapes)))
    for i, caption in enumerate(rows.captions):
        n = int(caption.split()[1])
        w, h = MIXED[n % len(MIXED)]
        shape = rows.shapes[rows.bucket[i]]
        assert shape == among[nearest(h, w, among)]
        expected = torch.from_numpy(decode(encoded(noise(n, w, h)), shape))
        assert torch.equal(rows.pictures([i])[0], expected) and torch.equal(lazy.pictures([i])[0], expected)
        assert rows.digest(i) == lazy.digest(i)
    assert rows.fingerprint == lazy.fingerprint
    for batch in ImageClock(rows.bucket, 4, 0, 0, 400):
        own = [row for _, row in batch]
        assert rows.pictures(own).shape == (4, 3, *rows.shape(own))
    with pytest.raises(ValueError, match="buckets; a batch is of one"):
        rows.pictures(range(len(rows)))


def test_without_buckets_and_of_squares_there_is_one(tmp_path: Path):
    data = Data(path=str(mixed(tmp_path / "a")), resolution=32, bucket_step=4)
    assert open_rows(data, buckets=False).shapes == [(32, 32)]
    squares = imagefolder(tmp_path / "b", [noise(i, 20 + i, 20 + i) for i in range(9)])
    assert open_rows(Data(path=str(squares), resolution=32, bucket_step=4)).shapes == [(32, 32)]
    assert open_rows(Data(path=str(tmp_path / "a"), resolution=32)).shapes == [(32, 32)]  # the safe step, 32
    assert len(open_rows(Data(path=str(tmp_path / "a"), resolution=32), step=8).shapes) > 2


def test_the_digest_tells_content_and_cut_apart(tmp_path: Path):
    root = mixed(tmp_path / "a")
    data = Data(path=str(root), resolution=32, bucket_step=4, max_skipped=1)

    def digests(**keys) -> dict[str, bytes]:
        rows = open_rows(data.model_copy(update=keys))
        return {Path(rows.name(i)).name: rows.digest(i) for i in range(len(rows))}

    before = digests()
    assert len(set(before.values())) == len(before) and all(len(x) == 16 for x in before.values())
    assert digests() == before
    assert not set(digests(resolution=64).values()) & set(before.values())
    assert not set(digests(center_crop=False).values()) & set(before.values())
    changed = next(iter(before))
    (root / changed).write_bytes(encoded(noise(99, 40, 32)))
    after = digests()
    assert {k for k in before if before[k] != after[k]} == {changed}


def test_crops_are_told(tmp_path: Path):
    rows = open_rows(Data(path=str(mixed(tmp_path / "a")), resolution=32, bucket_step=4))
    shares = crop_shares(rows)
    for i in range(len(rows)):
        (h, w), (a, b) = rows.sizes[i], rows.shapes[rows.bucket[i]]
        assert shares[i] == pytest.approx(1 - min((h / w) / (a / b), (a / b) / (h / w)))
    long = [i for i in range(len(rows)) if tuple(rows.sizes[i]) == (20, 64)]
    assert all(rows.shapes[rows.bucket[i]] == (20, 40) or shares[i] < 0.5 for i in long)
    told = check_rows(rows)
    assert sum(told["buckets"].values()) == len(rows) and told["cropped"] == pytest.approx(shares.mean())


def test_size_ids_are_sdxls(tmp_path: Path):
    """100 × 50 in 64 × 64: scaled to 128 × 64, 32 columns cut on each side."""
    ids = size_ids(np.array([50, 64]), np.array([100, 64]), (64, 64), True)
    assert ids.tolist() == [[50, 100, 0, 32, 64, 64], [64, 64, 0, 0, 64, 64]]
    assert size_ids(np.array([50]), np.array([100]), (64, 64), False).tolist() == [[50, 100, 0, 0, 64, 64]]
    rows = open_rows(Data(path=str(mixed(tmp_path / "a")), resolution=32, bucket_step=4))
    got = rows.size_ids([0])
    assert got.dtype == torch.float32 and got.shape == (1, 6)
    assert got[0, :2].tolist() == rows.sizes[0].tolist() and got[0, 4:].tolist() == list(rows.shape([0]))


def test_a_turned_picture_is_as_it_is_shown(tmp_path: Path):
    """A JPEG of 48 × 24 with orientation 6 is 24 wide and 48 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = [encoded(noise(i, 48, 24), "JPEG", exif=exif, quality=95) for i in range(4)]
    rows = open_rows(Data(path=str(imagefolder(tmp_path / "a", turned)), resolution=32, bucket_step=4))
    assert rows.sizes.tolist() == [[48, 24]] * 3 and rows.shapes[0][0] > rows.shapes[0][1]
    upright = np.asarray(Image.open(io.BytesIO(turned[0])).transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(decode(turned[0], (48, 24)).transpose(1, 2, 0), upright)


# ---- masks


def masked_folder(root: Path) -> Path:
    root.mkdir()
    for i in range(12):
        picture = noise(i, 40, 20)
        (root / f"{i}.png").write_bytes(encoded(picture))
        (root / f"{i}.txt").write_text(f"number {i}")
        if i % 3:
            mask = Image.new("L", (80, 40), 0)  # finer than its picture
            mask.paste(255, (40, 0, 80, 40))
            (root / f"{i}-masklabel.png").write_bytes(encoded(mask))
    return root


def test_mask_files(tmp_path: Path):
    data = Data(path=str(masked_folder(tmp_path / "a")), resolution=20, mask_suffix="-masklabel.png", buckets=False)
    rows = open_rows(data)
    assert len(rows) + len(open_rows(data, split="test")) == 12  # the masks are no pictures
    masks = rows.masks(range(len(rows)))
    assert masks is not None and masks.shape == (len(rows), 1, 20, 20) and masks.dtype == torch.float32
    for i, caption in enumerate(rows.captions):
        if int(caption.split()[1]) % 3:  # the middle square of the picture, its right half counts
            assert masks[i, 0, :, :9].max() == 0 and masks[i, 0, :, 11:].min() == 1
        else:
            assert masks[i].min() == 1
    assert open_rows(data.model_copy(update={"mask_suffix": None}), buckets=False, split="test").masks([0]) is None


def test_mask_columns(tmp_path: Path):
    grey = Image.fromarray(np.full((16, 16), 51, np.uint8))
    rows = {"image": [encoded(noise(i, 16, 16)) for i in range(9)], "text": ["a"] * 9, "weight": [encoded(grey)] * 9}
    file = parquet(tmp_path / "a.parquet", rows)
    found = open_rows(Data(path=str(file), resolution=8, mask_column="weight")).masks([0, 1])
    assert found is not None and found.shape == (2, 1, 8, 8) and torch.allclose(found, torch.tensor(0.2))
    assert decode_mask(encoded(grey), (4, 6)).shape == (1, 4, 6)
    folder = imagefolder(tmp_path / "b", [noise(i, 16, 16) for i in range(6)])
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "masks").mkdir()
    for i, line in enumerate(lines):
        (folder / "masks" / f"{i}.png").write_bytes(encoded(grey))
        lines[i] = line.replace("}", f', "weight_file_name": "masks/{i}.png"}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = open_rows(Data(path=str(folder), resolution=8, mask_column="weight")).masks([0])
    assert found is not None and torch.allclose(found, torch.tensor(0.2))


def test_a_mask_that_does_not_fit(tmp_path: Path):
    root = masked_folder(tmp_path / "a")
    encoded_mask = encoded(Image.new("L", (40, 40), 0))
    (root / "1-masklabel.png").write_bytes(encoded_mask)
    (root / "2-masklabel.png").write_bytes(b"x")
    data = Data(path=str(root), resolution=20, mask_suffix="-masklabel.png", max_skipped=0.5)
    skipped = {Path(x.name).name: x.reason for s in ("train", "test") for x in open_rows(data, split=s).skipped}
    assert "of another shape than the picture, 40 × 20" in skipped["1.png"]
    assert "its mask does not decode" in skipped["2.png"] and len(skipped) == 2


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"resolution": 64, "bucket_step": 24}, "multiple of bucket_step"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio"),
        ({"mask_column": "m", "mask_suffix": "-m.png"}, "mask_column and mask_suffix"),
        ({"caption_templates": ["a photo"]}, "expected one {}"),
        ({"sources": [{"path": "b"}]}, "path and sources"),
        ({"path": None}, "`data.path` is missing"),
    ],
)
def test_keys_that_contradict(keys: dict, told: str):
    data = {"path": "a", **keys}
    raw = {"task": "autoencoder", "output_dir": "out", "train": {"images": 9}, "data": data}
    with pytest.raises(ConfigError, match=told):
        parse(raw, "here.yaml")


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"weight": 1}])
def test_a_sources_keys(wrong: dict):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Data(sources=({"path": "b", **wrong},))  # type: ignore[arg-type]


def test_a_step_that_does_not_divide(tmp_path: Path):
    with pytest.raises(DataError, match=r"data\.resolution 32: expected a multiple of the buckets' step, 24"):
        open_rows(Data(path=str(mixed(tmp_path / "a")), resolution=32), step=24)
