"""How long each process waits in a step, for its data and for the other processes, and which one is slow.

All processes train at the pace of the slowest. A process that reads its data slowly has a long ``data_wait``, and the
others a long ``comm_wait``; one that computes slowly has neither, and the others have a long ``comm_wait``.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.autograd import Variable

log = logging.getLogger(__name__)
STEPS = 10  # a process is judged over at least so many steps
SHARE = 0.1  # of a step: by so much more than the others' median a slow process takes
FACTOR = 2.0  # and waits for its data so many times as long as they do

Mark = float | torch.cuda.Event  # a moment: on the host's clock, or in the order of the device's work
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class StepTimes:
    """Times the steps of the loop. All processes call the same methods in the same order.

    A step is ``with loading()``, ``meet()``, for each player its gradients and ``reduced()``, then ``stepped()``. On a
    GPU the waits for other processes are measured by events on its stream, which are read when they have passed: no
    step waits for the device. The first step is left out (a loader starts, kernels are chosen), and so is the one after
    ``pause``.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.world = accelerator, accelerator.num_processes
        self.cuda = accelerator.device.type == "cuda"
        self.token = torch.zeros((), device=accelerator.device)
        self.spans: deque[tuple[Mark, Mark]] = deque()  # waits for others whose lengths are still to be read
        self.own: list[tuple[Mark, Mark]] = []  # those of this step
        self.backward_end: Mark | None = None
        self.left_out, self.start, self.loaded = True, 0.0, 0.0
        self._clear()
        self.judged = torch.zeros(self.world, 3, dtype=torch.float64)  # sums of data, comm, step seconds
        self.judged_steps = 0
        self.named: dict[str, list[int]] = {}  # of the last judgement, so that a process is named once

    def _clear(self) -> None:
        self.steps, self.data, self.comm, self.total = 0, 0.0, 0.0, 0.0
        self.spans.clear()

    # --- in the step -------------------------------------------------------------------------------------------------

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the reading of the step's micro-batches."""
        self.start = time.perf_counter()
        yield
        self.loaded = time.perf_counter()

    def meet(self) -> None:
        """Wait until all processes have their data: what a slow reader costs the others is measured here, and not
        counted as their computation. The collective that follows would wait in any case."""
        if self.world > 1:
            before = self._mark()
            dist.all_reduce(self.token)
            self.own.append((before, self._mark()))

    def watch(self, loss: Loss) -> Loss:
        """The same loss, whose backward pass notes when its own computation ends.

        What it queues runs after the pass's last kernel and before what DDP and FSDP2 queue later in the pass: their
        wait for the reductions.
        """
        if self.world == 1:
            return loss

        def watched(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
            value, named = loss(*args)
            if value.requires_grad:
                value.register_hook(lambda _: Variable._execution_engine.queue_callback(self._note))
            return value, named

        return watched

    def _note(self) -> None:
        self.backward_end = self._mark()

    def reduced(self) -> None:
        """The gradients of a player are those of all processes."""
        before, self.backward_end = self.backward_end, None
        if before is not None:
            self.own.append((before, self._mark()))

    def stepped(self) -> None:
        """The step has ended, or has been handed to the device."""
        own, self.own = self.own, []
        if self.left_out:
            self.left_out = False
            return
        self.spans.extend(own)
        self.data += self.loaded - self.start
        self.total += time.perf_counter() - self.start
        self.steps += 1
        while self.spans and _passed(self.spans[0][1]):
            self.comm += _seconds(*self.spans.popleft())

    def pause(self) -> None:
        """One process does something alone, for which the others wait in their next step: that one is left out."""
        self.left_out = True

    def _mark(self) -> Mark:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    # --- at a line of the log ----------------------------------------------------------------------------------------

    def read(self) -> tuple[dict[str, float], list[list[float]]]:
        """All processes ask together, where the device has been waited for.

        Returns:
            for the log: seconds of a step, and of it the wait for data and for other processes, as means over the
            processes and of the one that waited longest; and by process [data, comm, step] in seconds per step.
            Both are empty where no step was timed.
        """
        values: dict[str, float] = {}
        if not self.steps:
            return values, []
        while self.spans:
            before, after = self.spans.popleft()
            if isinstance(after, torch.cuda.Event):
                after.synchronize()
            self.comm += _seconds(before, after)
        own = torch.tensor([[self.data, self.comm, self.total]], dtype=torch.float32)
        table = own.double()
        if self.world > 1:
            table = cast(Tensor, self.accelerator.gather(own.to(self.accelerator.device))).double().cpu()  # (world, 3)
        steps = self.steps
        self._clear()
        self._judge(table, steps)
        rows = (table / steps).tolist()
        data, comm, step = zip(*rows, strict=True)
        values |= {"step_seconds": sum(step) / self.world, "data_wait_seconds": sum(data) / self.world}
        if self.world > 1:
            values |= {"data_wait_seconds_max": max(data), "comm_wait_seconds": sum(comm) / self.world}
            values |= {"comm_wait_seconds_max": max(comm)}
        return values, rows

    def _judge(self, table: Tensor, steps: int) -> None:
        """Name the processes that are slow and were not in the judgement before."""
        self.judged, self.judged_steps = self.judged + table, self.judged_steps + steps
        if self.world == 1 or self.judged_steps < STEPS:
            return
        data, comm, step = (self.judged / self.judged_steps).T.tolist()
        self.judged, self.judged_steps = torch.zeros_like(self.judged), 0
        length = sum(step) / self.world
        compute = [s - d - c for d, c, s in zip(data, comm, step, strict=True)]
        slow = {"read": slow_processes(data, length, FACTOR), "compute": slow_processes(compute, length)}
        new = {what: [p for p in found if p not in self.named.get(what, [])] for what, found in slow.items()}
        self.named = slow
        if not any(new.values()):
            return
        hosts = gather_object([socket.gethostname()])  # all have read the same numbers, so all come here
        if not self.accelerator.is_main_process:
            return
        for p in new["read"]:
            log.warning(
                "process %d on %s waits %.3g s a step for its data, the others %.3g s: of a step of %.3g s; look at "
                "its disk and network, or raise train.num_workers",
                p, hosts[p], data[p], _others(data, p), length,
            )  # fmt: skip
        for p in new["compute"]:
            log.warning(
                "process %d on %s computes %.3g s a step, the others %.3g s and wait for it: look at its device's "
                "clock and temperature, and at what else runs there",
                p, hosts[p], compute[p], _others(compute, p),
            )  # fmt: skip


def slow_processes(seconds: Sequence[float], step: float, factor: float = 1.0) -> list[int]:
    """The processes that take longer than the median of the others by ``SHARE`` of a step, and ``factor`` times as
    long. The median stands firm while less than half of them are slow.

    Args:
        seconds: by process, per step.
        step: seconds of a step.
    """
    others = [_others(seconds, p) for p in range(len(seconds))]
    return [p for p, x in enumerate(seconds) if x - others[p] >= SHARE * step and x >= factor * others[p]]


def _others(seconds: Sequence[float], process: int) -> float:
    return median(x for p, x in enumerate(seconds) if p != process)


def _passed(mark: Mark) -> bool:
    return mark.query() if isinstance(mark, torch.cuda.Event) else True


def _seconds(before: Mark, after: Mark) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    return cast(torch.cuda.Event, before).elapsed_time(cast(torch.cuda.Event, after)) / 1000
