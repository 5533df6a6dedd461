"""What stops a run before it spoils itself: no finite gradient, a spike of the loss, a signal."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from .schema import Train

log = logging.getLogger(__name__)
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN = 1.0  # seconds: a launcher passes on what the whole group has just been sent, and that is no second signal
MEMORY = 0.98  # of the running mean of the loss, what a step leaves of it
YOUNG = 20  # steps before that mean means something


class Interrupted(SystemExit):
    """The run was asked to stop, saved itself and can go on. Exit code 75: try again later."""


class Diverged(RuntimeError):
    """No finite gradient, or a loss far above its mean, for many steps in a row."""


# --- gradients and losses --------------------------------------------------------------------------------------------


class Watchman:
    """Looks at each step's losses and skipped updates, for all processes together, without waiting for the device.

    On a GPU the numbers of a step are read while the next is being computed; on a CPU at once. A request to stop goes
    with them, so that all processes stop after the same step.

    Args:
        saved: ``state()`` of an earlier life.
    """

    def __init__(self, config: Train, accelerator: Accelerator, saved: dict[str, Any] | None = None):
        self.config, self.accelerator = config, accelerator
        self.late = accelerator.device.type == "cuda"
        self.flying: tuple[int, Tensor, torch.cuda.Event | None, Tensor, list[str]] | None = None
        saved = saved or {}
        self.skips: dict[str, int] = saved.get("skips", {})  # in a row, by player
        self.spikes: dict[str, int] = saved.get("spikes", {})
        self.means: dict[str, list[float]] = saved.get("means", {})  # running mean of the loss, steps in it

    def state(self) -> dict[str, Any]:
        return {"skips": self.skips, "spikes": self.spikes, "means": self.means}

    def look(self, images: int, asked: bool, rows: Tensor, moved: dict[str, tuple[Tensor, Tensor]]) -> bool:
        """After a step.

        Args:
            images: seen before it.
            asked: this process was told to stop.
            rows: (B,) that this process has seen, on the CPU.
            moved: by player the mean loss here and 1.0 where the update was skipped, scalars on the device.
        Returns:
            True if any process was told to stop: the same answer in all of them, after the same step.
        Raises:
            Diverged: too many bad steps in a row; the rows are named.
        """
        stop = torch.full((), float(asked), device=self.accelerator.device)
        values = torch.stack([stop, *(x.detach().float() for pair in moved.values() for x in pair)])
        if (world := self.accelerator.num_processes) > 1:
            dist.all_reduce(values)
            values /= world
        event = None
        if self.late:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        before, self.flying = self.flying, (images, values, event, rows, list(moved))
        if self.late:
            return self._read(before)
        return self.settle()

    def settle(self) -> bool:
        """Reads what is still on its way: before a checkpoint, and at the end."""
        flying, self.flying = self.flying, None
        return self._read(flying)

    def _read(self, flying: tuple[int, Tensor, torch.cuda.Event | None, Tensor, list[str]] | None) -> bool:
        if flying is None:
            return False
        images, values, event, rows, names = flying
        if event is not None:
            event.synchronize()  # of the step before: it has ended, or the device is a whole step ahead
        asked, *numbers = values.tolist()
        for name, loss, skipped in zip(names, numbers[::2], numbers[1::2], strict=True):
            self._skip(name, images, rows, loss, skipped > 0)
            if skipped == 0:
                self._spike(name, images, rows, loss)
        return asked > 0

    def _skip(self, name: str, images: int, rows: Tensor, loss: float, skipped: bool) -> None:
        self.skips[name] = self.skips.get(name, 0) + 1 if skipped else 0
        if not skipped:
            return
        text = f"{name}: update skipped, no finite gradient at image {images}, rows {self._all_rows(rows)}"
        self._warn(text)
        if self.skips[name] >= self.config.max_skipped_steps:
            raise Diverged(
                f"{text}; {self.skips[name]} in a row: the run stops. Lower optimizer.learning_rate or look at these "
                "rows"
            )

    def _spike(self, name: str, images: int, rows: Tensor, loss: float) -> None:
        factor, (mean, steps) = self.config.spike_factor, self.means.get(name, [0.0, 0])
        if factor and steps >= YOUNG and mean > 0 and not loss <= factor * mean:
            self.spikes[name] = self.spikes.get(name, 0) + 1
            text = f"{name}: loss {loss:.4g} at image {images}, {loss / mean:.1f} times its running mean"
            text += f", rows {self._all_rows(rows)}"
            self._warn(text)
            if self.spikes[name] >= self.config.max_spiked_steps:
                raise Diverged(f"{text}; {self.spikes[name]} in a row: the run stops")
            return
        self.spikes[name] = 0
        keep = min(MEMORY, steps / (steps + 1))  # a plain mean at first
        self.means[name] = [keep * mean + (1 - keep) * loss, steps + 1]

    def _all_rows(self, rows: Tensor) -> list[int]:
        """Of all processes: each of them has read the same numbers, so each comes here."""
        mine: list[int] = rows.tolist()
        return gather_object(mine) if self.accelerator.num_processes > 1 else mine

    def _warn(self, text: str) -> None:
        if self.accelerator.is_main_process:
            log.warning("%s", text)


# --- signals ---------------------------------------------------------------------------------------------------------


class Cancelled(Exception):
    """Validation or the drawing of samples was broken off by a signal."""


class StopSignals:
    """SIGTERM, Ctrl-C and SIGUSR1 are noted, to be obeyed after the step; a second one leaves at once.

    Attributes:
        at_once: ``leaving`` is in force, whose handlers stay.
    """

    at_once: ClassVar[bool] = False

    def __init__(self) -> None:
        self.at: float | None = None

    def __bool__(self) -> bool:
        return self.at is not None

    def note(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.at is None:
            self.at = now
        elif now - self.at > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def caught(self) -> Iterator[StopSignals]:
        if StopSignals.at_once:
            yield self
            return
        old = {s: signal.signal(s, self.note) for s in STOPS}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def cancelling(self, alone: bool) -> Iterator[None]:
        """Within this context a signal breaks off at the next layer of any network, for work that may be left out.

        Args:
            alone: one process runs. Several stop together, after a step: nothing is broken off here.
        Raises:
            Cancelled: a signal came.
        """

        def check(*_: Any) -> None:
            if self:
                raise Cancelled

        if not alone:
            yield
            return
        hook = register_module_forward_pre_hook(check)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def leaving(text: str) -> Iterator[None]:
    """Within this context a signal to stop ends the command at once, and what is cleaned up on the way is: temporary
    folders go. For work of which nothing is kept.

    Raises:
        Interrupted: with exit code 75, after ``text`` is logged.
    """

    def leave(number: int, _frame: Any) -> None:
        for other in STOPS:  # what follows is cleaning up, which a second signal does not break off
            signal.signal(other, signal.SIG_IGN)
        log.warning("%s", text)
        raise Interrupted(75)

    old = {s: signal.signal(s, leave) for s in STOPS}
    StopSignals.at_once = True
    try:
        yield
    finally:
        StopSignals.at_once = False
        for number, handler in old.items():
            signal.signal(number, handler)


class Stages:
    """The runs of one command. A request to stop that comes in the last step of one is no interruption of it: it is
    made to the end and exported; but the next one is not begun."""

    asked: ClassVar[str | None] = None  # the run in whose last step it came; the same in all processes

    def __init__(self) -> None:
        Stages.asked = None

    def begin(self, run: str) -> None:
        """Raises Interrupted, and says how to go on, where one is not to begin."""
        if Stages.asked is None:
            return
        if PartialState().is_main_process:
            log.warning(
                "%s is done, and %s was not begun: a signal asked to stop; the same command goes on with it",
                Stages.asked,
                run,
            )
        raise Interrupted(75)


def bear_one_signal(_worker: int) -> None:
    """A signal often goes to all processes of a run; the loader's must live until the step has its pictures."""

    def note(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in STOPS:
        signal.signal(number, note)
