"""What a run tells is what its trackers hold afterwards."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.journal import Journal


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "log")
    accelerator.init_trackers("run", config={"config": "task: diffusion"})
    yield accelerator
    AcceleratorState._reset_state(True)


def sheet_of(file: Path, seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(file)
    return pixels


def events(accelerator: Accelerator, run: Path) -> EventAccumulator:
    for tracker in accelerator.trackers:
        tracker.finish()
    return EventAccumulator(str(run / "log" / "run"), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_numbers_and_sheets_are_in_the_event_files(tracked: Accelerator, tmp_path: Path):
    journal = Journal(tmp_path, tracked, 0)
    told: dict[int, np.ndarray] = {}
    for images in (8, 16):
        journal.write(images, {"loss": 1.0 / images, "lr": 0.5})
        file = tmp_path / "samples" / f"images_{images:09d}.png"
        told[images] = sheet_of(file, images)
        journal.show(images, file)
    journal.show(24, tmp_path / "samples" / "never_drawn.png")
    found = events(tracked, tmp_path)
    assert [(x.step, x.value) for x in found.Scalars("loss")] == [(8, 0.125), (16, 0.0625)]
    pictures = found.Images("samples")
    assert [x.step for x in pictures] == [8, 16]
    for event in pictures:
        with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
            assert np.array_equal(np.asarray(picture), told[event.step])
    lines = [json.loads(x) for x in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [x["images"] for x in lines] == [8, 16]


def test_each_tracker_is_told_as_it_asks(tmp_path: Path):
    """A list of (H, W, 3), as accelerate's wandb tracker takes it; a tracker without pictures is left alone."""
    told: list[Any] = []
    wandb = SimpleNamespace(name="wandb", log_images=lambda *args, **kw: told.append((args, kw)))
    plain = SimpleNamespace(name="trackio", log=lambda *args, **kw: told.append("numbers"))
    accelerator: Any = SimpleNamespace(is_main_process=True, trackers=[plain, wandb])
    file = tmp_path / "samples" / "images_000000008.png"
    pixels = sheet_of(file, 1)
    Journal(tmp_path, accelerator, 0).show(8, file)
    (((values,), options),) = told
    assert options == {"step": 8} and list(values) == ["samples"]
    assert [x.shape for x in values["samples"]] == [(20, 30, 3)] and np.array_equal(values["samples"][0], pixels)
    other: Any = SimpleNamespace(is_main_process=False, trackers=[wandb])
    Journal(tmp_path, other, 0).show(16, file)
    assert len(told) == 1
