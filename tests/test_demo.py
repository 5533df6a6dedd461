"""The first evening as a whole, from nothing to pictures: what it must reach, how long it may take, and how much
memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def demo_commands() -> list[str]:
    """What ``make demo`` runs after its set-up, with this interpreter."""
    listing = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    lines = [line.strip() for line in listing.replace("\\\n", " ").splitlines()]
    steps = [line for line in lines if line and "scripts/setup.py" not in line]
    return [line.replace(".venv/bin/ldm", f"{sys.executable} -m training.cli") for line in steps]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_make_demo_draws_what_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    commands = demo_commands()
    assert [c.split("training.cli ")[1].split()[0] for c in commands if "training.cli" in c] == [
        "data", "data", "train", "evaluate",
    ]  # fmt: skip
    start = time.perf_counter()
    for command in commands:
        subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True)
    minutes = (time.perf_counter() - start) / 60
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    demo = tmp_path / "outputs/demo"
    found = json.loads((demo / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (demo / "vae/log/metrics.jsonl").read_text().splitlines()]
    psnr = [row["held_out_psnr"] for row in rows if "held_out_psnr" in row]
    assert found["prompts"] >= 150
    assert found["top1"] >= 0.65 and found["top5"] >= 0.90, found
    assert found["blank_pictures"] == 0
    assert psnr[-1] >= 26, psnr
    assert (demo / "pipeline/model_index.json").is_file() and (demo / "report.html").is_file()
    assert minutes <= 20 and peak < 4 * 2**30, (minutes, peak)
