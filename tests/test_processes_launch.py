"""The launchers that people use, for real: torchrun with two processes, and one that starts fewer than asked."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.killed import configs, draw, losses
from tests.toy import ROOT
from training import checkpoint

TRAIN = ["-m", "training.cli", "train", "--no-check"]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR")}
    return {**kept, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("launch")
    draw(root / "data")
    (root / "clip.yaml").write_text(yaml.safe_dump(configs(root, root, images=400)["clip"]))
    return root


def test_torchrun_is_stopped_and_goes_on(clip: Path):
    """SIGTERM to the launcher reaches both processes, which save; the same command goes on and makes the pipeline."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, *TRAIN, str(clip / "clip.yaml"), "train.processes=2"]
    saved = clip / "clip" / "checkpoints"
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        limit = time.monotonic() + 120
        while child.poll() is None and not checkpoint.listed(saved) and time.monotonic() < limit:
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=120)
    said = " ".join(said.split())
    assert child.returncode != 0 and "all is saved; the same command goes on from here" in said, said[-3000:]
    stopped = checkpoint.images_of(checkpoint.listed(saved)[-1])
    assert f"stopped at {stopped} images" in said and 0 < stopped < 400
    assert not (clip / "clip" / "done.json").exists()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"images_{stopped:09d}" in "".join(done.stderr.split())  # where it goes on from
    assert (clip / "clip" / "pipeline" / "model.safetensors").is_file()
    seen = [row["images"] for row in losses(clip / "clip") if "loss" in row]
    assert seen == sorted(set(seen)) and seen[-1] == 400  # one process wrote, each line once


def test_a_launcher_that_starts_one_of_two_is_refused(clip: Path):
    """accelerate#2741: this form of the command runs one process, and says nothing."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command = [*launcher, "--mixed_precision", "no", "--dynamo_backend", "no", *TRAIN, str(clip / "clip.yaml")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT, timeout=200)
    said = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "ldm: accelerate launch was asked for several processes and started one" in said, said[-3000:]
