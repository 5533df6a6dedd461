"""What can be told before anything is spent: sizes, FLOPs, memory and time, from arithmetic and a rehearsal."""

from __future__ import annotations

import math
import random
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from rich.table import Table
from torch.utils.data import IterableDataset

from . import device, measure, processes, zero
from .arithmetic import Memory, Work, parameters, training_flops, training_memory
from .base import frozen_bytes
from .config import relocate
from .fail_together import all_fail_together
from .fit import ConfigError
from .rehearsal import (
    LONG,
    Rehearsal,
    duration,
    expected_seconds,
    joining,
    rehearsal_seconds,
    rehearse,
    rehearse_briefly,
)
from .schema import AdaptConfig, AutoencoderConfig, Config, DiffusionConfig, LatentRun
from .sizes import Sizes, network_of, sizes

GIB = 2**30
ROOM = 0.9  # of the memory that is free: more is not tried
REACHED = 0.45  # of the speed of matrix products, by networks: 0.51 to 0.58 measured on CPUs, less on GPUs
COUNTED = 1_000_000  # rows whose captions are compared; of more than these every row's count
Split = tuple[Any, Any]  # training and held-out rows, as ``run.open_data`` gives them


def precision(asked: str) -> str:
    """``no``, ``bf16`` or ``fp16``; ``auto`` is bf16 where the hardware has units for it: emulated, it is slower than
    float32."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"


def report(
    configs: Sequence[Config],
    *,
    earlier: Sequence[Config] = (),
    console: Console | None = None,
    opened: dict[str, Split] | None = None,
) -> list[Rehearsal | None]:
    """Open the data, rehearse each run, and print two tables of each: a forecast by arithmetic, after seconds, and
    what was measured. Nothing is left behind, and nothing that comes after it notices: of several processes all ask
    together, and the first one prints. All processes get the same answer: the least free memory decides, and an error
    in one ends all. A signal ends it at once.

    Args:
        earlier: configs that these build on, whose runs are there.
        opened: filled with the rows that were looked at, for ``run.train_all``.
    Returns:
        The rehearsals; None of a run that builds on one that is not made.
    Raises:
        DoesNotFit: after all tables are printed; each run without room is named, and what would fit.
        ConfigError, DataError: a run cannot be made; the key, file or row is named.
        Interrupted: SIGTERM, SIGUSR1 or Ctrl-C.
    """
    from .guards import leaving
    from .run import open_data, source_of

    if not configs:
        return []
    opened = {} if opened is None else opened
    found: list[Rehearsal | None] = []
    too_large: list[str] = []
    device.prepare(configs)
    with (
        leaving("stopped in the check, before the training: nothing has begun"),
        _undisturbed(),
        _room(configs) as room,
        all_fail_together(_accelerator(configs[0])),
    ):
        for i, config in enumerate(configs):
            before = [*earlier, *configs[:i]]
            key, began = source_of(config, before), time.perf_counter()
            rows = opened.get(key) or open_data(config, before, draw=False)
            if not _draws(config):  # else there are more rows when the run begins
                opened[key] = rows
            opening = time.perf_counter() - began
            inner = config
            for j, other in enumerate(configs[:i]):
                _, inner = relocate([other, inner], room / str(j))
                inner = inner.model_copy(update={"output_dir": config.output_dir})
            (inner,) = relocate([inner], room / str(i))
            accelerator = _accelerator(config)
            telling = _Telling(config, before, rows, accelerator)
            with telling.printed(console or Console(quiet=not accelerator.is_main_process)):
                missing = [c.output_dir for c, made in zip(configs, found, strict=False) if made is None]
                missing += [c.output_dir for c in earlier if not (Path(c.output_dir) / "pipeline").is_dir()]
                found.append(telling.tell(inner, missing, opening))
            too_large += [f"{config.output_dir}: {telling.too_large}"] if telling.too_large else []
    if too_large:
        raise DoesNotFit("\n".join([*too_large, "nothing is begun; `ldm train --no-check` trains all the same"]))
    return found


class DoesNotFit(ConfigError):
    """A training step takes more memory than is free on the device."""


class _Telling:
    """The table of one run.

    Attributes:
        too_large: why the run does not fit, and what would; None where it fits.
    """

    def __init__(self, config: Config, earlier: Sequence[Config], rows: Split, accelerator: Accelerator):
        self.config, self.earlier, self.rows, self.accelerator = config, earlier, rows, accelerator
        self.mixed, self.device = precision(config.train.mixed_precision), accelerator.device
        self.world = config.train.processes or accelerator.num_processes
        self.too_large: str | None = None
        self.table = Table(title=f"{config.output_dir}: {config.task}", show_header=False)
        self.console = Console(quiet=True)

    @contextmanager
    def printed(self, console: Console) -> Iterator[None]:
        """What is known is told, also where the rehearsal fails."""
        self.console = console
        try:
            yield
        finally:
            self._print()

    def _print(self, title: str | None = None) -> None:
        """The rows so far; those that follow go into a table of their own."""
        if self.table.row_count:
            self.console.print(self.table)
        self.table = Table(title=title, show_header=False)

    def tell(self, inner: Config, missing: Sequence[str], opening: float) -> Rehearsal | None:
        """Fill the table.

        Args:
            inner: the config with its folders where they go away.
            missing: folders of runs that made nothing to build on.
            opening: seconds that the data took.
        """
        config, add = self.config, self.table.add_row
        train, per_step = config.train, config.train.batch_size * config.train.gradient_accumulation_steps * self.world
        add("pictures", self._pictures())
        rows = None if isinstance(self.rows[0], IterableDataset) else len(self.rows[0])
        epochs = f", {train.images / rows:.1f} epochs" if rows else ""
        together = f" of {per_step:,}" if per_step > train.batch_size else ""
        add("length", f"{train.images:,} images, {math.ceil(train.images / per_step):,} steps{together}{epochs}")
        several = f", {self.world} processes" if self.world > 1 else ""
        add("device", f"{self.device}, {self.mixed if self.mixed != 'no' else 'float32'}{several}")

        build, forward = network_of(config, self.earlier)
        with torch.device("meta"):
            trained, frozen = parameters(build())
        flops = training_flops(build, forward)
        add("parameters", f"{trained / 1e6:.2f}M trained" + (f", {frozen / 1e6:.2f}M frozen" if frozen else ""))
        add("work", f"{flops / 1e9:,.1f} GFLOP an image, forward and backward")
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed)
        sharded = self.accelerator.is_fsdp2 or zero.asked()
        memory = training_memory(
            build, forward, train.batch_size, averaged=bool(config.ema_decay),
            accumulated=train.gradient_accumulation_steps > 1, replicated=self.world > 1 and not sharded,
            device_type=self.device.type, autocast=autocast, state_bytes=config.optimizer.state_bytes,
            frozen_bytes=self._frozen_bytes(),
        )  # fmt: skip
        if self.accelerator.is_fsdp2 or zero.shares_weights(self.accelerator):
            memory = memory.shared(self.accelerator.num_processes)
        add("memory of a step", _parted(memory))
        pictures = captions = 0
        if isinstance(config, LatentRun):
            pictures, captions, size = cached(config, sizes(config, self.earlier), self.rows)
            held = f"{_bytes(size)}, {pictures:,} pictures and {captions:,} captions" if size else "nothing"
            add("cache on disk", held)

        free, place = least_free(self.accelerator)
        if memory.total > ROOM * free:
            fits = what_would_fit(memory, config, ROOM * free)
            add("does not fit", f"{_bytes(free)} are free on {place}: {fits}")
            self.too_large = (
                f"does not fit: a step takes {_bytes(memory.total)}, more than {ROOM:.0%} of the "
                f"{_bytes(free)} that are free on {place}; {fits}"
            )
            return None
        if lacking := [name for name in _parts(config) if Path(name).resolve() in {Path(m).resolve() for m in missing}]:
            add("not rehearsed", f"{lacking[0]}, on which it builds, is not made")
            return None
        work = Work(flops, trained / (trained + frozen), REACHED * measure.matrix_speed(self.device, self.mixed))
        held, repeated = len(self.rows[1]), self._repeated
        if config.task in ("diffusion", "adapt"):  # the others' networks are small, and mostly not matrix products
            forecast = expected_seconds(config, work, held, repeated, self.world)
            add("forecast", f"about {_spent(forecast)}, by arithmetic")
        self._print(title=f"{config.output_dir}: measured")
        add = self.table.add_row
        train_rows: Any = self.rows[0]
        with device.kernels(config.train, len(train_rows.shapes)):
            if self._brief(rehearsal_seconds(config, work, held, repeated)):
                assert isinstance(inner, LatentRun)
                rehearsal = rehearse_briefly(inner, *self.rows, self.accelerator, work, self.console.print)
            else:
                with self.console.status(f"{config.output_dir}: rehearsing"):
                    rehearsal = rehearse(inner, *self.rows, self.accelerator)
        add("a step", self._step(rehearsal, flops))
        scope = "with a batch of one picture" if rehearsal.brief else "with everything that the run does"
        add("memory, measured", f"{_bytes(rehearsal.memory)} at most, {scope}")
        spent = {**rehearsal.seconds(config, self.world, pictures, captions), "data": opening}
        if drawn := _draws(config):
            add("class pictures", f"{drawn:,} to be drawn first")
            spent["class pictures"] = self._drawing(rehearsal, drawn)
        add("time", f"about {_spent(spent)}")
        return replace(rehearsal, spent=spent)

    def _brief(self, seconds: float) -> bool:
        """A rehearsal of so many seconds is cut short, where one process trains a denoiser on rows."""
        streamed, alone = isinstance(self.rows[0], IterableDataset), self.accelerator.num_processes == 1
        return isinstance(self.config, LatentRun) and alone and not streamed and not zero.asked() and seconds > LONG

    def _frozen_bytes(self) -> float:
        if not isinstance(self.config, AdaptConfig):
            return 4.0
        return frozen_bytes(self.config, self.device, self.mixed)

    def _drawing(self, rehearsal: Rehearsal, pictures: int) -> float:
        """Seconds that the class pictures will take, from those of the samples."""
        config = self.config
        assert isinstance(config, AdaptConfig) and config.prior
        each = rehearsal.once.get("samples", 0.0) / (len(config.sample.prompts) or 16)
        steps = config.prior.num_inference_steps / config.sample.num_inference_steps
        return each * steps * pictures / self.world

    def _pictures(self) -> str:
        train, test = self.rows
        side, shapes = self.config.data.resolution, train.shapes
        cut = f"{side} px" if len(shapes) == 1 else f"{len(shapes)} shapes of about {side} x {side} px"
        known = "streamed" if isinstance(train, IterableDataset) else f"{len(train):,}"
        return f"{known} to train on, {held_out_rows(self.config, train, test)}, {cut}"

    @property
    def _repeated(self) -> bool:
        """Validation shows the training pictures."""
        return repeated(self.config, *self.rows)

    def _step(self, rehearsal: Rehearsal, flops: int) -> str:
        train = self.config.train
        images = train.batch_size * train.gradient_accumulation_steps / rehearsal.step  # a second, in one process
        used = measure.utilisation(flops * images, self.device, self.mixed)
        share = f", {used:.0%} of what the device can do" if used else ""
        if used is None and self.device.type == "cuda" and self.mixed != "no":
            share = f", peak of {torch.cuda.get_device_name(self.device)} unknown"
        rate = images * self.world
        rate_text = f"{rate:,.1f}" if rate >= 1 else f"{rate:.2g}"
        speed = f"{rehearsal.step:.3f} s, {rate_text} images/s, {flops * images / 1e12:.2f} TFLOP/s"
        before = f"; {rehearsal.alone:.3f} s before the critic joins" if joining(self.config) else ""
        return f"{speed}{' each' if self.world > 1 else ''}{share}{before}"


def _draws(config: Config) -> int:
    """Class pictures that are missing."""
    from .prior import to_draw

    return to_draw(config) if isinstance(config, AdaptConfig) and config.prior else 0


def _parts(config: Config) -> list[str]:
    """Folders or hub names that a run builds on."""
    if isinstance(config, DiffusionConfig):
        return [config.vae.pretrained, config.text.pretrained]
    perceptual = (config.loss.perceptual or "") if isinstance(config, AutoencoderConfig) else ""
    return [perceptual.removeprefix("clip:")] if perceptual.startswith("clip:") else []


# --- arithmetic ------------------------------------------------------------------------------------------------------


def least_free(accelerator: Accelerator) -> tuple[int, str]:
    """Free bytes of the fullest device of all processes, and its name: the same in every process."""
    mine = measure.free_memory(accelerator.device), accelerator.process_index, socket.gethostname()
    if accelerator.num_processes == 1:
        return mine[0], str(accelerator.device)
    free, rank, host = min(gather_object([(*mine[:2], f"{accelerator.device} of {mine[2]}")]))
    return free, f"{host} (process {rank})"


def cached(config: LatentRun, s: Sizes, rows: Split) -> tuple[int, int, int]:
    """Pictures (a mirror image is one more) and captions that the cache will hold, and their bytes.

    What is the same is held once; of more than a million rows captions are taken to differ.
    """
    how, wide = config.cache, 4 if config.cache.precision == "fp32" else 2
    indexed = [(split, config.data.random_flip and i == 0) for i, split in enumerate(rows)]
    indexed = [(split, flip) for split, flip in indexed if not isinstance(split, IterableDataset)]
    if config.data.held_out == 0 and len(indexed) == 2 and _equal(*rows):
        indexed = indexed[:1]
    pictures = size = 0
    for split, flip in indexed if how.latents else ():
        _, first = np.unique(split.content(), return_index=True)
        latents = np.array([(h // s.factor) * (w // s.factor) for h, w in split.shapes])[split.bucket]
        pictures += len(first) * (1 + flip)
        size += int(latents[first].sum()) * 2 * s.latent_channels * wide * (1 + flip)
        size += 0 if split.masks([0]) is None else 4 * int(latents.sum())
    captions = _captions([split for split, _ in indexed]) if how.text else 0
    tokens = s.text_length * s.text_width + (s.pooled_width or 0)
    bias = 4 * s.text_length if s.pooled_width else 0  # SD3's, of the empty prompt's many tokens
    return pictures, captions, size + (captions + 1) * (wide * tokens + bias) * how.text  # and the null prompt


def _equal(train: Any, held_out: Any) -> bool:
    """Both splits show the same pictures."""
    return np.array_equal(train.content(), held_out.content())


def _captions(splits: Sequence[Any]) -> int:
    total = sum(len(split) for split in splits)
    if total <= COUNTED:
        return len({text for split in splits for texts in split.texts for text in texts})
    some = [len(texts) for split in splits for texts in islice(split.texts, 1000)]
    return round(total * sum(some) / len(some))


def what_would_fit(memory: Memory, config: Config, room: float) -> str:
    """Of ``room`` bytes."""
    fixed = memory.total - memory.activations
    batch = int(config.train.batch_size * (room - fixed) / memory.activations) if memory.activations else 0
    if batch >= 1:
        now = config.train.gradient_checkpointing
        checkpointing = f", or more of train.gradient_checkpointing (now {now:g})" if now < 1 else ""
        return f"train.batch_size {batch} would{checkpointing}"
    return "weights, gradients, optimizer and average alone are too large; FSDP2 shares them out (configs/accelerate)"


# --- what it leaves as it was ----------------------------------------------------------------------------------------


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random numbers go on where they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(devices)


@contextmanager
def _room(configs: Sequence[Config]) -> Iterator[Path]:
    """A folder that goes away, on the disk that the runs will write to; the same one for all processes.

    Raises:
        ConfigError: nothing can be written there.
    """
    accelerator, told = _accelerator(configs[0]), [""]
    place = Path(configs[0].output_dir).resolve()
    while not place.is_dir():
        place = place.parent
    made = error = None
    try:
        if accelerator.is_main_process:
            try:
                made = tempfile.TemporaryDirectory(prefix=".ldm-check-", dir=place)
                told = [made.name]
            except OSError as caught:
                error = ConfigError(f"output_dir {configs[0].output_dir}: {place} cannot be written to ({caught})")
        processes.all_or_none(error, accelerator)
        if accelerator.num_processes > 1:
            broadcast_object_list(told)
            processes.check_seen(Path(told[0]), f"output_dir {configs[0].output_dir}", accelerator)
        yield Path(told[0])
        accelerator.wait_for_everyone()
    finally:
        if made is not None:
            made.cleanup()


def _accelerator(config: Config) -> Accelerator:
    """Of the processes that are there, though the run may ask for more: what it will take is told from any of them."""
    any_number = config.train.model_copy(update={"processes": None})
    return processes.started(any_number, precision(config.train.mixed_precision))


def _bytes(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _parted(memory: Memory) -> str:
    parts = ", ".join(f"{kind} {_bytes(size)}" for kind, size in vars(memory).items() if size)
    return f"{_bytes(memory.total)}: {parts}"


def _spent(seconds: dict[str, float]) -> str:
    """The total, and the parts that are more than a hundredth of it."""
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {duration(s)}" for name, s in seconds.items() if s > 0.01 * total)
    return f"{duration(total)} ({parts})"


def repeated(config: Config, train: Any, held_out: Any) -> bool:
    """Validation shows the training pictures (``data.held_out: 0``)."""
    streamed = isinstance(train, IterableDataset)
    return config.data.held_out == 0 and not streamed and _equal(train, held_out)


def held_out_rows(config: Config, train: Any, held_out: Any) -> str:
    """``12 held out``, or that validation uses the training rows."""
    if repeated(config, train, held_out):
        return "none held out (validated on the same)"
    return f"{len(held_out):,} held out"
