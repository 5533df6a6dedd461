"""Which checkpoints stay, those written in the background, and disks that are really full."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.toy import ROOT, Toy, differing, go, logged
from training import checkpoint, tensor_files
from training.checkpoint import CheckpointError, Keep, Saver, best_of, images_of, listed, load, save


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"net": {"w": torch.full((1000,), value)}}


def kept(root: Path) -> list[int]:
    return [images_of(p) for p in listed(root)]


def test_the_first_of_every_so_many_images_stays(tmp_path: Path):
    for images in (400, 900, 1000, 1400, 1900, 2300, 2900, 3100):
        save(tmp_path, images, tensors(images), {}, Keep(2, every=1000))
    assert kept(tmp_path) == [1000, 2300, 2900, 3100]
    save(tmp_path, 3200, tensors(1), {}, Keep(1))
    assert kept(tmp_path) == [3200]


def test_the_best_stays(tmp_path: Path):
    for images, best in (
        (1, None),
        (2, {"value": 0.5}),
        (3, None),
        (4, None),
        (5, {"value": 0.4}),
        (6, None),
        (7, None),
    ):
        save(tmp_path, images, tensors(images), {"n": images}, Keep(1), best)
        if images == 4:
            assert kept(tmp_path) == [2, 4] and images_of(best_of(tmp_path)) == 2
    assert kept(tmp_path) == [5, 7]
    assert json.loads((tmp_path / "best.json").read_text()) == {"folder": "images_000000005", "best": {"value": 0.4}}
    assert load(best_of(tmp_path))[1]["n"] == 5


def falling(monkeypatch, values: dict[int, float], **more: float) -> None:
    def held_out(self: Toy) -> dict[str, float]:
        return {"held_out_loss": values[max(self.seen) + 1], **more}

    monkeypatch.setattr(Toy, "held_out", held_out)


def test_a_run_keeps_its_best(tmp_path: Path, monkeypatch):
    """Best at 48: saved there though no checkpoint was due, and known after a resume."""
    falling(monkeypatch, {24: 3.0, 48: 1.0, 72: 2.0, 96: 1.5})
    config = {"keep_best": True, "keep_last": 1, "checkpoint_every": 80}
    go(tmp_path, config={**config, "images": 72})
    assert kept(tmp_path / "checkpoints") == [48, 72]
    go(tmp_path, config=config)
    assert kept(tmp_path / "checkpoints") == [48, 96]
    told = json.loads((tmp_path / "checkpoints" / "best.json").read_text())["best"]
    assert told == {"metric": "held_out_loss", "value": 1.0, "images": 48}


def test_of_some_measures_more_is_better(tmp_path: Path, monkeypatch):
    falling(monkeypatch, {24: 3.0, 48: 1.0, 72: 2.0, 96: 1.5}, held_out_psnr=1.0)
    go(tmp_path / "a", config={"keep_best": True, "best_metric": "held_out_psnr"})
    assert images_of(best_of(tmp_path / "a" / "checkpoints")) == 24  # as good is not better
    with pytest.raises(
        ValueError, match=r"train\.best_metric fid: is not measured; choose of held_out_loss, held_out_psnr"
    ):
        go(tmp_path / "b", config={"keep_best": True, "best_metric": "fid"})


# --- in the background -----------------------------------------------------------------------------------------------


def test_what_is_written_in_the_background_is_what_was_there(tmp_path: Path, monkeypatch):
    """Weights that move while the writing waits are not in it."""
    go_on, plain = threading.Event(), checkpoint.save

    def slow(*args):
        assert go_on.wait(30)
        return plain(*args)

    monkeypatch.setattr(checkpoint, "save", slow)
    saver = Saver(tmp_path, Keep(2), background=True)
    weights, state = tensors(1.0), {"n": [1]}
    saver.save(5, weights, state)
    weights["net"]["w"].fill_(2.0)
    state["n"].append(2)
    assert kept(tmp_path) == []  # training went on meanwhile
    go_on.set()
    saver.save(6, weights, state)  # waits for the first
    assert kept(tmp_path)[:1] == [5]
    saver.close()
    first, second = (load(folder) for folder in listed(tmp_path))
    assert first[0]["net"]["w"].eq(1).all() and first[1] == {"n": [1]}
    assert second[0]["net"]["w"].eq(2).all() and second[1] == {"n": [1, 2]}


def test_a_run_that_saves_in_the_background_is_the_same(tmp_path: Path):
    a, b = go(tmp_path / "a"), go(tmp_path / "b", config={"async_checkpoint": True})
    assert differing(a.state(), b.state()) == [] and logged(tmp_path / "a") == logged(tmp_path / "b")
    for one, two in zip(*(listed(tmp_path / x / "checkpoints") for x in "ab"), strict=True):
        assert (one / "manifest.json").read_text() == (two / "manifest.json").read_text()  # all hashes


def test_an_error_in_the_background_comes_out(tmp_path: Path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "write", full)
    with pytest.raises(OSError, match="No space left"):  # of the first, at the second
        go(tmp_path / "a", config={"async_checkpoint": True})
    with pytest.raises(OSError, match="No space left"):  # of the last, at the end
        go(tmp_path / "b", config={"async_checkpoint": True, "checkpoint_every": 1000})
    assert [list((tmp_path / x / "checkpoints").glob("*")) for x in "ab"] == [[], []]


# --- full disks ------------------------------------------------------------------------------------------------------

FILL = """
import sys, torch
from pathlib import Path
from training.checkpoint import Keep, listed, load, save
root = Path(sys.argv[1])
save(root, 1, {"net": {"w": torch.ones(100_000)}}, {"n": 1}, Keep(2))
def many(n): return {"net": {"w": torch.full((100_000,), float(n))}, "more": {"w": torch.zeros(1_500_000)}}
try:
    save(root, 2, many(2), {"n": 2}, Keep(2))
except OSError as error:
    print(type(error).__name__, error)
except Exception as error:
    print("unexpected", type(error), error)
else:
    print("it fitted")
print(sorted(p.name for p in root.iterdir()))
tensors, state = load(listed(root)[-1])
print(state, tensors["net"]["w"].eq(1).all().item())
save(root, 3, {"net": {"w": torch.full((100_000,), 3.0)}}, {"n": 3}, Keep(2))
print(sorted(p.name for p in root.iterdir()))
"""


def small_files() -> None:
    """Where no file system can be made, a file that may not grow stands for a full one: the same error of ``write``."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 2**20, 4 * 2**20))


def test_a_disk_that_is_really_full(tmp_path: Path):
    """A file system of 4 MiB, made in a namespace of its own, and a checkpoint of 6.4 MB."""
    run = [sys.executable, "-c", FILL, str(tmp_path)]
    mount = f'mount -t tmpfs -o size=4m none {tmp_path} && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *run]
    can = shutil.which("unshare") and subprocess.run([*command[:6], f"mount -t tmpfs none {tmp_path}"]).returncode == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command if can else run,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=None if can else small_files,
    )
    error, after, old, later = done.stdout.splitlines()
    assert error.startswith("OSError") and "images_000000002: could not be written" in error
    assert "the checkpoints before it are whole" in error and ("No space left" in error or "File too large" in error)
    assert after == "['images_000000001']"  # no orphan
    assert old == "{'n': 1} True"
    assert later == "['images_000000001', 'images_000000003']"


def test_a_pickle_is_not_opened(tmp_path: Path):
    """Whatever lies in a checkpoint's folder, only safetensors and JSON are read."""
    folder = save(tmp_path, 1, tensors(1), {"n": 1}, Keep(1))
    (folder / "rng.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    (folder / "net.safetensors").write_bytes((folder / "rng.pkl").read_bytes())
    with pytest.raises(CheckpointError, match=r"net\.safetensors: missing or damaged"):
        load(folder)
    hashes = json.loads((folder / "manifest.json").read_text())
    hashes["net.safetensors"] = checkpoint.file_hash(folder / "net.safetensors")
    (folder / "manifest.json").write_text(json.dumps(hashes))
    with pytest.raises(CheckpointError, match=r"net\.safetensors: no safetensors file"):
        load(folder)
    assert not (tmp_path / "ran").exists()
