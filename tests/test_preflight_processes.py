"""The preflight of two real processes over gloo: one answer for both, and an error of one ends both in seconds."""

import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from tests import forecasts, tiny
from tests.toy import begun, ended
from training import cli, fail_together, measure, processes, run
from training.config import parse
from training.schema import Train

PLENTY = 2**40


def place(rank: int, port: int, said: str) -> None:
    """This process becomes one of two; what it says goes to SAID.RANK."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in names.items()}, ACCELERATE_USE_CPU="true", COLUMNS="300")
    torch.set_num_threads(1)
    handle = os.open(f"{said}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def command(arguments: Sequence[str], free: Sequence[int], broken: int | None, said: str, rank: int, port: int) -> None:
    """``ldm ARGUMENTS`` with as much memory free, and in process ``broken`` a run that cannot be built."""
    place(rank, port, said)
    sys.argv = ["ldm", *arguments]
    build = run.build

    def breaks(*args: Any) -> Any:
        if rank == broken:
            raise ValueError("a file that this host alone has not")
        return build(*args)

    with mock.patch.object(measure, "free_memory", lambda device: free[rank]), mock.patch.object(run, "build", breaks):
        cli.main()


def hashed(raw: dict[str, Any], said: str, rank: int, port: int) -> None:
    """What a run's inputs are, and how many files this process has read for it."""
    place(rank, port, said)
    with mock.patch("hashlib.file_digest", wraps=run.hashlib.file_digest) as digest:
        inputs = run._inputs_from_one(parse(raw, "config"), mock.Mock(fingerprint=f"rows of {rank}"))
    print(yaml.safe_dump({"inputs": inputs, "files": digest.call_count}))


def fails_late(said: str, rank: int, port: int) -> None:
    """Process 1 fails when process 0 has long done its part."""
    place(rank, port, said)
    accelerator = processes.started(Train(images=8), "no")
    with mock.patch.object(fail_together, "GRACE", 1.0), fail_together.all_fail_together(accelerator):
        if rank:
            time.sleep(0.5)
            raise ValueError("a disk that this host alone has not")
    print("went on", flush=True)


def both(f: Any, *args: Any) -> list[int | None]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    return ended([begun(f, *args, rank, port) for rank in range(2)], 45)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("two")
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    raw = {
        "task": "clip", "output_dir": str(root / "run"),
        "model": {"text": tower, "vision": {**tower, "patch_size": 8}},
        "data": {"path": str(forecasts.pictures(root / "data", 24)), "resolution": 32, "held_out": 0.2},
        "train": {"images": 32, "batch_size": 4, "mixed_precision": "no"},
    }  # fmt: skip
    (root / "clip.yaml").write_text(yaml.safe_dump(raw))
    return root / "clip.yaml"


def test_the_process_with_the_least_free_memory_decides_for_both(config: Path, tmp_path: Path):
    said = str(tmp_path / "said")
    assert both(command, ["train", str(config)], [PLENTY, 1000], None, said) == [2, 2]
    told = [Path(f"{said}.{rank}").read_text() for rank in range(2)]
    (first, second) = (next(line for line in text.splitlines() if line.startswith("ldm: ")) for text in told)
    assert first == second and f"{config.parent / 'run'}: does not fit: a step takes" in first
    host = re.escape(socket.gethostname())
    assert re.search(rf"0\.0 MiB that are free on cpu\S* of {host} \(process 1\)", first)
    assert not (config.parent / "run").exists() and [p.name for p in config.parent.iterdir() if "check" in p.name] == []


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_of_one_ends_both_with_its_message(broken: int, config: Path, tmp_path: Path):
    said = str(tmp_path / "said")
    assert None not in (codes := both(command, ["check", str(config)], [PLENTY] * 2, broken, said))
    told = [Path(f"{said}.{rank}").read_text() for rank in range(2)]
    assert codes[1 - broken] in (2, 70) and codes[broken] == 1  # raised by this file: a traceback
    message = f"process {broken} on {socket.gethostname()}: a file that this host alone has not"
    assert message in told[1 - broken] and message.split(": ")[1] in told[broken], told
    assert [p.name for p in config.parent.iterdir() if "check" in p.name] == []


def test_one_that_has_done_its_part_leaves_with_one_that_fails_later(tmp_path: Path):
    codes = both(fails_late, said := str(tmp_path / "said"))
    told = Path(f"{said}.0").read_text()
    assert codes[0] in (1, 70) and codes[1] == 1, told
    assert "went on" not in told
    assert f"process 1 on {socket.gethostname()}: a disk that this host alone has not" in told


def test_what_a_run_builds_on_is_read_by_one(config: Path, tmp_path: Path):
    for name in ("vae", "clip"):
        (getattr(tiny, name)().to_diffusers() if name == "vae" else tiny.clip()).save_pretrained(tmp_path / name)
    raw = {
        "task": "diffusion", "output_dir": str(tmp_path / "run"), "data": {"path": str(config.parent / "data")},
        **forecasts.TASKS["dit"],
        "vae": {"pretrained": str(tmp_path / "vae")}, "text": {"pretrained": str(tmp_path / "clip")},
        "train": {"images": 8, "mixed_precision": "no"},
    }  # fmt: skip
    assert both(hashed, raw, str(tmp_path / "said")) == [0, 0]
    first, second = (yaml.safe_load((tmp_path / f"said.{rank}").read_text()) for rank in range(2))
    assert first["inputs"] == second["inputs"] and first["inputs"]["data"] == "rows of 0"
    assert first["inputs"].keys() == {"vae", "text", "data"} and (first["files"], second["files"]) == (2, 0)
