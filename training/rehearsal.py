"""A rehearsal is the run itself, in a folder that goes away: the same task, loop, loader, optimizer, validation, sample
grid, checkpoint and export, on some of the rows, for a few steps, on the device that will train. It is timed.

Where that would take long (a large network on a CPU), a brief one runs each kind of work once: a picture is encoded,
one picture is trained on, one step of the sampler draws one picture. The rest is scaled up from these.
"""

from __future__ import annotations

import gc
import io
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stderr
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.utils.data import IterableDataset

from . import measure, zero
from .arithmetic import Work, calls_at_once
from .schema import AdaptConfig, AutoencoderConfig, Config, LatentRun

if TYPE_CHECKING:
    from .loop import Player

STEPS = 6  # of a rehearsal: the first one warms up
ROWS = 64  # at least, of which the cache is made
DRAWN = 2  # steps of the sampler: the others take as long as the last
NEVER = 10**15  # images
LONG = 30.0  # seconds: a rehearsal that would take longer is a brief one
# FLOPs for each pixel of Stable Diffusion's autoencoder, counted at 512 x 512: 1.1 and 2.5 TFLOP.
ENCODER_FLOPS, DECODER_FLOPS = 4.2e6, 9.5e6
OPENING = 10.0  # seconds to read and hash a base of about 1 billion parameters


@dataclass(frozen=True)
class Rehearsal:
    """Of a run, in seconds and bytes.

    Attributes:
        step: of one process, all accumulated micro-batches and all players together.
        alone: the same before the players join that start later.
        memory: most in use at any time.
        once: each time that it is done: start, validation, samples, checkpoint, export.
        decoded, picture, caption: one of them, decoded or encoded for the cache; 0 where it is not cached.
        spent: by the whole run, by what it is spent on.
        brief: each kind of work ran once, with a batch of one picture.
    """

    step: float
    alone: float
    memory: int
    once: dict[str, float] = field(default_factory=dict)
    decoded: float = 0.0
    picture: float = 0.0
    caption: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    brief: bool = False

    def seconds(self, config: Config, world: int, pictures: int, captions: int) -> dict[str, float]:
        """What the whole run will take, by what it is spent on.

        Args:
            world: processes, which share out the cache.
            pictures, captions: different ones that the cache will hold; a mirror image is a picture.
        """
        train = config.train
        per_step = train.batch_size * train.gradient_accumulation_steps * world
        steps = math.ceil(train.images / per_step)
        alone = math.ceil(min(joining(config), train.images) / per_step)
        sides = 1 + config.data.random_flip  # decoded once for both
        cache = max(self.decoded / sides, self.picture) * pictures + self.caption * captions
        found = {"steps": self.alone * alone + self.step * (steps - alone), "cache": cache / world}
        found |= {name: self.once.get(name, 0.0) for name in ("start", "export")}
        every = {
            "validation": train.validate_every, "samples": train.sample_every, "checkpoint": train.checkpoint_every,
        }  # fmt: skip
        return found | {k: self.once.get(k, 0.0) * times_due(n, per_step, steps) for k, n in every.items()}


def expected_seconds(config: Config, work: Work, rows: int, repeated: bool, world: int) -> dict[str, float]:
    """What steps, validation and samples of the whole run take, by arithmetic alone.

    Args:
        rows: held-out pictures.
        repeated: they are the training pictures, and measured once.
    """
    train = config.train
    per_step = train.batch_size * train.gradient_accumulation_steps * world
    steps = math.ceil(train.images / per_step)
    spent = {"steps": steps * per_step / world * work.training}
    if isinstance(config, LatentRun):
        once = {
            "validation": forward_passes(config, rows, repeated) * work.forward / world,
            "samples": _drawn(config) * config.sample.num_inference_steps * work.call(config),
        }
        every = {"validation": train.validate_every, "samples": train.sample_every}
        spent |= {name: once[name] * times_due(n, per_step, steps) for name, n in every.items()}
    return spent


def rehearsal_seconds(config: Config, work: Work, rows: int, repeated: bool) -> float:
    """What ``rehearse`` takes in one process, by arithmetic alone."""
    train = config.train
    seconds = STEPS * train.batch_size * train.gradient_accumulation_steps * work.training
    if isinstance(config, LatentRun):
        seconds += forward_passes(config, rows, repeated) * work.forward + DRAWN * _drawn(config) * work.call(config)
    return seconds


def forward_passes(config: LatentRun, rows: int, repeated: bool) -> int:
    """Pictures that go through the network in one validation."""
    count = min(rows, config.validation.rows) * config.validation.levels
    return count if repeated else 2 * count


def _drawn(config: LatentRun) -> int:
    """Pictures in a grid of samples."""
    return len(config.sample.prompts) or 16


def times_due(every: int, per_step: int, steps: int) -> int:
    """How often the loop does what is due whenever the clock passes a multiple of ``every``, and at the end."""
    end = per_step * steps
    crossed = min(steps, end // every)
    return crossed if end // every != (end - per_step) // every else crossed + 1


def joining(config: Config) -> int:
    """Images after which all players train."""
    if isinstance(config, AutoencoderConfig) and config.loss.gan_weight:
        return config.loss.gan_start
    return 0


def rehearse(config: Config, train_rows: Any, test_rows: Any, accelerator: Accelerator) -> Rehearsal:
    """A few steps of the run in ``config.output_dir``, and all that it does beside them, once. Tells nothing.

    What it makes stays there, untrained, for a run that builds on it.

    Raises:
        ConfigError: a part that the run builds on cannot be opened.
        and what ``loop.train`` raises.
    """
    from . import loop
    from .run import build

    how, run, device = config.train, Path(config.output_dir), accelerator.device
    per_step = how.batch_size * how.gradient_accumulation_steps * accelerator.num_processes
    steps, start, left_out = STEPS, joining(config), 0.0
    if isinstance(config, AutoencoderConfig) and 0 < start < how.images:
        steps, start = 2 * STEPS, STEPS * per_step
        config = config.model_copy(update={"loss": config.loss.model_copy(update={"gan_start": start})})
    if isinstance(config, LatentRun):
        own = config.cache.model_copy(update={"dir": None})  # one that others use is left alone
        fewer = min(DRAWN, config.sample.num_inference_steps)
        sample = config.sample.model_copy(update={"num_inference_steps": fewer})
        left_out = config.sample.num_inference_steps / fewer - 1
        config = config.model_copy(update={"cache": own, "sample": sample})
        train_rows, test_rows = (_some(rows, max(2 * per_step, ROWS)) for rows in (train_rows, test_rows))
    never = {f"{name}_every": NEVER for name in ("log", "validate", "sample", "checkpoint")}  # at the end alone
    short = how.model_copy(update={"images": steps * per_step, "async_checkpoint": False, "mirror": None, **never})
    run.mkdir(parents=True, exist_ok=True)
    measure.reset_peak(device)
    torch.manual_seed(config.seed)
    with redirect_stderr(io.StringIO()):  # bars, and lines that the run will say again
        began = time.perf_counter()
        task = build(config, train_rows, test_rows, run, accelerator)
        built = time.perf_counter()
        encoding = _encoding(task, train_rows) if isinstance(config, LatentRun) else (0.0, 0.0, 0.0)
        entered = time.perf_counter()
        timed = Timed(task, device)
        loop.train(timed, short, run=run, seed=config.seed, accelerator=accelerator, inputs={})
        timed.once["checkpoint"] = time.perf_counter() - timed.last
        if timed.drawing:
            timed.once["samples"] += left_out * len(timed.drawing) * timed.drawing[-1]
        shared = accelerator.is_fsdp2 or zero.shares_weights(accelerator)
        if not shared and accelerator.is_main_process:
            timed.export()
    accelerator.wait_for_everyone()
    memory = measure.peak(device)
    step, alone, first = timed.step(start), timed.step(0, start), timed.starts[min(1, len(timed.starts) - 1)][1]
    if how.num_workers:  # those that fill their queues while the first steps warm up hide what they take
        waits = _loading(task.rows, how.batch_size) * how.gradient_accumulation_steps / how.num_workers
        step, alone = max(step, waits), max(alone, waits)
    timed.once["start"] = max(0.0, built - began + first - entered - alone)
    found = Rehearsal(step, alone, memory, timed.once, *encoding)
    accelerator.free_memory()
    del task, timed
    gc.collect()
    return found


def rehearse_briefly(
    config: LatentRun,
    train_rows: Any,
    test_rows: Any,
    accelerator: Accelerator,
    work: Work,
    say: Callable[[str], None],
) -> Rehearsal:
    """One picture encoded, one trained on, one drawn by one step of the sampler, in one process. Nothing is validated,
    and no checkpoint is written.

    Args:
        work: seconds by arithmetic, for the time that is left.
        say: takes a line of progress.
    Raises:
        ConfigError: a part that the run builds on cannot be opened.
        and what a step raises.
    """
    from .gradients import gradients
    from .journal import Window
    from .loader import Feed
    from .run import build

    device, how, pixels = accelerator.device, config.train, config.data.resolution**2
    one = how.model_copy(
        update={"images": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "num_workers": 0, "mirror": None}
    )
    update = {
        "cache": config.cache.model_copy(update={"dir": None}),  # one that others use is left alone
        "sample": config.sample.model_copy(
            update={"num_inference_steps": 1, "prompts": config.sample.prompts[:1]}
        ),
        "train": one,
    }  # fmt: skip
    single: Any = config.model_copy(update=update)
    some, held = _some(train_rows, 1), _some(test_rows, 1)
    run = Path(config.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    measure.reset_peak(device)
    torch.manual_seed(config.seed)
    opening = OPENING + 2 * ENCODER_FLOPS * pixels / work.speed
    drawing = work.call(config) + DECODER_FLOPS * pixels / work.speed

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    left = duration(opening + work.training + drawing)
    say(f"check, 1 of 3: opens the parts and encodes one picture (about {left} left)")
    with redirect_stderr(io.StringIO()):
        began = now()
        task = build(single, some, held, run, accelerator)
        built = now()
        decoded, picture, caption = _encoding(task, some, passes=1)
    say(f"check, 2 of 3: trains on one picture (about {duration(work.training + drawing)} left)")
    with (
        redirect_stderr(io.StringIO()),
        closing(Feed(task.rows, one, config.seed, 0, 1, accelerator, None).batches()) as batches,
    ):
        player = task.players[0]
        micro = next(batches)
        before = now()
        gradients(player, [micro], 0, accelerator, one, Window())
        trained = now()
        _, skipped = player.optimizer.step()
        player.ema.update(player.optimizer.steps - 1, 1, skipped)
        stepped = now()
    slower = (trained - before) / work.training  # than arithmetic has it
    say(f"check, 3 of 3: draws one picture by one step (about {duration(drawing * slower)} left)")
    with redirect_stderr(io.StringIO()):
        timed = Timed(task, device)
        timed.sample(run / "samples" / "one.png")
        call, rest = sum(timed.drawing), timed.once["samples"] - sum(timed.drawing)
        small = isinstance(config, AdaptConfig) and not config.whole
        if small:  # a whole pipeline takes minutes to write and compare
            timed.export()
    prompts, rows, repeated = _drawn(config), len(test_rows), getattr(task, "same_rows", False)
    forward = call / calls_at_once(config)
    once = {
        "start": max(0.0, built - began - picture - caption),
        "validation": forward_passes(config, rows, repeated) * forward,
        "samples": prompts * (config.sample.num_inference_steps * call + rest),
        "export": timed.once.get("export", 0.0),
    }
    step = how.gradient_accumulation_steps * how.batch_size * (trained - before) + stepped - trained
    memory = measure.peak(device)
    accelerator.free_memory()
    del task, timed, player, micro
    gc.collect()
    return Rehearsal(step, step, memory, once, decoded, picture, caption, brief=True)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _some(rows: Any, count: int) -> Any:
    return rows.head(count) if hasattr(rows, "head") else rows


class Timed:
    """A task whose moves are timed: when each step begins, and how long the rest takes.

    A step is not waited for: the loop itself lets the device be one step ahead of it and no more, so that from the
    third on steps begin as fast as the device makes them.
    """

    def __init__(self, task: Any, device: torch.device):
        self.task, self.device, self.rows = task, device, task.rows
        self.starts: list[tuple[int, float]] = []  # images seen before the step, when it began
        self.once: dict[str, float] = {}
        self.drawing: list[float] = []  # what each call of the network took while samples were drawn
        self.last = 0.0
        first, *others = task.players
        self.players: Sequence[Player] = [replace(first, loss=self._stamped(first.loss)), *others]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _stamped(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        def stamped(batch: Any, images: int) -> Any:
            if not self.starts or self.starts[-1][0] != images:  # the first micro-batch of a step
                self.starts.append((images, time.perf_counter()))
            return loss(batch, images)

        return stamped

    def step(self, first: int, stop: int | None = None) -> float:
        """Seconds of a step that begins at ``first`` images or later and before ``stop``: the median, without the
        first one. Without any such step those of all."""
        times = [t for images, t in self.starts if images >= first and (stop is None or images <= stop)]
        if len(times) < 3:
            times = [t for _, t in self.starts]
        return statistics.median([after - before for before, after in pairwise(times)][1:])

    def _timed(self, name: str, move: Callable[[], Any]) -> Any:
        start = self._now()
        found = move()
        self.last = self._now()
        self.once[name] = self.last - start
        return found

    def held_out(self) -> dict[str, float]:
        return self._timed("validation", self.task.held_out)

    def sample(self, file: Path) -> None:
        net = getattr(self.task, "net", None)
        if net is None:
            return self._timed("samples", lambda: self.task.sample(file))
        before = net.register_forward_pre_hook(lambda *_: self.drawing.append(-self._now()))
        after = net.register_forward_hook(self._called)
        try:
            self._timed("samples", lambda: self.task.sample(file))
        finally:
            before.remove()
            after.remove()

    def _called(self, *_: Any) -> None:
        self.drawing[-1] += self._now()

    def export(self) -> None:
        self._timed("export", self.task.export)


# --- parts of a step, and of the cache -------------------------------------------------------------------------------


def _loading(rows: Any, batch: int) -> float:
    """Seconds that one process takes to make a micro-batch."""
    if isinstance(rows, IterableDataset):
        made = iter(rows)
        next(made)  # it works one ahead
        began = time.perf_counter()
        for _ in range(2):
            next(made)
        made.close()  # type: ignore[attr-defined]
        return (time.perf_counter() - began) / 2
    bucket = getattr(rows, "bucket", None)
    same = range(len(rows)) if bucket is None else (bucket == bucket[0]).nonzero()[0].tolist()
    pairs = [(i, same[i % len(same)]) for i in range(batch)]
    times = []
    for _ in range(2):
        began = time.perf_counter()
        rows.__getitems__(pairs)
        times.append(time.perf_counter() - began)
    return times[-1]


@torch.no_grad()
def _encoding(task: Any, rows: Any, passes: int = 2) -> tuple[float, float, float]:
    """Seconds to decode a picture, to encode one, and to encode a caption, of those that the cache holds.

    Args:
        passes: the last one counts; one is enough where the encoders have just run.
    """
    from .batches import to_unit
    from .cache import BATCH, PIXELS

    if isinstance(rows, IterableDataset) or not any(task.cached.values()):
        return 0.0, 0.0, 0.0
    encoders, h, w = task.encoders, *rows.shapes[rows.bucket[0]]
    same = (rows.bucket == rows.bucket[0]).nonzero()[0][: max(1, min(BATCH, PIXELS // (h * w)))].tolist()
    texts = [text for i in range(min(len(rows), BATCH)) for text in rows.texts[i]][:BATCH]
    picture = caption = decoded = 0.0
    for _ in range(passes):
        began = time.perf_counter()
        pictures = rows.pictures(same)
        decoded = (time.perf_counter() - began) / len(same)
        if task.cached["vae"]:
            vae = encoders.vae
            began = time.perf_counter()
            vae.encode(to_unit(pictures).to(vae.device, vae.dtype)).mean.cpu()  # waits for it
            picture = (time.perf_counter() - began) / len(same)
        if task.cached["text"]:
            text = encoders.text
            began = time.perf_counter()
            text.encode(texts).tokens.cpu()
            text.count_tokens(texts)
            caption = (time.perf_counter() - began) / len(texts)
    encoders.free(**task.cached)
    return decoded * task.cached["vae"], picture, caption
