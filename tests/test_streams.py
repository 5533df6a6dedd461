"""Streams: every row once per epoch, the same for any number of processes, and exact from any batch on."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from torch.utils.data import DataLoader

from tests.datasets_made import encoded, flat, parquet, tar
from training import remote, shards
from training.data import DataError, open_rows
from training.pictures import decode
from training.schema import Data
from training.schema.data import Source
from training.shards import ParquetTable, Shard, subset
from training.streams import RowStream, _Lane, _Place
from training.tars import TarTable

SIZES = [(16, 16), (16, 16), (24, 16), (16, 24), (16, 16), (22, 16)]  # width, height
COUNTS = [7, 11, 3, 8]


def numbered(count: int, first: int) -> list[tuple[int, bytes]]:
    return [(n, encoded(flat(n, *SIZES[n % len(SIZES)]))) for n in range(first, first + count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four parquet files of several row groups, and the same rows in four tars."""
    root = tmp_path_factory.mktemp("stream")
    first = 0
    for k, count in enumerate(COUNTS):
        rows = numbered(count, first)
        columns = {"image": [x for _, x in rows], "text": [f"number {n}" for n, _ in rows]}
        parquet(root / "parquet" / f"train-{k}.parquet", columns, row_group_size=3)
        members = [(f"{n:04}.{e}", x) for n, p in rows for e, x in (("png", p), ("txt", f"number {n}".encode()))]
        tar(root / "tar" / f"train-{k}.tar", members)
        first += count
    columns = {"image": [x for _, x in numbered(2, 90)], "text": ["a", "b"]}
    for kind in ("parquet", "tar"):
        parquet(root / "held" / "test-0.parquet", columns)
        if kind == "tar":
            tar(root / "tar" / "test-0.tar", [("x.png", columns["image"][0]), ("x.txt", b"a")])
    (root / "parquet" / "test-0.parquet").write_bytes((root / "held" / "test-0.parquet").read_bytes())
    return root


def stream(
    path: Path, *, seed: int = 3, batch: int = 4, rank: int = 0, world: int = 1, lanes: int | None = None, **keys
) -> RowStream:
    data = Data(path=str(path), streaming=True, **{"resolution": 16, "bucket_step": 4, **keys})
    return RowStream(data, seed=seed, batch=batch, rank=rank, world=world, lanes=lanes)


def hub_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **methods) -> None:
    """A folder in place of the hub's file system; its files are copied below ``folder/cache``."""

    def filesystem(url: str, options: dict) -> tuple[DirFileSystem, str]:
        system = DirFileSystem(str(folder))
        for name, method in methods.items():
            setattr(system, name, method)
        return system, url.removeprefix("hf://")

    for module in (remote, shards):
        monkeypatch.setattr(module, "filesystem", filesystem)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))


def numbers(batch: dict) -> list[int]:
    """What the pixels say."""
    middle = ((batch["pictures"][:, :, 8, 8] + 1) * 127.5).round().long()
    return (middle[:, 0] + 256 * middle[:, 1]).tolist()


def same(one: list[dict], two: list[dict]) -> bool:
    def equal(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("buckets", [False, True])
def test_every_row_once_per_epoch_with_its_caption(place: Path, kind: str, buckets: bool):
    total = sum(COUNTS)
    batches = list(islice(stream(place / kind, buckets=buckets), total))  # four epochs
    seen = [n for batch in batches for n in numbers(batch)]
    assert all(batch["captions"] == [f"number {n}" for n in numbers(batch)] for batch in batches)
    assert [n for batch in batches for n in batch["index"].tolist()] == list(range(4 * total))
    counts = Counter(seen)
    if not buckets:
        assert all(batch["pictures"].shape == (4, 3, 16, 16) for batch in batches)
        assert all(sorted(seen[i : i + total]) == list(range(total)) for i in range(0, 4 * total, total))
        assert seen[:total] != seen[total : 2 * total]
    else:
        assert {tuple(batch["pictures"].shape[2:]) for batch in batches} == {(16, 16), (12, 20), (20, 12)}
        for shape in {batch["pictures"].shape for batch in batches}:
            rows = [n for batch in batches if batch["pictures"].shape == shape for n in numbers(batch)]
            members = len(set(rows))
            assert all(len(set(rows[i : i + members])) == members for i in range(0, len(rows) - members, members))
    assert len(counts) == total and max(counts.values()) <= 5


def test_rows_keep_their_order_within_a_file(place: Path):
    batches = list(islice(stream(place / "parquet", buckets=False), 7))
    rows = torch.cat([batch["row"] for batch in batches]).tolist()
    files = list(dict.fromkeys(row >> 32 for row in rows))
    assert len(files) == 4 and files != sorted(files)
    for file in files:
        inside = [row & 0xFFFFFFFF for row in rows if row >> 32 == file]
        assert inside == list(range(len(inside)))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("buckets", [False, True])
def test_it_goes_on_exactly_from_any_batch(place: Path, kind: str, buckets: bool):
    keys = {"buckets": buckets, "random_flip": True}
    whole = list(islice(stream(place / kind, **keys), 24))
    for taken in (1, 2, 5, 8, 13, 19):
        first = stream(place / kind, **keys)
        before = list(islice(first, taken))
        state = json.loads(json.dumps(first.state_dict()))
        second = stream(place / kind, **keys)
        second.load_state_dict(state)
        assert same(before + list(islice(second, 24 - taken)), whole)


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_out(place: Path, buckets: bool, world: int):
    """One reader of as many lanes gives the same batches, and any number goes on from where all stand."""
    whole = list(islice(stream(place / "tar", buckets=buckets, lanes=world), 24))
    parts = [stream(place / "tar", buckets=buckets, rank=rank, world=world) for rank in range(world)]
    own = [list(islice(part, 12 // world)) for part in parts]
    assert same([batch for turn in zip(*own, strict=True) for batch in turn], whole[:12])
    states = json.loads(json.dumps([part.state_dict() for part in parts]))
    for readers in (1, 2, 3, 4):
        rest = [stream(place / "tar", buckets=buckets, rank=rank, world=readers) for rank in range(readers)]
        for part in rest:
            part.load_state_dict(states)
        own = [list(islice(part, 12 // readers)) for part in rest]
        assert same([batch for turn in zip(*own, strict=True) for batch in turn], whole[12:])
    alone = stream(place / "tar", buckets=buckets, rank=1, world=world)
    alone.load_state_dict(states[1])
    assert same(list(islice(alone, 3)), whole[12 + 1 :: world][:3])


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_each_reader_reads_the_pictures_of_its_own_files_alone(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """In an epoch four readers read each picture's bytes once in all, and each opens its own file alone."""
    bytes_read, opened = Counter(), Counter()
    for table in (TarTable, ParquetTable):

        def picture(self, row: int, own=table.picture) -> bytes:
            content = own(self, row)
            bytes_read[reader] += len(content)
            return content

        monkeypatch.setattr(table, "picture", picture)
    own_open = Shard.open
    monkeypatch.setattr(Shard, "open", lambda self, data: opened.update([reader]) or own_open(self, data))
    total = sum(len(x) for _, x in numbered(sum(COUNTS), 0))
    for reader in range(4):
        lane = _Lane(stream(place / kind), reader, 4, _Place())
        while lane.place.epoch == 0:
            next(lane.rows)
    assert dict(opened) == dict.fromkeys(range(4), 2)  # the second file is the next epoch's
    assert total <= sum(bytes_read.values()) <= total + 4 * 2 * max(len(x) for _, x in numbered(6, 0))


@pytest.mark.parametrize("buckets", [False, True])
def test_fewer_files_than_readers_are_cut_into_runs_of_rows(place: Path, buckets: bool):
    whole = stream(place / "parquet", buckets=buckets, lanes=9)
    batches = list(islice(whole, 9 * 6))
    counts = Counter(n for batch in batches for n in numbers(batch))
    assert set(counts) == set(range(sum(COUNTS)))
    parts = [stream(place / "parquet", buckets=buckets, rank=rank, world=9) for rank in range(9)]
    own = [list(islice(part, 6)) for part in parts]
    assert same([batch for turn in zip(*own, strict=True) for batch in turn], batches)


def test_the_launcher_says_which_process_it_is(place: Path, monkeypatch: pytest.MonkeyPatch):
    data = Data(path=str(place / "tar"), streaming=True, resolution=16, bucket_step=4)
    assert (RowStream(data, seed=3, batch=4).rank, RowStream(data, seed=3, batch=4).world) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = list(islice(RowStream(data, seed=3, batch=4), 4))
    assert same(second, list(islice(stream(place / "tar", lanes=2), 8))[1::2])


def test_a_stream_is_shared_by_tasks(place: Path):
    whole = stream(place / "tar", buckets=False)
    own = whole.shared(1, 2, factor=4, sizes=True)
    first = next(iter(own))
    assert (own.rank, own.world, own.factor) == (1, 2, 4) and (whole.rank, whole.world) == (0, 1)
    assert "size_ids" in first and first["index"].tolist() == [4, 5, 6, 7]
    assert whole.state_dict()["batches"] == 0 and own.fingerprint == whole.fingerprint


def test_a_loaders_workers_share_the_batches_out(place: Path):
    whole = list(islice(stream(place / "tar", lanes=2), 8))
    loader = DataLoader(stream(place / "tar"), batch_size=None, num_workers=2)
    assert same(list(islice(loader, 8)), whole)


def test_the_seed_decides_the_order_of_the_files(place: Path):
    orders = {tuple(torch.cat([b["row"] for b in islice(stream(place / "tar", seed=s), 6)]).tolist()) for s in range(6)}
    assert len(orders) > 3


def test_another_data_set_is_refused(place: Path):
    state = stream(place / "tar").state_dict()
    for other in (stream(place / "parquet"), stream(place / "tar", seed=4), stream(place / "tar", batch=2)):
        with pytest.raises(DataError, match="not those that the stream was saved with"):
            other.load_state_dict(state)
    earlier = {k: v for k, v in state.items() if k != "places"} | {"queues": {}}
    with pytest.raises(DataError, match="saved by an earlier version"):
        stream(place / "tar").load_state_dict(earlier)


def test_held_out_files_are_not_streamed(tmp_path: Path):
    for k in range(8):
        rows = numbered(5, 5 * k)
        parquet(tmp_path / f"part-{k}.parquet", {"image": [x for _, x in rows], "text": [str(n) for n, _ in rows]})
    data = Data(path=str(tmp_path), streaming=True, resolution=16, held_out=0.2, buckets=False)
    held = pickle.loads(pickle.dumps(open_rows(data, split="test", in_memory=0)))  # as for another process
    trained = RowStream(data, seed=0, batch=5)
    seen = {n for batch in islice(trained, 3 * len(trained.shards)) for n in numbers(batch)}
    assert len(trained.shards) == 6 and len(held) == 10  # by the hashes of these names
    assert {int(x) for x in held.captions} | seen == set(range(40)) and not {int(x) for x in held.captions} & seen
    with pytest.raises(DataError, match=r"data\.streaming"):
        open_rows(data, split="train")
    with pytest.raises(DataError, match="stream of one file"):
        RowStream(data.model_copy(update={"path": str(tmp_path / "part-0.parquet")}), seed=0, batch=2)


def test_sources_with_repeats(place: Path):
    files = [str(place / "parquet" / f"train-{k}.parquet") for k in range(4)]
    pairs = place / "pairs"
    for k, file in enumerate(files):
        parquet_copy = pairs / str(k // 2) / f"train-{k}.parquet"
        parquet_copy.parent.mkdir(parents=True, exist_ok=True)
        parquet_copy.write_bytes(Path(file).read_bytes())
        parquet(parquet_copy.with_name("test.parquet"), {"image": [encoded(flat(1))], "text": ["a"]})
    sources = (Source(path=str(pairs / "0"), repeats=2.5), Source(path=str(pairs / "1"), repeats=0.5))
    data = Data(sources=sources, resolution=16, streaming=True, buckets=False)
    epoch = 2 * 18 + 3 + 5 + 1 + 4  # of 7 and 11 rows twice and the half; of 3 and 8 the half
    seen = Counter(n for batch in islice(RowStream(data, seed=0, batch=1), epoch) for n in numbers(batch))
    assert sum(seen.values()) == epoch and {seen[n] for n in range(18)} == {2, 3}
    assert sum(seen[n] == 3 for n in range(18)) == 8 and sum(seen[n] for n in range(18, 29)) == 5


@pytest.mark.parametrize(("rows", "share"), [(10, 0.5), (7, 0.3), (100, 0.01), (3, 0.1), (1000, 0.999)])
def test_a_subset_is_evenly_spread(rows: int, share: float):
    chosen = subset(rows, share)
    assert len(chosen) == int(rows * share + 1e-9) and len(set(chosen)) == len(chosen)
    assert all(0 <= x < rows for x in chosen)
    shown = np.zeros(rows, int)
    for epoch in range(1000):
        chosen = subset(rows, share, epoch)
        assert abs(len(chosen) - rows * share) < 1
        shown[chosen] += 1
    assert (abs(shown - 1000 * share) < 1).all()


@pytest.mark.parametrize("buckets", [False, True])
def test_broken_rows_are_named_and_replaced(tmp_path: Path, buckets: bool, caplog: pytest.LogCaptureFixture):
    pictures = [x for _, x in numbered(40, 0)]
    pictures[9] = b"no picture"
    pictures[13] = encoded(flat(13, 200, 200))[:300]  # its header is whole
    captions: list = [f"number {n}" for n in range(40)]
    captions[21] = None
    parquet(tmp_path / "train.parquet", {"image": pictures, "text": captions})
    parquet(tmp_path / "test.parquet", {"image": pictures[:1], "text": ["a"]})
    made = stream(tmp_path, buckets=buckets, max_skipped=0.1)
    batches = list(islice(made, 30))
    seen = {n for batch in batches for n in numbers(batch)}
    assert seen == set(range(40)) - {9, 13, 21}
    assert all(batch["captions"] == [f"number {n}" for n in numbers(batch)] for batch in batches)
    assert len(made.skipped) == 3 and "row 13" in caplog.text and "its caption (column 'text') is empty" in caplog.text
    ranks = [list(islice(stream(tmp_path, buckets=buckets, max_skipped=0.1, rank=r, world=2), 15)) for r in (0, 1)]
    alone = list(islice(stream(tmp_path, buckets=buckets, max_skipped=0.1, lanes=2), 30))
    assert same([batch for turn in zip(*ranks, strict=True) for batch in turn], alone)


def test_too_many_broken_rows_end_it(tmp_path: Path):
    pictures = [x for _, x in numbered(40, 0)]
    pictures[::2] = [b"no picture"] * 20
    parquet(tmp_path / "train.parquet", {"image": pictures, "text": ["a"] * 40})
    parquet(tmp_path / "test.parquet", {"image": pictures[1:2], "text": ["a"]})
    for buckets in (False, True):
        with pytest.raises(DataError, match=r"of no use: .*max_skipped.*nothing was deleted"):
            list(islice(stream(tmp_path, buckets=buckets), 200))
    parquet(tmp_path / "train.parquet", {"image": [b"x"] * 8, "text": ["a"] * 8})
    for buckets in (False, True):
        with pytest.raises(DataError, match="of use"):
            next(iter(stream(tmp_path, buckets=buckets, max_skipped=1.0)))


def test_masks_sizes_and_flips(tmp_path: Path):
    left = flat(0, 32, 16)
    left.paste((255, 255, 255), (0, 0, 16, 16))
    rows = {"image": [encoded(left)] * 8, "text": ["a"] * 8, "mask": [encoded(left.convert("L"))] * 8}
    parquet(tmp_path / "train.parquet", rows)
    parquet(tmp_path / "test.parquet", rows)
    data = Data(
        path=str(tmp_path), streaming=True, resolution=16, bucket_step=4, mask_column="mask", random_flip=True,
        center_crop=False, buckets=False,
    )  # fmt: skip
    batch = next(iter(RowStream(data, seed=1, batch=8, sizes=True, factor=4)))
    assert batch["mask"].shape == (8, 1, 4, 4) and batch["size_ids"].tolist() == [[16, 32, 0, 0, 16, 16]] * 8
    assert torch.equal(batch["mask"][:, 0, 0, 0] > 0.5, batch["pictures"][:, 0, 0, 0] > 0)
    assert 0 < (batch["mask"][:, 0, 0, 0] > 0.5).sum() < 8
    plain = torch.from_numpy(decode(rows["image"][0], 16, False)).float() / 127.5 - 1
    assert all(torch.equal(x, plain) or torch.equal(x, plain.flip(-1)) for x in batch["pictures"])


def test_a_folder_of_pictures_is_no_stream(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(encoded(flat(1)))
    with pytest.raises(DataError, match=r"leave it out for a folder of pictures"):
        stream(tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_the_hubs_files(place: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its file system is stood in for by a folder. Copies of its files are read."""
    root = tmp_path / "hub" / "datasets" / "some" / "thing" / "data"
    root.mkdir(parents=True)
    for file in (place / kind).glob(f"*.{kind}"):
        (root / file.name).write_bytes(file.read_bytes())
    hub_in(tmp_path / "hub", monkeypatch)
    data = Data(path="hub:some/thing", streaming=True, resolution=16, bucket_step=4)
    for buckets in (True, False):
        both = (stream(place / kind, buckets=buckets), RowStream(data, seed=3, batch=4, buckets=buckets))
        found = [list(islice(x, 24)) for x in both]
        assert same(*found)
    own = RowStream(data, seed=3, batch=4)
    list(islice(own, 5))
    rest = RowStream(data, seed=3, batch=4)
    rest.load_state_dict(json.loads(json.dumps(own.state_dict())))
    assert same(list(islice(rest, 6)), list(islice(stream(place / kind), 11))[5:])
    held = open_rows(data, split="test")
    assert held.captions[0] == "a" and "hf://datasets/some/thing/data/test-0" in held.name(0)
    assert pickle.loads(pickle.dumps(held)).pictures([0]).equal(held.pictures([0]))
    with pytest.raises(DataError, match="no parquet files and no tars"):
        RowStream(data.model_copy(update={"path": "hub:no/thing"}), seed=3, batch=4)


def test_a_damaged_tar_of_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "datasets" / "some" / "thing"
    root.mkdir(parents=True)
    for name in ("train-0.tar", "test-0.tar"):
        (root / name).write_bytes(b"no tar at all" * 100)
    hub_in(tmp_path, monkeypatch)
    data = Data(path="hub:some/thing", streaming=True, resolution=16, bucket_step=4)
    with pytest.raises(DataError, match=r"^hf://datasets/some/thing/train-0\.tar: is no tar file"):
        next(iter(RowStream(data, seed=3, batch=4)))
    (root / "train-0.tar").unlink()
    (root / "test-0.tar").rename(root / "train-0.tar")
    hub_in(tmp_path, monkeypatch, cat_ranges=lambda paths, *_, **__: [OSError("timed out") for _ in paths])
    (root / "test-0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"hf://datasets/some/thing/train-0\.tar: failed 6 times, .*timed out"):
        next(iter(RowStream(data, seed=3, batch=4)))


def test_a_part_that_the_hub_converted_is_told_of(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    root = tmp_path / "datasets" / "some" / "thing@refs" / "convert" / "parquet" / "default"
    for split in ("train", "test"):
        (root / f"partial-{split}").mkdir(parents=True)
        file = place / "parquet" / f"{split}-0.parquet"
        (root / f"partial-{split}" / "0000.parquet").write_bytes(file.read_bytes())
    hub_in(tmp_path, monkeypatch)
    data = Data(path="hub:some/thing", streaming=True, resolution=16, bucket_step=4)
    next(iter(RowStream(data, seed=3, batch=4)))
    assert "hub:some/thing: the hub has converted its first part alone to parquet" in caplog.text


def test_a_share_of_a_source_is_another_one_each_epoch(tmp_path: Path):
    """Over the epochs each row is shown as often as the share says, and a stream that goes on knows its epoch."""
    rows = numbered(10, 0)
    parquet(tmp_path / "train.parquet", {"image": [x for _, x in rows], "text": [f"number {n}" for n, _ in rows]})
    parquet(tmp_path / "test.parquet", {"image": [rows[0][1]], "text": ["a"]})
    data = Data(sources=(Source(path=str(tmp_path), repeats=0.4),), streaming=True, resolution=16, buckets=False)
    whole = list(islice(RowStream(data, seed=3, batch=2), 20))  # ten epochs of four rows
    epochs = [sorted(n for batch in whole[i : i + 2] for n in numbers(batch)) for i in range(0, 20, 2)]
    assert all(len(set(rows)) == 4 for rows in epochs) and len(set(map(tuple, epochs))) == 5
    assert set(Counter(n for rows in epochs for n in rows).values()) == {4}
    first = RowStream(data, seed=3, batch=2)
    list(islice(first, 7))
    rest = RowStream(data, seed=3, batch=2)
    rest.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert same(list(islice(rest, 13)), whole[7:])
