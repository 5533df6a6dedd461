"""Arrays by key on disk: what was written is read, whatever happened in between."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stand_in import forked
from training import store as module
from training.store import KEY, Store, as_stored


def keys(*numbers: int) -> np.ndarray:
    """Some end in zero bytes, which numpy's strings leave out when they are shown."""
    pairs = np.zeros((len(numbers), 2), "<u8")
    pairs[:, 0] = np.array(numbers) + 1
    return pairs.reshape(-1).view(KEY)


def fields(*numbers: int, shape: tuple[int, ...] = (2, 3)) -> dict[str, np.ndarray]:
    base = np.array(numbers, np.float32).reshape(-1, *[1] * len(shape))
    return {"a": base + np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 64, "b": -base.reshape(-1, 1)}


def written(folder: Path, total: int = 20, size: int = 3) -> Store:
    store = Store(folder)
    for i in range(0, total, size):
        numbers = range(i, min(i + size, total))
        store.write(keys(*numbers), fields(*numbers))
    return store


def assert_holds(store: Store, numbers: list[int]) -> None:
    """In any order, some of them twice, from one shard and from many."""
    reader = store.open(keys(*numbers))
    order = np.random.default_rng(0).integers(len(numbers), size=50)
    for places in (order, order[:1], np.arange(len(numbers))):
        found = reader.gather(reader.slots[places])
        expected = fields(*[numbers[i] for i in places])
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert np.array_equal(found[name].numpy(), x), name
            found[name] += 1  # its own, and writable


@pytest.mark.parametrize("size", [3, 20])
def test_what_was_written_is_read(size: int, tmp_path: Path):
    store = written(tmp_path, size=size)
    assert_holds(store, list(range(20)))
    assert_holds(store, [17, 3, 3, 0])
    assert sorted(store.keys()) == sorted(keys(*range(20)))
    assert store.bytes == sum(f.stat().st_size for f in tmp_path.rglob("*.npy"))


def test_the_missing_are_named_once_and_in_order(tmp_path: Path):
    store = written(tmp_path, 4)
    assert store.missing(keys(9, 1, 8, 9, 0, 7, 8)).tolist() == [0, 2, 5]
    assert store.missing(keys(3, 2)).tolist() == []
    assert Store(tmp_path / "nothing").missing(keys(5, 5, 4)).tolist() == [0, 2]
    with pytest.raises(KeyError, match="2 of 3 rows are not in"):
        store.open(keys(1, 8, 9))
    with pytest.raises(KeyError):
        Store(tmp_path / "nothing").open(keys(1))


def test_shapes_lie_side_by_side(tmp_path: Path):
    store = written(tmp_path, 4)
    store.write(keys(10, 11), fields(10, 11, shape=(4,)))
    for tidied in (False, True):
        if tidied:
            store.tidy()
            assert len(store.shards()) == 2
        reader = store.open(keys(0, 1, 2, 3, 10, 11))
        assert reader.gather(reader.slots[[5, 4]])["a"].shape == (2, 4)
        assert reader.gather(reader.slots[[3, 0]])["a"].shape == (2, 2, 3)
        with pytest.raises(ValueError):
            reader.gather(reader.slots[[0, 5]])


def test_tidied_it_is_a_few_files_of_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = written(tmp_path, 40)
    before = store.open(keys(*range(40)))  # of a run that goes on reading
    store.tidy()
    assert len(store.shards()) == 1 and len(list(tmp_path.iterdir())) == 1
    assert_holds(store, list(range(40)))
    assert np.array_equal(before.gather(before.slots)["b"].numpy(), fields(*range(40))["b"])
    names = [x.name for x in store.shards()]
    store.tidy()
    assert [x.name for x in store.shards()] == names  # nothing left to do
    # segments of limited size, of which the full ones are left alone
    other = written(tmp_path / "other", 40)
    one = module._size(other.shards()[0])
    monkeypatch.setattr(module, "SEGMENT", 4 * one)
    monkeypatch.setattr(module, "CHUNK", 50)
    other.tidy()
    sizes = [module._size(x) for x in other.shards()]
    assert len(sizes) == 4 and max(sizes) <= 4 * one
    assert_holds(other, list(range(40)))


def test_what_is_no_longer_used_goes_if_asked(tmp_path: Path):
    store = written(tmp_path, 12)
    store.tidy(keys(*range(1, 12), 99))
    assert sorted(store.keys()) == sorted(keys(*range(1, 12)))
    store.tidy(keys(5, 1))
    assert_holds(store, [1, 5])
    assert sorted(store.keys()) == sorted(keys(1, 5))
    store.tidy(keys(99))
    assert store.shards() == []


def test_tidying_that_was_cut_short_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed after the new shard is there and before the old ones are gone."""
    store = written(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_remove", lambda shard: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.tidy()
    assert len(store.shards()) == 8
    assert_holds(store, list(range(20)))
    store.tidy()
    assert len(store.shards()) == 1 and len(store.keys()) == 20
    assert_holds(store, list(range(20)))


def test_only_complete_shards_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A full disk, and a kill in the midst."""
    store = written(tmp_path, 3)

    def full(_number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.write(keys(8), fields(8))
    assert len(list(tmp_path.iterdir())) == 1
    half = tmp_path / f".{socket.gethostname()}~999999999~half"
    half.mkdir()
    (half / "keys.npy").write_bytes(b"x")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    alive = tmp_path / f".{socket.gethostname()}~{child.pid}~busy"
    elsewhere, old = tmp_path / ".elsewhere~1~busy", tmp_path / ".elsewhere~1~old"
    for folder in (alive, elsewhere, old):
        folder.mkdir()
    os.utime(old, (time.time() - 2 * module.STALE,) * 2)
    assert len(store.shards()) == 1
    store.sweep()
    assert not half.exists() and not old.exists() and alive.exists() and elsewhere.exists()
    child.communicate(b"\n")
    store.sweep()
    assert not alive.exists()
    assert_holds(store, [0, 1, 2])


@pytest.mark.parametrize("damage", ["short", "empty", "gone", "lengths", "pickle"])
def test_a_damaged_shard_is_made_anew(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    store = written(tmp_path, 6)
    shard = next(x for x in store.shards() if keys(4)[0] in np.load(x / "keys.npy"))
    if damage == "short":
        (shard / "a.npy").write_bytes((shard / "a.npy").read_bytes()[:-5])
    elif damage == "empty":
        (shard / "keys.npy").write_bytes(b"")
    elif damage == "gone":
        (shard / "keys.npy").unlink()
    elif damage == "lengths":
        np.save(shard / "b.npy", np.zeros((7, 1), np.float32))
    else:
        np.save(shard / "a.npy", np.array([{}] * 3), allow_pickle=True)
    store.sweep()
    assert f"{shard}: damaged" in caplog.text
    assert store.missing(keys(*range(6))).tolist() == [3, 4, 5]
    store.write(keys(3, 4, 5), fields(3, 4, 5))
    assert_holds(store, list(range(6)))


def test_two_runs_may_write_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, other = written(tmp_path, 3), Store(tmp_path)
    other.write(keys(0, 1, 2), fields(7, 7, 7))  # comes too late
    assert len(list(tmp_path.iterdir())) == 1
    assert_holds(store, [0, 1, 2])
    # a reader that lists the shards while another run puts them together
    store.write(keys(3), fields(3))
    listed, plain = [store.shards()], Store.shards

    def stale(self: Store) -> list[Path]:
        return listed.pop() if listed else plain(self)

    other.tidy()
    monkeypatch.setattr(Store, "shards", stale)
    assert_holds(store, [0, 1, 2, 3])
    assert listed == []


def test_a_reader_travels_to_another_process_without_its_arrays(tmp_path: Path):
    store = Store(tmp_path)
    store.write(keys(*range(1000)), fields(*range(1000), shape=(64,)))
    reader = store.open(keys(*range(1000)))
    sent = pickle.dumps(reader)
    assert len(sent) < 20_000 < store.bytes
    there = pickle.loads(sent)
    assert torch.equal(there.gather(there.slots[5:9])["a"], reader.gather(reader.slots[5:9])["a"])


def test_precisions(tmp_path: Path):
    x = torch.randn(4, 8) * 10
    x[0, 0], x[1, 1] = -torch.inf, 0
    store = Store(tmp_path)
    for i, (precision, kind) in enumerate({"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}.items()):
        store.write(keys(i * 4, i * 4 + 1, i * 4 + 2, i * 4 + 3), {precision: as_stored(x, precision)})
        reader = store.open(keys(i * 4, i * 4 + 1, i * 4 + 2, i * 4 + 3))
        assert torch.equal(reader.gather(reader.slots)[precision], x if kind is None else x.to(kind))
    for wrong in (65520.0, -1e9):
        x[2, 2] = wrong
        with pytest.raises(ValueError, match="does not fit into float16, which ends at 65504"):
            as_stored(x, "fp16")
        assert torch.equal(torch.from_numpy(as_stored(x, "bf16")).view(torch.bfloat16), x.bfloat16())


def test_more_shards_than_a_process_may_hold_open(tmp_path: Path):
    """Each map holds a file: the limit is raised as far as the system lets a process raise it."""

    def work(pipe: Connection) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        store = written(tmp_path, 60, 1)
        reader = store.open(keys(*range(60)))
        pipe.send(reader.gather(reader.slots)["b"].sum().item())

    child, pipe = forked(work)
    assert pipe.poll(60) and pipe.recv() == -float(sum(range(60)))
    child.join(60)
