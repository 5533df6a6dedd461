"""The only loop. It counts images, takes an ordered list of players, and knows no task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from . import checkpoint, measure, sharded, state
from .ema import EMA
from .fit import ConfigError
from .gradients import OutOfMemory, gradients, naming_memory, parted, smaller_state
from .guards import Diverged, Interrupted, Stages, StopSignals, Watchman
from .journal import Journal, Window
from .loader import Batch, Feed
from .mirror import Mirror
from .optim import Guarded
from .processes import LostProcess, Pulse, agreed, all_or_none, lost_peer
from .schema import Train
from .stragglers import StepTimes

__all__ = ["Batch", "Diverged", "Interrupted", "OutOfMemory", "Player", "Task", "train", "whole"]


@dataclass
class Player:
    """One network that learns.

    Args:
        name: of its checkpoint file and log keys.
        module: what trains, wrapped for several processes; ``loss`` must run through it.
        loss: batch, images seen before this step -> (scalar, named scalars for the log). What one player leaves in the
            batch for the next (a dict) lives until the step ends.
        optimizer: steps it.
        ema: its averaged weights.
        start: images seen before it joins.
    """

    name: str
    module: nn.Module
    loss: Callable[[Batch, int], tuple[Tensor, dict[str, Tensor]]]
    optimizer: Guarded
    ema: EMA
    start: int = 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the network bears the weights that samples and exports use, and what is compiled of it
        (``train.compile``) runs uncompiled: other sizes than the training step's would each be compiled anew."""
        try:
            with self.optimizer.evaluating(), self.ema.swapped(), torch.compiler.set_stance("force_eager"):
                sharded.reshard(self.module)
                yield
        finally:
            sharded.reshard(self.module)


@contextmanager
def whole(players: Sequence[Player], accelerator: Accelerator) -> Iterator[None]:
    """Within this context the main process can call, sample and export the networks alone. Where their weights are
    shared out, all processes enter together, and it gets whole ones, with the averages in them; it needs room for them.
    """
    with ExitStack() as stack:
        for player in players:
            if sharded.is_split(dict(player.module.named_parameters())):
                with player.averaged():
                    here = sharded.whole(sharded.bare(player.module), accelerator.device, accelerator.is_main_process)
                    stack.enter_context(here)
        yield


class Task(Protocol):
    """What the loop is handed. ``players`` are in the order in which they move; ``rows`` as ``Feed`` takes them."""

    players: Sequence[Player]
    rows: Dataset

    def held_out(self) -> dict[str, float]:
        """Measures on pictures that training never sees, with the averaged weights; all processes ask together."""
        ...

    def sample(self, file: Path) -> None:
        """Draw a grid of pictures, with the averaged weights; the main process alone asks."""
        ...

    def export(self) -> None:
        """Write what the run made to its ``pipeline`` folder."""
        ...


def train(
    task: Task,
    config: Train,
    *,
    run: Path,
    seed: int,
    accelerator: Accelerator,
    inputs: dict[str, str],
    resume: str | Path = "auto",
    flops: int | None = None,
) -> bool:
    """Train until ``config.images`` have been seen.

    Args:
        inputs: hashes of what the run builds on; a checkpoint that was made from others is refused.
        resume: ``auto``: from the newest checkpoint in ``run``, if any; ``never``; or the folder of a checkpoint.
        flops: of one image's training step, to log what share of the devices is used.
    Returns:
        True if any step was made.
    Raises:
        Interrupted: SIGTERM, SIGUSR1 or Ctrl-C before the last step; the state is saved.
        Diverged: too many steps in a row without a finite gradient or with a spike; the rows are named.
        OutOfMemory: a step does not fit; what would fit is named.
        CheckpointError: the checkpoint is damaged or belongs to other inputs.
        LostWorker: a process that loads the data died or hung.
        LostProcess: another process is dead or stuck, and which.
        OSError: a checkpoint cannot be written; the older ones are whole.
    """
    times, root, main = StepTimes(accelerator), run / "checkpoints", accelerator.is_main_process
    players = [replace(player, loss=times.watch(player.loss)) for player in task.players]
    clock = _clock(task.rows, seed, config.batch_size)
    start = agreed(lambda: checkpoint.chosen(root, resume), accelerator)
    now = state.restored(players, start, inputs, clock, accelerator, seed)
    if start is not None and resume != "auto" and main:
        checkpoint.set_aside(root, now.images)
    if now.images >= config.images:
        return False
    per_step = config.batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    stop_at = now.images + math.ceil((config.images - now.images) / per_step) * per_step
    feed = Feed(task.rows, config, seed, now.images, stop_at, accelerator, now.feed)
    window, watchman = Window(now.window, accelerator.device), Watchman(config, accelerator, now.watch)
    journal, clock_start, images_start = Journal(run, accelerator, now.images), time.perf_counter(), now.images
    split = any(sharded.is_split(dict(p.module.named_parameters())) for p in players)
    if split and config.async_checkpoint:
        raise ConfigError("train.async_checkpoint: not where the weights are shared out (FSDP2, ZeRO's stage 3)")
    keep = checkpoint.Keep(config.keep_last, config.keep_every)
    mirror = Mirror(config.mirror, run) if config.mirror and main else None
    saver = checkpoint.Saver(root, keep, config.async_checkpoint, mirror)
    for player in players if main else ():
        player.ema.forget_after(run / "ema" / player.name, now.images)

    def save(best: Any = None) -> None:
        now.watch, now.feed, now.window = watchman.state(), feed.state(), window.sums
        files, rest = state.gathered(players, now, clock, accelerator)
        journal.settle()
        error = None
        try:
            if main or split:
                saver.save(now.images, files, rest, best)
        except OSError as caught:
            error = caught
        all_or_none(error, accelerator)

    def due(every: int) -> bool:
        """The clock has just passed a multiple of ``every``, or reached the end."""
        return now.images // every != (now.images - per_step) // every or now.images >= config.images

    with (
        StopSignals().caught() as told,
        Pulse(run / "log", accelerator, 60 * config.timeout_minutes).beating() as pulse,
        _leaving_together(pulse),
        closing(saver),
        feed.naming_lost_workers(),
        closing(feed.batches()) as batches,
        journal.progress(config.images, now.images) as show,
    ):
        while now.images < config.images:
            pulse.at("loading pictures")
            with times.loading():
                micros = [next(batches) for _ in range(config.gradient_accumulation_steps)]
            pulse.at("waiting for the pictures of the others")
            times.meet()
            rows = torch.cat([micro["row"] for micro in micros])
            pieces = [piece for micro in micros for piece in parted(micro, now.pieces)]
            moved: dict[str, tuple[Tensor, Tensor]] = {}
            for player in players:
                if now.images < player.start:
                    continue
                pulse.at(f"training {player.name}")
                loss, pieces = gradients(player, pieces, now.images, accelerator, config, window)
                times.reduced()
                what = f"in the optimizer's step of {player.name} at image {now.images}"
                with naming_memory(what, partial(smaller_state, player)):
                    norm, skipped = player.optimizer.step()
                    player.ema.update(player.optimizer.steps - 1, now.images + per_step, skipped)
                window.add({f"{player.name}_grad_norm": norm}, accelerator.num_processes)
                moved[player.name] = (loss, skipped)
            now.pieces = max(now.pieces, len(pieces) // len(micros))
            before, now.images, now.steps = now.images, now.images + per_step, now.steps + 1
            asked = watchman.look(before, bool(told), rows, moved)
            times.stepped()
            if asked or due(config.checkpoint_every) or (config.keep_best and due(config.validate_every)):
                asked |= watchman.settle()  # a checkpoint knows its last step, which is read one step late on a GPU
            if due(config.log_every):
                means = window.means(accelerator)
                speed = (now.images - images_start) / (time.perf_counter() - clock_start)
                timed = {"images_per_second": speed, **measure.work(flops, speed, accelerator)}
                waits, by_process = times.read()
                journal.write(now.images, {**means, "lr": players[0].optimizer.lr, **timed, **waits})
                journal.write_waits(now.images, by_process)
                show(now.images, means, speed)
                window = Window()
            for player in players if main or split else ():
                if player.ema.snapshot_due(before, now.images):
                    player.ema.write_snapshot(run / "ema" / player.name, now.images, write=main)
            best = None
            if due(config.validate_every):
                pulse.at("validating")
                with naming_memory(f"while validating at image {now.images}", _room):
                    measures = task.held_out()
                journal.write(now.images, measures)
                told_of = {k: v for k, v in measures.items() if "_at_" not in k}
                journal.say(f"{now.images:,} images: " + ", ".join(f"{k} {v:.4g}" for k, v in told_of.items()))
                best = _best(measures, config, now)
            if due(config.sample_every):
                pulse.at("drawing samples")
                with naming_memory(f"while drawing samples at image {now.images}", _room), whole(players, accelerator):
                    if main:
                        sheet = run / "samples" / f"images_{now.images:09d}.png"
                        task.sample(sheet)
                        journal.show(now.images, sheet)
                times.pause()
            if due(config.checkpoint_every) or asked or best:
                pulse.at("saving")
                save(best)
            if asked and now.images < config.images:
                _written(saver, accelerator)
                journal.say(
                    f"stopped at {now.images} images, all is saved; the same command goes on from here "
                    f"(or: ldm train {run}/config.yaml)"
                )
                raise Interrupted(75)
            if asked:
                Stages.asked = str(run)
    return True


# --- parts -----------------------------------------------------------------------------------------------------------


def _clock(rows: Dataset, seed: int, batch_size: int) -> dict[str, Any]:
    """What decides which row an image shows."""
    if isinstance(rows, IterableDataset):
        return {"data.streaming": True, "seed": seed}
    clock: dict[str, Any] = {"number of rows": len(rows), "seed": seed}  # type: ignore[arg-type]
    buckets = getattr(rows, "bucket", None)
    several = buckets is not None and (buckets != buckets[:1]).any()
    return {**clock, "train.batch_size": batch_size} if several else clock


def _best(measures: dict[str, float], config: Train, now: state.Progress) -> dict[str, Any] | None:
    """What to note of the measures if they are the best so far.

    Raises:
        ValueError: the metric is not among them.
    """
    if not config.keep_best:
        return None
    wanted = [config.best_metric] if config.best_metric else ["held_out_loss", "held_out_psnr"]
    metric = next((name for name in wanted if name in measures), None)
    if metric is None:
        raise ValueError(f"train.best_metric {wanted[0]}: is not measured; choose of {', '.join(measures)}")
    value = measures[metric]
    higher = metric.endswith(("psnr", "ssim", "accuracy"))
    if not math.isfinite(value) or (now.best and (value <= now.best[0] if higher else value >= now.best[0])):
        return None
    now.best = [value, now.images]
    return {"metric": metric, "value": value, "images": now.images}


def _room() -> str:
    """The end of the message where validation or a grid does not fit."""
    return (
        "it holds the weights twice and the average, and the encoders: set ema.device: cpu, or draw fewer pictures "
        "(sample.prompts); the newest checkpoint is whole"
    )


def _written(saver: checkpoint.Saver, accelerator: Accelerator) -> None:
    """Nobody leaves before the checkpoint is on the disk: a launcher ends the others when the first has left."""
    error = None
    try:
        saver.wait()
    except OSError as caught:
        error = caught
    all_or_none(error, accelerator)


@contextmanager
def _leaving_together(pulse: Pulse) -> Iterator[None]:
    """Where one process lacks memory, all leave with its message; a collective that breaks off says which process it
    missed."""
    try:
        yield
    except OutOfMemory as error:
        pulse.leave(str(error))
        raise
    except RuntimeError as error:
        if pulse.world > 1 and lost_peer(error):
            if text := pulse.left():
                raise OutOfMemory(text) from error
            raise LostProcess(f"{pulse.missing(wait=True)} ({str(error).splitlines()[0]})") from error
        raise
