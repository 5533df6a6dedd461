"""A byte that changes on the disk is found before it is trained on, and its row alone is made anew."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stand_in import Bucketed, Given, all_of, made
from tests.test_cache_store import assert_holds, fields, keys, written
from training import store as module
from training.store import Store
from training.sums import MIX, row_sums, sums_in_pieces
from training.tables import DataError


def flipped(file: Path, at: int, bit: int = 0) -> None:
    """``at`` counts from the end of the file."""
    content = bytearray(file.read_bytes())
    content[-1 - at] ^= 1 << bit
    file.write_bytes(content)


def older(store: Store) -> None:
    """As it was written before rows had sums."""
    for shard in store.shards():
        (shard / "sums.npy").unlink()
        shard.rename(shard.with_name(shard.name[::-1]))


def shard_of(store: Store, number: int) -> Path:
    return next(x for x in store.shards() if keys(number)[0] in np.load(x / "keys.npy"))


# --- sums ------------------------------------------------------------------------------------------------------------


def test_a_sum_is_of_the_words_of_all_fields():
    rows = {"b": np.arange(6, dtype=np.uint64).reshape(3, 2), "a": np.arange(9, dtype=np.uint8).reshape(3, 3)}
    expected = [((int(MIX) + sum(3 * i + k for k in range(3))) * int(MIX) + 4 * i + 1) % 2**64 for i in range(3)]
    assert row_sums(rows).tolist() == expected
    assert row_sums({"a": np.zeros((4, 8))}).all()  # a file of zeros is not taken for a whole one


@pytest.mark.parametrize("shape", [(4,), (2, 3), (5,), ()])
@pytest.mark.parametrize("kind", [np.float32, np.uint16, np.float64, bool])
def test_every_bit_counts(kind: type, shape: tuple[int, ...]):
    x = np.random.default_rng(0).integers(0, 2, (2, *shape)).astype(kind)
    before, seen = row_sums({"x": x, "y": np.ones(2)}), set[int]()
    for bit in range(8 * x[0].nbytes):
        other = x.copy()
        other[1:].reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
        after = row_sums({"x": other, "y": np.ones(2)})
        assert after[0] == before[0] and after[1] != before[1]
        seen.add(int(after[1]))
    assert int(before[1]) not in seen


def test_in_pieces_it_is_the_same(monkeypatch: pytest.MonkeyPatch):
    rows = fields(*range(50))
    monkeypatch.setattr("training.sums.PIECE", 100)
    assert np.array_equal(sums_in_pieces(rows), row_sums(rows))
    assert len(sums_in_pieces({"a": np.zeros((0, 3))})) == 0


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b", "sums"])
@pytest.mark.parametrize("large", [False, True])
def test_a_flipped_byte_is_named_and_its_row_alone_is_made_anew(
    name: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A small store is checked when it is swept; a large one where a row is first read, and swept the next time."""
    monkeypatch.setattr(module, "CHECKED", 0 if large else 2**31)
    store = written(tmp_path, 9)
    shard = shard_of(store, 4)
    each = np.load(shard / f"{name}.npy")[:1].nbytes
    flipped(shard / f"{name}.npy", at=each + 1, bit=6)  # of the middle row, 4
    if large:
        store.sweep()
        assert len(store.missing(keys(*range(9)))) == 0
        reader = store.open(keys(*range(9)))
        assert np.array_equal(reader.gather(reader.slots[[8, 3, 0]])["a"].numpy(), fields(8, 3, 0)["a"])
        for rows in ([4], [1, 4, 7]):
            with pytest.raises(DataError, match=rf"{shard}: row 1 is not what was written.*the same command again"):
                reader.gather(reader.slots[rows])
    store.sweep()
    assert f"{shard}: 1 of its 3 rows are damaged; they are made anew" in caplog.text
    assert store.missing(keys(*range(9))).tolist() == [4]
    assert_holds(store, [0, 1, 2, 3, 5, 6, 7, 8])
    store.write(keys(4), fields(4))
    assert_holds(store, list(range(9)))


def test_a_shard_of_nothing_but_damage_goes(tmp_path: Path):
    store = written(tmp_path, 6)
    shard = shard_of(store, 4)
    np.save(shard / "a.npy", np.zeros_like(np.load(shard / "a.npy")))
    store.sweep()
    assert store.missing(keys(*range(6))).tolist() == [3, 4, 5] and not shard.exists()


def test_a_row_is_checked_once_by_each_reader(tmp_path: Path):
    """What is read again costs no sum; another process's reader looks for itself."""
    store = written(tmp_path, 6, 6)
    reader = store.open(keys(*range(6)))
    there = pickle.loads(pickle.dumps(reader))
    before = reader.gather(reader.slots)["a"]
    (shard,) = store.shards()
    flipped(shard / "a.npy", at=0)  # in the file that both have mapped
    assert not torch.equal(reader.gather(reader.slots)["a"], before)
    with pytest.raises(DataError, match="row 5 is not what was written"):
        there.gather(there.slots)


def test_putting_together_hides_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = written(tmp_path, 9)
    flipped(shard_of(store, 4) / "b.npy", at=0)
    store.tidy()
    assert len(store.shards()) == 1
    with pytest.raises(DataError, match="is not what was written"):
        assert_holds(store, list(range(9)))
    monkeypatch.setattr(module, "CHECKED", 0)
    store.sweep()
    assert store.missing(keys(*range(9))).tolist() == [5]


@pytest.mark.parametrize("size", [3, 9])
def test_older_shards_are_read_and_get_sums(size: int, tmp_path: Path):
    store = written(tmp_path, 9, size)
    older(store)
    store.sweep()
    assert_holds(store, list(range(9)))
    store.write(keys(9), fields(9))
    assert_holds(store, list(range(10)))
    store.tidy()
    assert len(store.shards()) == 1
    assert_holds(store, list(range(10)))
    (shard,) = store.shards()
    assert np.array_equal(np.load(shard / "sums.npy"), row_sums({k: np.load(shard / f"{k}.npy") for k in "ab"}))
    names = [x.name for x in store.shards()]
    store.tidy()
    assert [x.name for x in store.shards()] == names


def test_a_large_older_shard_gets_sums_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SEGMENT", 2)
    store = written(tmp_path, 9)
    older(store)
    store.tidy()
    assert len(store.shards()) == 3 and all((x / "sums.npy").exists() for x in store.shards())
    assert_holds(store, list(range(9)))


@pytest.mark.parametrize("kind", ["pictures", "texts", "masks"])
def test_a_damaged_cache_is_made_whole_by_the_next_run(kind: str, tmp_path: Path):
    rows, encoders = Bucketed(12, masked=True), Given()
    whole = all_of(made(tmp_path, rows, encoders, flip=True)[0], rows, 2)
    (shard, *_) = next(tmp_path.glob(f"{kind}-*")).iterdir()
    field = next(x for x in shard.glob("*.npy") if x.stem not in ("keys", "sums"))
    flipped(field, at=3)
    caches, counts = made(tmp_path, rows, encoders, flip=True)
    assert (counts["pictures_made"], counts["texts_made"]) == (kind == "pictures", kind == "texts")
    found = all_of(caches, rows, 2)
    assert found.keys() == whole.keys()
    for name in whole:  # encoded in a batch of another size
        a, b = (np.frombuffer(x[name], np.float32) for x in (found, whole))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert caches.masks is not None
    for i in range(12):
        mask = rows.masks([i])
        assert mask is not None
        h, w = (x // 2 for x in mask.shape[2:])
        assert caches.masks(np.array([i])).equal(mask.reshape(1, 1, h, 2, w, 2).mean((3, 5)))
