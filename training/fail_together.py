"""An error in one process ends all processes, within seconds and with its message.

This is for what runs before the training loop, which has a watch of its own (``processes.Pulse``):
there the others would wait in a collective until the process group's timeout.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator

from .processes import LOST

POLL = 0.25  # seconds between two reads of the store
GRACE = 5.0  # seconds in which a process may leave by its own exception
_numbers = itertools.count()  # one for each block that is entered, the same in all processes


@contextmanager
def all_fail_together(accelerator: Accelerator) -> Iterator[None]:
    """All processes enter this block, and leave it together; if one of them raises an exception, all leave it.

    A process that is still in the block ``GRACE`` seconds later, for example in a collective, prints
    the message and exits with code ``LOST``.

    Raises:
        RuntimeError: in the other processes, with number, host and message of the first that failed.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch = _Watch(accelerator, next(_numbers))
    try:
        yield
        accelerator.wait_for_everyone()  # watched too: another may still fail
    except Exception as error:
        if (message := watch.failed(error)) is not None:
            raise RuntimeError(message) from error
        raise
    finally:
        watch.end()


class _Watch:
    """A thread that reads from the process group's store whether another process has failed."""

    def __init__(self, accelerator: Accelerator, number: int):
        self.world = accelerator.num_processes
        self.name = f"process {accelerator.process_index} on {socket.gethostname()}"
        self.error, self.read = f"ldm/{number}/error", f"ldm/{number}/read"
        # A client of its own: the main thread's is locked while it waits for the peers of a collective.
        store: Any = dist.distributed_c10d._get_default_store()
        self.store = store.clone()
        self.message: str | None = None  # another process's
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._look, name="fail together", daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.stop.wait(POLL):
            try:
                with self.lock:
                    if not self.store.check([self.error]):
                        continue
                    self._take(self.store.get(self.error).decode())
            except RuntimeError:  # the process that holds the store is gone
                self.message = self.message or "the first process has left"
            if self.message is None:  # this process's own
                return
            if not self.stop.wait(GRACE):
                print(f"ldm: {self.message}; the job ends", file=sys.stderr, flush=True)
                os._exit(LOST)
            return

    def _take(self, message: str) -> None:
        if self.message is None and not message.startswith(f"{self.name}: "):
            self.message = message
            self.store.add(self.read, 1)

    def failed(self, error: Exception) -> str | None:
        """Publish the error, and wait until the others have read it.

        Returns:
            The message of another process if that one failed first.
        """
        until = time.monotonic() + GRACE
        try:
            with self.lock:
                text = f"{self.name}: {error or type(error).__name__}"
                self._take(self.store.compare_set(self.error, "", text).decode())
            while self.message is None and self.store.add(self.read, 0) < self.world - 1 and time.monotonic() < until:
                time.sleep(POLL / 5)
        except RuntimeError:  # no store any more: the process that holds it failed first
            self.message = self.message or "the first process has left"
        return self.message

    def end(self) -> None:
        self.stop.set()
        self.thread.join()
