"""What a run tells: ``RUN/log/metrics.jsonl``, trackers, the progress bar, and means between two lines of the log."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

# Keys of the log that the clock decides: in two runs of one config they differ.
TIMED = (
    "images_per_second", "tflops", "mfu", "step_seconds", "data_wait_seconds", "data_wait_seconds_max",
    "comm_wait_seconds", "comm_wait_seconds_max",
)  # fmt: skip


class Window:
    """Sums on the device since the last line of the log. What is not finite is left out of a mean.

    Names that come together are summed together: a few kernels a step, whatever is logged.
    """

    def __init__(self, saved: Mapping[str, Tensor] | None = None, device: torch.device | None = None):
        self.sums = {k: v.to(device) for k, v in (saved or {}).items()}  # JSON list of names -> (2, names) sum, count

    def add(self, named: Mapping[str, Tensor], processes: int = 1) -> None:
        """Scalars of one micro-batch; or of a step, which all ``processes`` add: together they count as one."""
        values = torch.stack([v.detach().float() for v in named.values()])
        table = torch.stack([values.nan_to_num(0.0, 0.0, 0.0), values.isfinite().float()])  # (2, names)
        table = table / processes if processes > 1 else table
        key = json.dumps(list(named))
        self.sums[key] = self.sums[key] + table if key in self.sums else table

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Over all processes, which all ask; one read-back for everything."""
        if not self.sums:
            return {}
        table = torch.cat(list(self.sums.values()), dim=1)  # (2, all names)
        if accelerator.num_processes > 1:
            table = cast(Tensor, accelerator.reduce(table, "sum"))
        names = [name for key in self.sums for name in json.loads(key)]
        totals: dict[str, list[float]] = {}
        for name, total, count in zip(names, *table.tolist(), strict=True):
            known = totals.setdefault(name, [0.0, 0.0])
            known[0], known[1] = known[0] + total, known[1] + count
        return {name: total / count if count else math.nan for name, (total, count) in totals.items()}


class Journal:
    """``RUN/log/metrics.jsonl``, ``waits.jsonl`` and the progress bar, of the main process alone.

    Args:
        images: where the run starts; what a killed one wrote of later images goes.
    """

    def __init__(self, run: Path, accelerator: Accelerator, images: int):
        self.run, self.accelerator, self.main = run, accelerator, accelerator.is_main_process
        self.file, self.waits = run / "log" / "metrics.jsonl", run / "log" / "waits.jsonl"
        self.console = Console(stderr=True)
        if self.main:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            for file in (self.file, self.waits):
                _cut(file, images)

    def write(self, images: int, values: Mapping[str, float]) -> None:
        if self.main and values:
            with self.file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"images": images, **values}) + "\n")
            for tracker in self.accelerator.trackers:
                tracker.log(dict(values), step=images)

    def write_waits(self, images: int, seconds: Sequence[Sequence[float]]) -> None:
        """A line of ``waits.jsonl``, where several processes train.

        Args:
            seconds: by process, of a step: wait for data, wait for other processes, the whole step.
        """
        if self.main and len(seconds) > 1:
            names = ("data_wait_seconds", "comm_wait_seconds", "step_seconds")
            columns = zip(*seconds, strict=True)
            line = {name: [round(x, 6) for x in column] for name, column in zip(names, columns, strict=True)}
            with self.waits.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"images": images, **line}) + "\n")

    def show(self, images: int, sheet: Path) -> None:
        """A sheet of samples, to the trackers that take pictures; one that was not drawn is passed over."""
        if not self.main or not sheet.is_file():
            return
        with Image.open(sheet) as file:
            picture = np.asarray(file.convert("RGB"))[None]  # (1, H, W, 3)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": picture}, step=images, **form)

    def settle(self) -> None:
        """The lines are on the disk: a checkpoint that follows is never ahead of them."""
        if self.main and self.file.is_file():
            with self.file.open("rb") as handle:
                os.fsync(handle.fileno())

    def say(self, text: str) -> None:
        if self.main:
            self.console.print(text)

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[Callable[[int, Mapping[str, float], float], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
            TextColumn("{task.fields[loss]} {task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.main) as bar:
            task = bar.add_task(self.run.name, total=total, completed=min(done, total), loss="", speed="")

            def show(images: int, means: Mapping[str, float], speed: float) -> None:
                bar.update(
                    task,
                    completed=min(images, total),
                    loss=f"loss {means.get('loss', math.nan):.4f}",
                    speed=f"{speed:.0f} images/s",
                )

            yield show


def _cut(file: Path, images: int) -> None:
    """Drop the lines of images after ``images``."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        partial = file.with_suffix(".partial")
        partial.write_text("".join(x for x in lines if _told_by(x, images)), encoding="utf-8")
        partial.replace(file)


def _told_by(line: str, images: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["images"] <= images
    except ValueError:  # of a write that was cut short
        return False
