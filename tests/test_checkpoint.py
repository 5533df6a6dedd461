"""Checkpoints: complete or not there, whatever happens to the disk or to the process."""

import errno
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.toy import begun
from training import checkpoint, tensor_files
from training.checkpoint import CheckpointError, Keep, listed, load, save


def tensors(seed: int) -> dict[str, dict[str, Tensor]]:
    """Of every dtype that a run saves, a scalar, an empty file, a view, and numbers that no comparison equals."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(4, 6, generator=generator)
    return {
        "net": {"a.weight": table, "a.bias": table[:, 0], "b": table.t(), "half": table.bfloat16()},
        "net_optimizer": {"0.step": torch.tensor(3.0), "0.exp_avg": torch.tensor([float("nan"), -0.0, float("inf")])},
        "net_ema": {},
        "rng": {"cpu": generator.get_state()},
    }


def assert_same_bits(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        for key, x in a[name].items():
            y = b[name][key]
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            bits, others = (z.contiguous().flatten().view(torch.uint8) for z in (x, y))
            assert bits.equal(others), f"{name} {key}"


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_round_trip(tmp_path: Path):
    state = {"images": 12, "inputs": {"data": "é"}, "optimizer_steps": {"net": 3}}
    folder = save(tmp_path, 12, tensors(1), state, Keep(2))
    assert folder == tmp_path / "images_000000012"
    found, told = load(folder)
    assert_same_bits(found, tensors(1))
    assert told == state
    assert names(tmp_path) == [folder.name]


def test_shared_weights_are_saved_under_both_names(tmp_path: Path):
    table = torch.randn(3, 3)
    found, _ = load(save(tmp_path, 1, {"net": {"a": table, "b": table}}, {}, Keep(1)))
    assert found["net"]["a"].equal(table) and found["net"]["b"].equal(table)


def test_only_the_newest_stay(tmp_path: Path):
    for n in (5, 10, 100, 1_000_000_000, 11):  # the longest name sorts last too
        save(tmp_path, n, tensors(n), {"images": n}, Keep(3))
    assert [load(p)[1]["images"] for p in listed(tmp_path)] == [11, 100, 1_000_000_000]
    assert len(names(tmp_path)) == 3


def test_the_same_number_is_replaced(tmp_path: Path):
    save(tmp_path, 5, tensors(1), {}, Keep(2))
    save(tmp_path, 5, tensors(2), {}, Keep(2))
    assert_same_bits(load(listed(tmp_path)[-1])[0], tensors(2))
    assert names(tmp_path) == ["images_000000005"]


@pytest.mark.parametrize("name", ["net.safetensors", "rng.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_flipped_bit_is_found(name: str, place: float, tmp_path: Path):
    first = save(tmp_path, 5, tensors(1), {"images": 5}, Keep(2))
    second = save(tmp_path, 10, tensors(2), {"images": 10}, Keep(2))
    file = second / name
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << random.randrange(8)
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load(second)
    if name != "manifest.json":  # where that is damaged, it may name any file
        assert str(file) in str(caught.value)
    assert str(second) in str(caught.value)
    assert f"delete the folder to go on from {first}" in str(caught.value)
    shutil.rmtree(second)
    assert_same_bits(load(listed(tmp_path)[-1])[0], tensors(1))


@pytest.mark.parametrize("rank", [0, 1])
def test_damage_that_one_process_finds_all_hear_of(rank: int, tmp_path: Path, monkeypatch):
    """And each of them names the same earlier checkpoint."""
    first, second = (save(tmp_path, n, tensors(n), {}, Keep(2)) for n in (5, 10))
    (second / "net.safetensors").write_bytes(b"")
    found = [checkpoint.problem(second, rank=r, world=2) for r in range(2)]
    assert sum(x is not None for x in found) == 1
    monkeypatch.setattr(checkpoint.sharded, "rank_and_world", lambda: (rank, 2))
    others = iter([found[1 - rank], None])  # of the second, then of the first
    monkeypatch.setattr(checkpoint.sharded, "gather_objects", lambda mine: [mine, next(others)])
    with pytest.raises(
        CheckpointError, match=rf"net.safetensors: missing or damaged.*go on from {re.escape(str(first))}"
    ):
        load(second)


@pytest.mark.parametrize("damage", ["unlink", "truncate"])
def test_a_file_that_is_gone_or_short_is_found(damage: str, tmp_path: Path):
    folder = save(tmp_path, 5, tensors(1), {}, Keep(2))
    file = folder / "net.safetensors"
    file.unlink() if damage == "unlink" else file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))}: missing or damaged .*to start anew"):
        load(folder)


def test_what_is_not_complete_is_not_listed(tmp_path: Path):
    assert listed(tmp_path / "absent") == []
    done = save(tmp_path, 5, tensors(1), {}, Keep(2))
    shutil.copytree(done, tmp_path / "images_000000009.partial")
    shutil.copytree(done, tmp_path / "images_000000004.old")
    shutil.copytree(done, tmp_path / "images_000000007")
    (tmp_path / "images_000000007" / "manifest.json").unlink()
    (tmp_path / "images_000000008").write_text("a file")
    assert listed(tmp_path) == [done]


def test_leftovers_of_a_killed_save_do_not_pile_up(tmp_path: Path):
    """A run that is stopped by a signal saves at another number each time: no later save has the leftover's name."""
    done = save(tmp_path, 5, tensors(1), {}, Keep(2))
    shutil.copytree(done, tmp_path / "images_000000009.partial")
    shutil.copytree(done, tmp_path / "images_000000004.old")
    save(tmp_path, 10, tensors(2), {}, Keep(2))
    assert names(tmp_path) == ["images_000000005", "images_000000010"]


@pytest.mark.parametrize("where", ["write", "replace_folder"])
@pytest.mark.parametrize("images", [5, 10])
def test_a_full_disk_leaves_the_old_and_no_orphan(where: str, images: int, tmp_path: Path, monkeypatch):
    """Half-way through the files, or at the end; also where the same number is replaced."""
    save(tmp_path, 5, tensors(1), {}, Keep(1))
    module = tensor_files if where == "write" else checkpoint
    plain, calls = getattr(module, where), []

    def full(*args):
        calls.append(args)
        if len(calls) == (1 if where == "replace_folder" else 2):
            if where == "write":
                Path(args[0]).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*args)

    monkeypatch.setattr(module, where, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, images, tensors(2), {}, Keep(1))
    monkeypatch.undo()
    assert names(tmp_path) == ["images_000000005"]
    assert_same_bits(load(listed(tmp_path)[-1])[0], tensors(1))
    save(tmp_path, images, tensors(2), {}, Keep(1))  # space was made
    assert_same_bits(load(listed(tmp_path)[-1])[0], tensors(2))


def save_for_ever(root: Path) -> None:
    torch.set_num_threads(1)
    done = listed(root)
    n = load(done[-1])[1]["n"] if done else 0
    while True:
        n += 1
        many = {str(i): torch.full((1000,), float(n)) for i in range(10)}
        files = {"net": {"w": torch.full((300_000,), float(n))}, "net_optimizer": many, "ema": many}
        save(root, n, files, {"n": n}, Keep(2))


def newest(root: Path) -> int:
    return checkpoint.images_of(listed(root)[-1])


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path):
    """SIGKILL while it saves in a loop: all that is listed loads, and the newest never goes back."""
    reached, moments = 0, random.Random(4)
    for _ in range(12):
        process = begun(save_for_ever, tmp_path)
        limit = time.monotonic() + 30
        while (not listed(tmp_path) or newest(tmp_path) <= reached) and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = listed(tmp_path)
        assert 1 <= len(found) <= 3  # two, and the one that was about to go
        for folder in found:
            loaded, state = load(folder)
            assert loaded["net"]["w"].eq(state["n"]).all()
            assert loaded["ema"]["9"].eq(state["n"]).all()
        assert state["n"] > reached
        reached = state["n"]
    save(tmp_path, reached + 1, tensors(1), {}, Keep(2))
    assert len(names(tmp_path)) == 2  # nothing of the killed ones is left
