"""Batches of a run, from rows that can be asked for by number or from a stream, and where they stand."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from .checkpoint import CheckpointError
from .clock import ImageClock
from .guards import bear_one_signal
from .schema import Train

Batch = dict[str, Tensor]


class LostWorker(RuntimeError):
    """A process that loads the data died or hung."""


class Feed:
    """This process's micro-batches, on its device ("row" stays on the CPU), from image ``start`` to ``stop``.

    Rows by number need no memory of where they are: the image index decides everything. A stream is asked for its
    state with each batch, in the process that reads it, so that what is loaded ahead does not count.

    Args:
        rows: a Dataset with ``__getitems__([(image index, row), …]) -> Batch``, and ``bucket`` (N,) where its pictures
            are of several shapes; or an IterableDataset of batches with ``state_dict``, ``load_state_dict``, which
            shares its batches out among processes and a loader's workers by itself. Its state tells where it stands
            when all of them have had theirs: equal states are one place.
        saved: ``state()`` of this process in an earlier life.
    Raises:
        CheckpointError: a stream is to go on with another number of workers.
    """

    def __init__(
        self, rows: Dataset, config: Train, seed: int, start: int, stop: int, accelerator: Accelerator, saved: Any
    ):
        self.device, self.workers = accelerator.device, config.num_workers
        rank, world = accelerator.process_index, accelerator.num_processes
        common: dict[str, Any] = {
            "num_workers": self.workers,
            "collate_fn": _as_is,
            "worker_init_fn": bear_one_signal,
            "timeout": config.timeout_minutes * 60 if self.workers else 0,  # a worker that hangs ends the run
            "pin_memory": self.device.type == "cuda",
            "generator": torch.Generator(),  # its own: a loader draws a seed as it starts, and ours must not move
        }
        self.source: Any = None  # the loader's iterator, once it runs
        self.stream = isinstance(rows, IterableDataset)
        self.told: dict[str, Any] = {}
        if not self.stream:
            buckets = getattr(rows, "bucket", None)
            count = len(rows) if buckets is None else buckets  # type: ignore[arg-type]
            clock = ImageClock(count, config.batch_size, seed, start, stop, rank, world)
            self.loader = DataLoader(rows, batch_sampler=cast(Any, clock), **common)
            return
        places: list[Any] = [None] * max(1, self.workers)
        self.told = {"workers": self.workers, "turn": 0, "states": places}
        together = saved.pop("together", None) if saved else None
        if saved and saved["workers"] != self.workers and together is not None:
            saved = together  # another number of readers goes on
        if saved and saved["workers"] is None:  # all stood at one place, or are merged
            self.told["states"] = saved["states"] * len(places)
        elif saved and saved["workers"] != self.workers:
            raise CheckpointError(
                f"train.num_workers {self.workers}: the checkpoint's stream was read by {saved['workers']}, at "
                "different places, and goes on with as many only"
            )
        elif saved:
            self.told = saved
        told = _Telling(rows, self.told["states"], self.told["turn"])
        self.loader = DataLoader(told, batch_size=None, **common)

    def state(self) -> dict[str, Any]:
        """Plain JSON; empty for rows by number."""
        return {**self.told, "states": list(self.told["states"])} if self.stream else {}

    def batches(self) -> Generator[Batch, None, None]:
        """Closing it ends the loader's processes.

        Raises:
            LostWorker: a worker was killed, or gave nothing within ``train.timeout_minutes``.
        """
        self.source = source = iter(self.loader)
        try:
            yield from self._moved(source)
        finally:
            if self.workers:  # now: at the interpreter's exit they would be waited for, and they bear one signal
                source._shutdown_workers()

    def _moved(self, source: Any) -> Iterator[Batch]:
        while True:
            try:
                batch = next(source)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: it died as it handed over
                if isinstance(error, RuntimeError) and "DataLoader" not in str(error):  # the rows' own
                    raise
                raise self._lost(error) from error
            if self.stream:
                batch, worker, state = batch
                self.told["states"][worker] = state
                self.told["turn"] = (worker + 1) % max(1, self.workers)
            yield {
                k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) and k != "row" else v
                for k, v in batch.items()
            }

    @contextmanager
    def naming_lost_workers(self) -> Iterator[None]:
        """Within this context a worker's death is a ``LostWorker`` wherever it is noticed: torch raises it from a
        signal handler, in whatever line the process then is."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, LostWorker) or "DataLoader worker" not in str(error):
                raise
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> LostWorker:
        codes = [worker.exitcode for worker in getattr(self.source, "_workers", ())]
        return LostWorker(
            f"train.num_workers {self.workers}: a process that loads the data died or hung ({error}; exit "
            f"codes {codes}); the last checkpoint is whole: start the same command again, with fewer workers if "
            "memory ran out"
        )


class _Telling(IterableDataset):
    """A stream's batches, each with the worker that read it and the stream's state after it.

    The loader takes its workers in turns and begins with the first. After a resume the turn may be at another: the
    first then takes up that one's state, and so on.
    """

    def __init__(self, rows: Any, states: list[Any], turn: int):
        self.rows, self.states, self.turn = rows, states, turn

    def __iter__(self) -> Iterator[tuple[Batch, int, Any]]:
        info = get_worker_info()
        place = ((info.id if info else 0) + self.turn) % len(self.states)
        if info:
            object.__setattr__(info, "id", place)  # frozen; the stream too must take itself for that worker
        if self.states[place] is not None:
            self.rows.load_state_dict(self.states[place])
        for batch in self.rows:
            yield batch, place, self.rows.state_dict()


def _as_is(batch: Any) -> Any:
    return batch
