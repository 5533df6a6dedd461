"""The only loop. It counts images, takes an ordered list of players, and knows no task."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import checkpoint
from .clock import ImageClock
from .ema import EMA
from .optim import GuardedAdamW
from .schema import Train

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]


class Interrupted(SystemExit):
    """The run was asked to stop, saved itself and can go on. Exit code 75: try again later."""


class Diverged(RuntimeError):
    """No finite gradient for many steps in a row."""


@dataclass
class Player:
    """One network that learns.

    Args:
        name: of its checkpoint file and log keys.
        module: what trains, wrapped for several processes; ``loss`` must run through it.
        loss: batch, images seen before this step -> (scalar, named scalars for the log).
        optimizer: steps it.
        ema: its averaged weights.
        start: images seen before it joins.
    """

    name: str
    module: nn.Module
    loss: Callable[[Batch, int], tuple[Tensor, dict[str, Tensor]]]
    optimizer: GuardedAdamW
    ema: EMA
    start: int = 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the network bears the weights that samples and exports use."""
        with self.ema.swapped():
            yield


class Task(Protocol):
    """What the loop is handed. ``players`` are in the order in which they move."""

    players: Sequence[Player]
    rows: Dataset  # __getitems__([(image index, row), …]) -> Batch, with "index" and "row" (B,) in it

    def held_out(self) -> dict[str, float]:
        """Measures on pictures that training never sees, with the averaged weights."""
        ...

    def sample(self, file: Path) -> None:
        """Draw a grid of pictures, with the averaged weights."""
        ...

    def export(self) -> None:
        """Write what the run made to its ``pipeline`` folder."""
        ...


@dataclass
class _Window:
    """Sums on the device since the last read-back, and the rows that went in."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)  # image index at the step's start -> rows
    skipped: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """One read-back for everything."""
        values = torch.stack([v.float() / self.counts[k] for k, v in self.sums.items()]).tolist()
        return dict(zip(self.sums, values, strict=True))


def train(task: Task, config: Train, *, run: Path, seed: int, accelerator: Accelerator, inputs: dict[str, str]) -> bool:
    """Train until ``config.images`` have been seen, going on from the newest checkpoint in ``run``.

    Args:
        inputs: hashes of what the run builds on; a checkpoint that was made from others is refused.
    Returns:
        True if any step was made.
    Raises:
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
        Diverged: ``max_skipped_steps`` steps in a row without a finite gradient; the rows are named.
        CheckpointError: the newest checkpoint is damaged or belongs to other inputs.
    """
    images, steps = _resume(task, run, inputs)
    if images >= config.images:
        return False
    world = accelerator.num_processes
    per_micro = config.batch_size * world
    per_step = per_micro * config.gradient_accumulation_steps
    stop_at = images + math.ceil((config.images - images) / per_step) * per_step
    clock = ImageClock(len(task.rows), config.batch_size, seed, images, stop_at, accelerator.process_index, world)  # type: ignore[arg-type]
    loader = DataLoader(
        task.rows,
        batch_sampler=clock,  # type: ignore[arg-type]
        num_workers=config.num_workers,
        collate_fn=_as_is,  # type: ignore[arg-type]
        worker_init_fn=_bear_one_signal,
        generator=torch.Generator(),  # its own: a loader draws a seed as it starts, and the resumed state must not move
    )
    window = _Window()
    in_a_row = {player.name: torch.zeros((), device=accelerator.device) for player in task.players}
    journal, clock_start, images_start = _Journal(run, accelerator, images), time.perf_counter(), images

    def save() -> None:
        if accelerator.is_main_process:
            done = {player.name: player.optimizer.steps for player in task.players}
            state = {"images": images, "steps": steps, "optimizer_steps": done, "inputs": inputs}
            checkpoint.save(run / "checkpoints", images, _tensors(task), state, config.keep_last)
        accelerator.wait_for_everyone()

    def due(every: int) -> bool:
        """The clock has just passed a multiple of ``every``, or reached the end."""
        return images // every != (images - per_step) // every or images >= config.images

    with (
        _stop_signals() as stop,
        closing(_batches(loader, accelerator.device)) as batches,
        journal.progress(config.images, images) as show,
    ):
        while images < config.images:
            micros = [next(batches) for _ in range(config.gradient_accumulation_steps)]
            for player in task.players:
                if images < player.start:
                    continue
                for i, micro in enumerate(micros):
                    hold = accelerator.no_sync(player.module) if i + 1 < len(micros) else nullcontext()
                    with hold:
                        loss, named = player.loss(micro, images)
                        accelerator.backward(loss / len(micros))
                    for name, value in named.items():
                        window.add(name, value)
                norm, skipped = player.optimizer.step()
                player.ema.update(player.optimizer.steps - 1)
                window.add(f"{player.name}_grad_norm", norm)
                window.skipped.append((images, skipped))
                in_a_row[player.name] = (in_a_row[player.name] + skipped) * skipped
            window.rows[images] = torch.cat([micro["row"] for micro in micros])
            images, steps = images + per_step, steps + 1
            if due(config.log_every):
                means = window.means()
                _report_skipped(window, in_a_row, config.max_skipped_steps)
                speed = (images - images_start) / (time.perf_counter() - clock_start)
                lr = {"lr": task.players[0].optimizer.lr, "images_per_second": speed}
                journal.write(images, {**means, **lr})
                show(images, means, speed)
                window = _Window()
            if due(config.validate_every):
                measures = task.held_out()
                journal.write(images, measures)
                journal.say(f"{images:,} images: " + ", ".join(f"{k} {v:.4g}" for k, v in measures.items()))
            if due(config.sample_every) and accelerator.is_main_process:
                task.sample(run / "samples" / f"images_{images:09d}.png")
            asked = _anyone(bool(stop), accelerator)
            if due(config.checkpoint_every) or asked:
                save()
            if asked and images < config.images:
                journal.say(f"stopped at {images} images, all is saved; the same command goes on from here")
                raise Interrupted(75)
    return True


# --- parts -----------------------------------------------------------------------------------------------------------


def _as_is(batch: Batch) -> Batch:
    return batch


def _bear_one_signal(_worker: int) -> None:
    """A signal often goes to all processes of a run; the loader's must live until the step has its pictures."""

    def note(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def _batches(loader: DataLoader, device: torch.device) -> Generator[Batch, None, None]:
    """On the device. Closing it ends the loader's processes."""
    for batch in loader:
        yield {k: v.to(device, non_blocking=True) for k, v in batch.items()} if device.type != "cpu" else batch


def _bare(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _tensors(task: Task) -> dict[str, dict[str, Tensor]]:
    """Everything that a run needs to go on, by file."""
    files: dict[str, dict[str, Tensor]] = {"rng": {"cpu": torch.get_rng_state()}}
    for player in task.players:
        files[player.name] = dict(_bare(player.module).named_parameters())
        files[f"{player.name}_optimizer"] = player.optimizer.tensors()
        files[f"{player.name}_ema"] = player.ema.state_dict()
    return files


def _resume(task: Task, run: Path, inputs: dict[str, str]) -> tuple[int, int]:
    found = checkpoint.listed(run / "checkpoints")
    if not found:
        return 0, 0
    tensors, state = checkpoint.load(found[-1])
    changed = [k for k in inputs if state["inputs"].get(k) != inputs[k]]
    if changed:
        raise checkpoint.CheckpointError(
            f"{found[-1]}: was trained from another {changed[0]} than the one there now; choose another output_dir, "
            f"or delete {run} to train anew"
        )
    for player in task.players:
        own = dict(_bare(player.module).named_parameters())
        there = {(name, x.shape) for name, x in tensors[player.name].items()}
        differing = sorted(there ^ {(name, p.shape) for name, p in own.items()})
        if differing:
            raise checkpoint.CheckpointError(
                f"{found[-1]}: {player.name}.safetensors does not fit, first: {differing[0][0]}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[player.name][name])
        player.optimizer.load(tensors[f"{player.name}_optimizer"], state["optimizer_steps"][player.name])
        player.ema.load_state_dict(tensors[f"{player.name}_ema"])
    torch.set_rng_state(tensors["rng"]["cpu"])
    log.info("going on from %s", found[-1])
    return state["images"], state["steps"]


def _report_skipped(window: _Window, in_a_row: dict[str, Tensor], limit: int) -> None:
    flags = torch.stack([flag for _, flag in window.skipped]).tolist()
    bad = [images for (images, _), flag in zip(window.skipped, flags, strict=True) if flag]
    if not bad:
        return
    rows = window.rows[bad[-1]].tolist()
    message = (
        f"{len(bad)} of {len(flags)} updates skipped, no finite gradient; the last at image {bad[-1]}, rows {rows}"
    )
    log.warning(message)
    if max(count.item() for count in in_a_row.values()) >= limit:
        raise Diverged(
            f"{message}; {limit} in a row: the run stops. Lower optimizer.learning_rate or look at these rows"
        )


def _anyone(asked: bool, accelerator: Accelerator) -> bool:
    """All processes stop together."""
    if accelerator.num_processes == 1:
        return asked
    flags = accelerator.gather(torch.tensor([asked], device=accelerator.device))
    return bool(cast(Tensor, flags).any())


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C; the second one leaves at once."""
    seen: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    old = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _told_by(line: str, images: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["images"] <= images
    except ValueError:  # of a write that was cut short
        return False


class _Journal:
    """``RUN/log/metrics.jsonl`` and the progress bar, of the main process alone.

    Args:
        images: where the run starts; what a killed one wrote of later images goes.
    """

    def __init__(self, run: Path, accelerator: Accelerator, images: int):
        self.run, self.main = run, accelerator.is_main_process
        self.file = run / "log" / "metrics.jsonl"
        self.console = Console(stderr=True)
        if self.main:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.is_file():
                lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                partial = self.file.with_suffix(".partial")
                partial.write_text("".join(x for x in lines if _told_by(x, images)), encoding="utf-8")
                partial.replace(self.file)

    def write(self, images: int, values: dict[str, float]) -> None:
        if self.main and values:
            with self.file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"images": images, **values}) + "\n")

    def say(self, text: str) -> None:
        if self.main:
            self.console.print(text)

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[Callable[[int, dict[str, float], float], None]]:
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

            def show(images: int, means: dict[str, float], speed: float) -> None:
                bar.update(
                    task,
                    completed=min(images, total),
                    loss=f"loss {means.get('loss', math.nan):.4f}",
                    speed=f"{speed:.0f} images/s",
                )

            yield show
