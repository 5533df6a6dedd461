"""Second pictures of rows, and batches that carry what a network is shown: cut and mirrored as the pictures are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm import rng
from tests.datasets_made import encoded, imagefolder, noise, parquet, tar
from tests.stand_in import Bucketed
from tests.test_batches import Told
from tests.tiny import unet
from training.batches import CachedRows, LatentBatches, Stream, to_unit
from training.conditioning import Conditioner
from training.data import open_rows
from training.hints import Hints
from training.schema import Data
from training.schema.adapt import Hint, Inpaint, LowResolution
from training.tables import DataError

SIZES = [(24, 16), (16, 24), (20, 20), (40, 20)] * 3


def named(root: Path, hints: list[bytes | None], suffix: str = "-hint.png") -> Path:
    """Pictures of several shapes, whose second pictures lie beside them and are named in the metadata."""
    folder = imagefolder(root, [noise(i, *SIZES[i]) for i in range(len(hints))])
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, (line, hint) in enumerate(zip(lines, hints, strict=True)):
        if hint is not None:
            (folder / f"{i}{suffix}").write_bytes(hint)
            line["hint_file_name"] = f"{i}{suffix}"
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def same(count: int) -> list[bytes | None]:
    """The pictures themselves, so that another cut would show."""
    return [encoded(noise(i, *SIZES[i])) for i in range(count)]


def rows_of(folder: Path, **kw: Any) -> Any:
    return open_rows(Data(path=str(folder), resolution=16, bucket_step=4, **kw))


def buckets(rows: Any) -> list[list[int]]:
    return [np.flatnonzero(rows.bucket == b).tolist() for b in np.unique(rows.bucket)]


@pytest.mark.parametrize("how", [{"column": "hint"}, {"suffix": "-hint.png"}], ids=str)
@pytest.mark.parametrize("center_crop", [True, False])
def test_hints_are_cut_as_their_pictures_are(tmp_path: Path, how: dict[str, str], center_crop: bool):
    rows = rows_of(named(tmp_path / "a", same(12)), center_crop=center_crop)
    hints = pickle.loads(pickle.dumps(Hints(rows, **how)))  # as a worker of the loader has it
    assert len(buckets(rows)) >= 3
    for some in buckets(rows):
        assert hints(some).equal(rows.pictures(some)) and hints(some[:1]).dtype == torch.uint8
    held_out = open_rows(Data(path=str(tmp_path / "a"), resolution=16, bucket_step=4), split="test")
    assert Hints(held_out, **how, split="test")([0]).equal(held_out.pictures([0]))


def test_hints_are_their_own_pictures(tmp_path: Path):
    others: list[bytes | None] = [encoded(noise(100 + i, *SIZES[i])) for i in range(12)]
    rows = rows_of(named(tmp_path / "a", others))
    alone = rows_of(imagefolder(tmp_path / "b", [cast(bytes, x) for x in others]))
    by_name = {Path(alone.name(i)).name: i for i in range(len(alone))}
    for i in range(len(rows)):
        if (place := by_name.get(Path(rows.name(i)).name)) is not None:  # held out there, perhaps
            assert Hints(rows, "hint", check=False)([i]).equal(alone.pictures([place]))


def test_hints_of_parquet_files_and_tars(tmp_path: Path):
    images, hints = ([encoded(noise(first + i)) for i in range(6)] for first in (0, 50))
    parquet(tmp_path / "a" / "0.parquet", {"image": images, "text": ["a"] * 6, "edges": hints})
    rows = rows_of(tmp_path / "a")
    found = Hints(rows, "edges")
    assert [found.encoded(i) for i in range(len(rows))] == [
        hints[images.index(rows.encoded(i))] for i in range(len(rows))
    ]
    with pytest.raises(DataError, match="no column 'depth'"):
        Hints(rows, "depth")

    def row(i: int) -> dict[str, bytes]:
        return {"png": encoded(noise(i)), "txt": b"a", "hint.png": encoded(noise(50 + i))}

    tar(tmp_path / "b" / "0.tar", [(f"{i}.{ending}", content) for i in range(8) for ending, content in row(i).items()])
    of_tars = rows_of(tmp_path / "b")
    of_hints = Hints(of_tars, "hint.png")
    pairs = {encoded(noise(i)): encoded(noise(50 + i)) for i in range(8)}
    assert all(of_hints.encoded(i) == pairs[of_tars.encoded(i)] for i in range(len(of_tars)))
    with pytest.raises(DataError, match="name a column in the place of a suffix"):
        Hints(rows, suffix="-hint.png")


@pytest.mark.parametrize(
    ("hint", "says"),
    [
        (None, "5.png: its second picture .*missing; 1 of 12 rows"),
        (b"no picture", "5.png: its second picture does not decode"),
        (encoded(noise(0, 24, 16)), "5.png: its second picture is 24 × 16, of another shape than the picture, 16 × 24"),
    ],
)
def test_a_row_without_a_hint_of_its_shape_is_named(tmp_path: Path, hint: bytes | None, says: str):
    folder = named(tmp_path / "a", [*same(5), hint, *same(12)[6:]])
    rows = rows_of(folder, held_out=0.01)
    if "5.png" not in " ".join(rows.name(i) for i in range(len(rows))):
        rows = open_rows(rows.data, split="test")
    says = says.replace("of 12", f"of {len(rows)}")
    with pytest.raises(DataError, match=says):
        Hints(rows, suffix="-hint.png")


def test_a_hint_that_breaks_later_is_named(tmp_path: Path):
    rows = rows_of(named(tmp_path / "a", same(12)))
    hints = Hints(rows, suffix="-hint.png")
    hints.beside.file(rows.name(0)).write_bytes(b"gone")  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"its second picture does not decode.*; mend it"):
        hints([0])
    with pytest.raises(DataError, match="expected a column or a suffix"):
        Hints(rows)


# --- batches ---------------------------------------------------------------------------------------------------------


class Weighted(Bucketed):
    """Rows that count differently."""

    def loss_weights(self, indices: list[int]) -> Tensor:
        return torch.tensor([1.0 + i for i in indices])


def mirrored(seed: int, count: int) -> Tensor:
    return rng.uniform(seed, torch.arange(count), (), Stream.FLIP) < 0.5


def test_pictures_masks_and_hints_are_mirrored_alike():
    rows = Bucketed(9, masked=True)
    pairs = [(n, 1 + 3 * (n % 3)) for n in range(20)]
    batches = LatentBatches(rows, 1, factor=4, flip=True, hints=rows.pictures, pixel_masks=True)
    batch, flips = batches.__getitems__(pairs), mirrored(1, 20)
    assert "mask" not in batch and 3 < flips.sum() < 17
    assert batch["hint"].equal(batch["pictures"]) and batch["pixel_mask"].shape == (20, 1, 8, 24)
    for i, (_, row) in enumerate(pairs):
        picture, mask = to_unit(rows.bytes[row]), cast(Tensor, rows.masks([row]))[0]
        assert batch["pictures"][i].equal(picture.flip(-1) if flips[i] else picture)
        assert batch["pixel_mask"][i].equal(mask.flip(-1) if flips[i] else mask)
    assert "pixel_mask" not in LatentBatches(rows, 1, factor=4).__getitems__(pairs)


def test_pictures_come_with_cached_latents_where_they_are_needed():
    rows, told = Bucketed(9), cast(Any, Told())
    slots = np.stack([np.arange(9), np.arange(9) + 1000], axis=1)
    pairs = [(n, 3 * (n % 3)) for n in range(20)]
    cached = CachedRows(told, slots, "moments")
    batch = LatentBatches(rows, 1, flip=True, latents=cached, pictures=True).__getitems__(pairs)
    live = LatentBatches(rows, 1, flip=True).__getitems__(pairs)
    assert batch["pictures"].equal(live["pictures"])
    assert (batch["moments"][:, 0, 0, 0] >= 1000).equal(mirrored(1, 20))  # the cached ones are mirrored with them
    assert "pictures" not in LatentBatches(rows, 1, latents=cached).__getitems__(pairs)


def test_rows_that_count_differently_say_so():
    pairs = [(n, 3 * (n % 3)) for n in range(6)]
    batch = LatentBatches(Weighted(9), 1).__getitems__(pairs)
    assert batch["loss_weight"].tolist() == [1, 4, 7, 1, 4, 7] and batch["loss_weight"].dtype == torch.float32
    assert "loss_weight" not in LatentBatches(Bucketed(9), 1).__getitems__(pairs)


def test_batches_have_what_the_conditioner_needs(tmp_path: Path):
    rows = rows_of(named(tmp_path / "a", same(12)), hint_suffix="-hint.png")
    pairs = [(n, buckets(rows)[0][0]) for n in range(4)]
    for section in (
        Inpaint(name="inpaint"),
        Inpaint(name="inpaint", masks="given"),
        LowResolution(name="low_resolution"),
        Hint(name="image"),
    ):
        conditioner = Conditioner(section, unet(), 0, 4, cast(Any, None))
        if "pixel_mask" in conditioner.needs:
            with pytest.raises(ValueError, match="some rows have them"):
                LatentBatches(rows, 0, **conditioner.batches(rows)).__getitems__(pairs)
            continue
        batch = LatentBatches(rows, 0, **conditioner.batches(rows)).__getitems__(pairs)
        assert set(conditioner.needs) <= batch.keys()
    again = conditioner.batches(rows)["hints"]
    assert again is conditioner.batches(rows)["hints"]  # looked through once


def test_files_of_hints_are_no_rows_of_a_folder_without_metadata(tmp_path: Path):
    folder = named(tmp_path / "a", same(12))
    (folder / "metadata.jsonl").unlink()
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"picture {i}")
    rows = rows_of(folder, hint_suffix="-hint.png", held_out=0.0)
    assert len(rows) == 12
    told = Hints(rows, None, rows.data.hint_suffix)
    for group in buckets(rows):
        assert torch.equal(told(group), rows.pictures(group))


def test_nothing_is_held_out_where_nothing_may_be(tmp_path: Path):
    folder = imagefolder(tmp_path / "five", [noise(i) for i in range(5)])
    data = Data(path=str(folder), resolution=16, held_out=0.0)
    train, test = open_rows(data, split="train"), open_rows(data, split="test")
    assert len(train) == len(test) == 5 and [train.digest(i) for i in range(5)] == [test.digest(i) for i in range(5)]
