"""The tasks with two processes over gloo, killed and gone on with: bit for bit those that were never killed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.killed import TASKS, losses, rows_seen
from tests.killed_together import WORLD, tasks_together
from tests.toy import begun, ended
from training import checkpoint

ROWS = 18  # of tests.killed's pictures


def compared(root: Path, task: str, images: int) -> None:
    """Weights, optimizers, averages, random numbers and sums of the log; its lines; rows; what was exported."""
    whole, parts = (checkpoint.listed(run / task / "checkpoints")[-1] for run in (root, root / "killed"))
    assert whole.name == parts.name == f"images_{images:09d}"
    assert (whole / "manifest.json").read_text() == (parts / "manifest.json").read_text(), task
    assert losses(root / task) == losses(root / "killed" / task), task
    seen: list[int] = []
    for rank in range(WORLD):
        expected, found = (rows_seen(root / f"{name}.{rank}.rows") for name in (task, f"{task}_killed"))
        assert found == expected and list(expected) == list(range(0, images, 8)), task
        seen += [row for rows in expected.values() for row in rows]
    if task not in ("stream", "adapt"):  # each epoch shows every row once
        times = {seen.count(row) for row in range(ROWS)}
        assert times == {images // ROWS, images // ROWS + 1}, task
    made = root / task / ("adapter" if task == "adapt" else "pipeline")
    files = [p.relative_to(root / task) for p in made.rglob("*.safetensors")]
    assert files
    for file in files:
        assert (root / task / file).read_bytes() == (root / "killed" / task / file).read_bytes(), (task, file)


def made(root: Path, tasks: tuple[str, ...], kills: int, seed: int, images: int, **train: Any) -> None:
    (code,) = ended([begun(tasks_together, root, tasks, kills, seed, {"images": images, **train})], 2000)
    assert code == 0, {p.name: p.read_text()[-2000:] for p in root.glob("*.txt")}
    for task in tasks:
        compared(root, task, images)


def test_the_tasks_are_killed_and_go_on(tmp_path: Path):
    """For each one of the processes, whom the other then names, and the whole job; the adversarial player joins on the
    way, an epoch ends within a step."""
    made(tmp_path, ("clip", "vae", "unet"), 1, 3, 40)
    told = [row["images"] for row in losses(tmp_path / "vae") if "critic_loss" in row]
    assert min(told) > 24 and max(told) == 40


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_for_minutes_together(workers: int, tmp_path: Path):
    seed = random.Random().randrange(10**6)  # the global generator is seeded for every test
    for _ in range(3):
        root = tmp_path / str(seed)
        made(
            root,
            TASKS,
            6,
            seed,
            80,
            timeout_minutes=0.5,
            num_workers=workers,
            async_checkpoint=bool(workers),
            keep_best=False,
        )
        print(seed, workers, json.loads((root / "kills.json").read_text()), flush=True)
        seed += 1
