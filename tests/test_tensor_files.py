"""Safetensors files: the library's bytes, hashed while they are written, and read box by box."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.live_bytes import LiveBytes
from training import checkpoint, tensor_files
from training.checkpoint import Keep, Saver, listed, load, save
from training.tensor_files import DTYPES, OFFSETS, StoredTensor, stored, write

ROWS, MANY = 7, 20
MIB = 2**20


def test_the_bytes_are_the_librarys(tmp_path: Path):
    """Of every dtype, a scalar, an empty tensor, one that is not contiguous, names that JSON escapes."""
    tensors = {f"{name}.{i}": torch.ones(i).to(dtype) for dtype, name in DTYPES.items() for i in (3, 1)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), 'a "é"': torch.arange(6.0).view(2, 3)}
    save_file(tensors, tmp_path / "theirs", metadata={"what": 'é "x"'})
    digest = write(tmp_path / "ours", tensors, {"what": 'é "x"'})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256((tmp_path / "theirs").read_bytes()).hexdigest()
    write(tmp_path / "view", {"x": torch.arange(6.0).view(2, 3).t()})
    assert stored([tmp_path / "view"])["x"].read().equal(torch.arange(6.0).view(2, 3).t())
    with pytest.raises(ValueError, match=r"ours: x is of torch\.complex64"):
        write(tmp_path / "ours", {"x": torch.zeros(1, dtype=torch.complex64)})


@pytest.fixture
def shards(tmp_path: Path) -> tuple[torch.Tensor, dict]:
    """A table in one file, and in shards of 3, 3 and 1 rows."""
    table = torch.randn(ROWS, 4)
    write(tmp_path / "whole", {"one": table, "scalar": torch.tensor(3)})
    for i, part in enumerate(table.split(3)):
        about = {OFFSETS: f'{{"many": {{"saved_offsets": [{3 * i}, 0]}}}}'}
        write(tmp_path / f"shard{i}", {"many": part}, about)
    return table, stored([tmp_path / "whole", *(tmp_path / f"shard{i}" for i in range(3))])


@pytest.mark.parametrize("name", ["one", "many"])
def test_a_box_of_a_stored_tensor_is_that_of_the_tensor(name: str, shards):
    table, there = shards
    x = there[name]
    assert isinstance(x, StoredTensor) and x.shape == table.shape and x.read().equal(table)
    for first in range(ROWS):
        for rows in range(1, ROWS + 1 - first):
            assert x.read([first, 1], [rows, 2]).equal(table[first : first + rows, 1:3])
            assert x.read_flat(first, rows).equal(table.flatten()[first : first + rows])
    assert x.read([ROWS, 0], [0, 4]).shape == (0, 4)  # of a process that has no row
    assert x.read_flat(26, 5).equal(table.flatten()[26:])
    x.read().zero_()
    assert x.read().equal(table)  # what was read is not the file's memory
    assert there["scalar"].equal(torch.tensor(3))


def test_of_a_stored_tensor_only_the_box_is_brought_into_memory(shards):
    _, there = shards
    with LiveBytes() as memory:
        there["one"].read([2, 0], [1, 4])
    assert memory.peak <= ROWS * 4 * 4 + 16  # the file that is mapped, and a row


# --- checkpoints -----------------------------------------------------------------------------------------------------


def weights(transposed: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """20 tensors of 1 MiB, as contiguous memory or not."""
    made = {str(i): torch.full((512, 512), float(i)) for i in range(MANY)}
    return {"net": {k: v.t() if transposed else v for k, v in made.items()}}


@pytest.mark.parametrize(("transposed", "most"), [(False, 0), (True, 1)])
def test_a_checkpoint_copies_one_tensor_at_a_time(transposed: bool, most: int, tmp_path: Path):
    """None that is on the host as it goes to the file."""
    tensors = weights(transposed)
    with LiveBytes() as memory:
        save(tmp_path, 1, tensors, {}, Keep(1))
    assert memory.peak <= most * MIB
    assert all(load(listed(tmp_path)[-1])[0]["net"][k].equal(v) for k, v in tensors["net"].items())


def test_one_that_is_written_in_the_background_copies_once(tmp_path: Path, monkeypatch):
    tensors, saver, peaks = weights(), Saver(tmp_path, Keep(1), background=True), []
    plain = checkpoint.save

    def watched(*args):  # modes are of a thread
        with LiveBytes() as memory:
            plain(*args)
        peaks.append(memory.peak)

    monkeypatch.setattr(checkpoint, "save", watched)
    with LiveBytes() as memory:
        saver.save(1, tensors, {})
    saver.close()
    assert memory.peak == MANY * MIB and peaks == [0]


def test_what_is_written_is_not_read_again_to_be_hashed(tmp_path: Path, monkeypatch):
    plain, hashed = checkpoint.file_hash, []

    def watched(file: Path) -> str:
        hashed.append(file.name)
        return plain(file)

    monkeypatch.setattr(checkpoint, "file_hash", watched)
    folder = save(tmp_path, 1, {"net": {"x": torch.ones(3)}, "rng": {}}, {"n": 1}, Keep(1))
    assert hashed == []
    load(folder)
    assert sorted(hashed) == ["net.safetensors", "rng.safetensors", "state.json"]  # each once
    hashed.clear()
    assert [checkpoint.problem(folder, rank=rank, world=2) for rank in range(2)] == [None, None]
    assert sorted(hashed) == ["net.safetensors", "rng.safetensors", "state.json"]  # by one of the two


def test_no_more_of_a_checkpoint_is_in_memory_than_is_asked_for(tmp_path: Path):
    folder = save(tmp_path, 1, weights(), {}, Keep(1))
    tensors, _ = checkpoint.opened(folder)
    with LiveBytes() as memory:
        for i in range(MANY):
            assert tensor_files.read(tensors["net"][str(i)])[0, 0] == i
    file = (folder / "net.safetensors").stat().st_size  # counted for each tensor that is mapped from it
    assert memory.peak < file + 2 * MIB
