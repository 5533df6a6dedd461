"""A task so small that every number of it can be checked, and processes that train it: begun by a server that has
imported torch and computed nothing, since a process that is forked after OpenMP has run may hang."""

import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, ParallelismConfig
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from training import checkpoint, deferred, processes
from training.ema import EMA
from training.evaluate.report import read_log
from training.journal import TIMED
from training.loop import Player, train
from training.optim import Guarded
from training.schema import Optimizer, Train

ROOT = Path(__file__).resolve().parent.parent
ROWS, IMAGES = 23, 96
EVERY = {"log_every": 24, "validate_every": 24, "sample_every": 24, "checkpoint_every": 24}


class Numbers(Dataset):
    """Row i is always the same; the noise of an image is its index's."""

    def __init__(self, bad: tuple[int, ...] = (), seconds: float = 0.0):
        self.seconds = seconds
        self.x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(11))
        self.x[list(bad)] = float("nan")

    def __len__(self) -> int:
        return ROWS

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        time.sleep(self.seconds)
        index, row = torch.tensor(pairs).unbind(1)
        return {"index": index, "row": row, "x": self.x[row] + (0.01 * index).sin()[:, None]}


class Flow(IterableDataset):
    """The rows one after the other, for ever; processes and the loader's workers take batches in turns."""

    def __init__(self, batch: int, rank: int = 0, world: int = 1):
        self.rows, self.batch, self.rank, self.world, self.images = Numbers(), batch, rank, world, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        while True:
            first = self.images + (worker * self.world + self.rank) * self.batch
            self.images += workers * self.world * self.batch
            yield self.rows.__getitems__([(n, n % ROWS) for n in range(first, first + self.batch)])

    def state_dict(self) -> dict[str, int]:
        return {"images": self.images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.images = state["images"]


class Toy:
    """A linear autoencoder and, from image 24 on, a critic. ``act`` is called with the images seen so far."""

    gathers = False  # in the loss, as CLIP's

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        rows: Dataset | None = None,
        dropout: float = 0.25,
        act: Callable[[int], Any] = lambda images: None,
        ema: float = 0.9,
        per_step: int = 8,
        optimizer: dict[str, Any] | None = None,
        share_out: bool | tuple[int, int] = False,
        memory: int | None = None,
        gathers: bool = False,
        draw: float = 0.0,
    ):
        self.act, self.rows, self.files, self.seen = act, rows or Numbers(), [], []
        self.per_step, self.how, self.share_out, self.memory = per_step, optimizer or {}, share_out, memory
        self.gathers = gathers  # in the loss, as CLIP's
        self.draw = draw  # seconds that a grid takes
        torch.manual_seed(3)
        build: Any = deferred.deferred if share_out else lambda make: make()
        net = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)))
        critic = build(lambda: nn.Linear(4, 1))
        self.players = [
            self.player("net", net, self.loss, accelerator, ema, 0),
            self.player("critic", critic, self.critic_loss, accelerator, 0.0, 24),
        ]

    @cached_property
    def mesh_of_two(self) -> torch.distributed.DeviceMesh:
        """What accelerate makes of dp_replicate_size and dp_shard_size, as ``processes.prepare`` takes it."""
        replicate, shard = self.share_out
        sizes = ParallelismConfig(dp_replicate_size=replicate, dp_shard_size=shard)
        return sizes.build_device_mesh("cpu")[tuple(sizes.fsdp_dim_names)]

    def player(self, name, module, loss, accelerator, decay, start) -> Player:
        config = Optimizer(learning_rate=1e-2, lr_scheduler="cosine", lr_warmup_images=24, **self.how)
        if self.share_out:
            mesh = torch.distributed.init_device_mesh("cpu", (2,)) if self.share_out is True else self.mesh_of_two
            prepared = processes.share_out(module, mesh=mesh)
        else:
            prepared = accelerator.prepare(module)
        optimizer = Guarded(module.named_parameters(), config, 320, per_step=self.per_step)
        return Player(name, prepared, loss, optimizer, EMA(module.named_parameters(), decay), start)

    def loss(self, batch: dict[str, Tensor], images: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.act(images)
        if self.memory is not None and len(batch["index"]) > self.memory:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        self.seen += batch["index"].tolist()
        y = self.players[0].module(batch["x"])
        batch["y"] = y.detach()
        if self.gathers:
            processes.gathered_rows(y.detach())
        loss = (y - batch["x"]).square().mean()
        return loss, {"loss": loss}

    def critic_loss(self, batch: dict[str, Tensor], images: int) -> tuple[Tensor, dict[str, Tensor]]:
        assert images >= 24
        loss = (self.players[1].module(batch["x"]) - 1).square().mean() + self.players[1].module(
            batch["y"]
        ).square().mean()
        return loss, {"critic_loss": loss}

    def held_out(self) -> dict[str, float]:
        net = self.players[0]
        with net.averaged(), torch.no_grad():
            weight = net.optimizer.parameters[0]
            weight = weight.full_tensor() if self.share_out else weight
            return {"held_out": weight.square().sum().item()}

    def sample(self, file: Path) -> None:
        time.sleep(self.draw)
        self.files.append(file)

    def export(self) -> None: ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a run leaves behind."""
        return {
            f"{p.name} {kind} {k}": v.detach().clone()
            for p in self.players
            for kind, flat in (
                ("weights", {str(i): x for i, x in enumerate(p.optimizer.parameters)}),
                ("optimizer", p.optimizer.tensors()),
                ("ema", p.ema.tensors()),
            )
            for k, v in flat.items()
        }


def settings(**kw) -> Train:
    return Train(**{"images": IMAGES, "batch_size": 4, "gradient_accumulation_steps": 2, **EVERY, **kw})


def go(
    run: Path,
    *,
    inputs: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    resume: str | Path = "auto",
    made: list[Toy] | None = None,
    **toy: Any,
) -> Toy:
    """Train a new toy in ``run``: what a fresh process does."""
    accelerator, how = accelerator or Accelerator(cpu=True), settings(**(config or {}))
    per_step = how.batch_size * how.gradient_accumulation_steps * accelerator.num_processes
    task = Toy(accelerator, per_step=per_step, **toy)
    given = inputs or {"data": "a"}
    if made is not None:
        made.append(task)
    train(task, how, run=run, seed=5, accelerator=accelerator, inputs=given, resume=resume)
    return task


def logged(run: Path) -> list[dict[str, float]]:
    """The log without what the clock on the wall says."""
    rows, broken = read_log(run / "log" / "metrics.jsonl")
    assert not broken
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of what is not the same bit for bit."""
    assert a.keys() == b.keys()
    return [k for k in a if not a[k].equal(b[k])]


# --- processes of their own ------------------------------------------------------------------------------------------


def child(run: Path, rank: int, world: int, port: int, how: dict[str, Any]) -> None:
    """What a launcher's process does. ``how``: go's arguments; ``at``: image -> (what, rank) to happen to it there;
    ``stream``; ``say``: a file for its messages; ``group``: in a process group of its own; ``linger``: seconds between
    its last words and its end; ``slow``, ``slow_loss``: rank -> seconds that a batch, or its loss, takes longer;
    ``slow_write``: seconds that a checkpoint takes longer."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in place.items()} if world > 1 else {}, ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of the loader's workers, as in a process that is begun by hand
    how = dict(how)
    if how.pop("group", False):
        os.setpgrp()
    at, stream, say, bad = how.pop("at", {}), how.pop("stream", False), how.pop("say", None), how.pop("bad", {})
    linger = how.pop("linger", 0)
    slow, slow_loss = how.pop("slow", {}), how.pop("slow_loss", {})
    if seconds := how.pop("slow_write", 0.0):
        replace = checkpoint.replace_folder
        checkpoint.replace_folder = lambda *folders: (time.sleep(seconds), replace(*folders))
    if say:
        handle = os.open(f"{say}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 2)
    done: set[int] = set()

    def act(images: int) -> None:
        time.sleep(slow_loss.get(rank, 0.0))
        what, who = at.get(images, (None, 0))
        if what is None or images in done or who not in (rank, None):
            return
        done.add(images)
        if what == "hang":
            time.sleep(100)
        elif what == "twice":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.2)
            os.kill(os.getpid(), signal.SIGTERM)
        elif what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        elif what == "raise":
            raise ValueError(f"process {rank} met something")
        else:
            os.kill(os.getpid(), what)

    config = settings(**how.get("config", {}))
    accelerator = processes.started(config, "no")
    if stream:
        how["rows"] = Flow(config.batch_size, rank, world)
    if bad:
        how["rows"] = Numbers(bad=bad.get(rank, ()))
    if slow:
        how["rows"] = Numbers(seconds=slow.get(rank, 0.0))
    tasks: list[Toy] = []
    try:
        go(run, accelerator=accelerator, act=act, made=tasks, **how)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        time.sleep(linger)
        os._exit(1)
    finally:
        if tasks:
            state = {} if how.get("share_out") else tasks[0].state()
            torch.save({"seen": tasks[0].seen, "state": state}, f"{run}.{rank}.pt")
        if world > 1 and isinstance(sys.exc_info()[1], SystemExit | None):
            torch.distributed.destroy_process_group()


CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.toy", "tests.ahead"])


def begun(f: Callable[..., Any], *args: Any) -> ForkServerProcess:
    """A process that calls a module's function."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()  # else Python 3.11's does not find what it is to import ahead
    process = CONTEXT.Process(target=f, args=args)
    process.start()
    return process


def started(run: Path, world: int = 1, **how: Any) -> list[ForkServerProcess]:
    """Processes that train the toy together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [begun(child, run, rank, world, port, how) for rank in range(world)]


def ended(made: list[ForkServerProcess], seconds: float = 60) -> list[int | None]:
    """Exit codes; None for one that had to be killed."""
    limit, codes = time.monotonic() + seconds, []
    for process in made:
        process.join(max(0.0, limit - time.monotonic()))
        hung = process.is_alive()
        if hung:
            process.kill()
            process.join()
        codes.append(None if hung else process.exitcode)
    return codes


def together(run: Path, world: int = 1, **how: Any) -> list[int | None]:
    return ended(started(run, world, **how))
