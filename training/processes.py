"""Many processes: the launch is checked, work is shared out, and one that is dead or stuck is named."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    convert_to_fp32,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import deferred, sharded, zero
from .fit import ConfigError
from .schema import Train

Net = TypeVar("Net", bound=nn.Module)
T = TypeVar("T")
LOST = 70  # exit code of a job that one of its processes left
# How many processes a launcher started, where it does not set WORLD_SIZE.
STARTED = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}


class LostProcess(RuntimeError):
    """Another process is dead or stuck; the message names it. The same command goes on from the last checkpoint."""

    exit_code = LOST


def started(train: Train, mixed_precision: str, run: Path | None = None) -> Accelerator:
    """The accelerator of this process, among as many as were asked for.

    Args:
        run: folder of the run, where its tracker may write; None: none is started.
    Raises:
        ConfigError: a launcher started another number of processes, or brings settings of its own that would be counted
            twice.
    """
    check_launcher()
    AcceleratorState._reset_state()  # a run before this one may have had another precision
    seconds = 60 * train.timeout_minutes * 1.5 + 5  # after ours has named the one that is missing
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=seconds), **zero.backend())
    scaler = GradScalerKwargs(enabled=False)  # the optimizer scales the loss
    trackers: dict[str, Any] = {}
    if run is not None and train.report_to != "none":
        if train.report_to not in {tracker.value for tracker in get_available_trackers()}:
            raise ConfigError(f"train.report_to {train.report_to}: pip install {train.report_to}, or set it to none")
        trackers = {"log_with": train.report_to, "project_dir": run / "log"}
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[group, scaler], **trackers)
    running, asked = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if asked != running:
        raise ConfigError(
            f"the launcher set WORLD_SIZE={asked}, but {running} processes train together; on a CPU set "
            "ACCELERATE_USE_CPU=true before torchrun or accelerate launch --multi_gpu"
        )
    if train.processes not in (None, running):
        raise ConfigError(f"train.processes {train.processes}: {running} were started")
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            "accelerate's own gradient_accumulation_steps would be counted twice: take it out of the accelerate "
            "config and set train.gradient_accumulation_steps"
        )
    kind = accelerator.distributed_type
    if zero.asked():
        zero.check(accelerator)
    if kind == DistributedType.MEGATRON_LM or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ConfigError(
            f"{kind.value}: not supported; use FSDP with fsdp_version: 2, as configs/accelerate/fsdp2.yaml"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and running > 1 and not accelerator.is_fsdp2:
        raise ConfigError(
            f"FSDP was asked for (ACCELERATE_USE_FSDP), but accelerate runs {kind.value}: it shards on GPUs only, "
            "and with FSDP_VERSION=2; start without it on a CPU"
        )
    if accelerator.is_fsdp2 and train.channels_last is True:
        raise ConfigError("train.channels_last: not with FSDP2, which shards contiguous weights only; leave it out")
    if train.on_out_of_memory == "halve" and (running > 1 or zero.asked()):
        raise ConfigError("train.on_out_of_memory halve: works in one process; with several lower train.batch_size")
    return accelerator


def check_launcher() -> None:
    """Refuse launches of which each process would train alone, all into one folder.

    ``accelerate launch --cpu --num_processes 2`` runs one process (accelerate#2741), and leaves a trace in the
    environment; srun and mpirun start several without the variables that torch reads. Refuse, too, restarts that would
    hang: torchrun's store, which workers share by default, gives restarted ones the addresses of the dead ones, and a
    machine that is replaced waits in it for ever (torch 2.13, dynamic_rendezvous.py).

    Raises:
        ConfigError: so it was.
    """
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes and started one; on a CPU use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N, or torchrun"
        )
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            f"torchrun --max_restarts {restarts}: restarted processes would not find each other in the store that "
            "torchrun shares with them; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, on each machine"
        )
    for name, launcher in STARTED.items():
        count = os.environ.get(name, "1")
        if count.isdigit() and int(count) > 1 and "WORLD_SIZE" not in os.environ:
            raise ConfigError(
                f"{launcher} started {count} processes ({name}), and without RANK, LOCAL_RANK, WORLD_SIZE, "
                "MASTER_ADDR and MASTER_PORT each would train alone: set them as configs/cluster/slurm.sh does, or "
                f"start one torchrun per machine with {launcher}"
            )


def check_shared(folder: Path, key: str, accelerator: Accelerator) -> None:
    """All processes call this: the first one writes a file into ``folder``, and the others look for it.

    Args:
        key: of the config, for the message.
    Raises:
        ConfigError: a process does not see it: the folder is another one on each machine. Raised in all processes.
        OSError, RuntimeError: it cannot be written there.
    """
    if accelerator.num_processes == 1:
        return
    token = folder / agreed(lambda: f".shared-{uuid.uuid4().hex}", accelerator)
    error = None
    try:
        if accelerator.is_main_process:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                token.write_text(socket.gethostname(), encoding="utf-8")
            except OSError as caught:
                error = caught
        all_or_none(error, accelerator)
        check_seen(token, f"{key} {folder}", accelerator)
    finally:
        if accelerator.is_main_process:
            token.unlink(missing_ok=True)


def check_seen(path: Path, what: str, accelerator: Accelerator, seconds: float = 5.0) -> None:
    """All processes call this, after the first one has made ``path``.

    Args:
        what: key and folder, for the message.
        seconds: that a network's file system may take to show it.
    Raises:
        ConfigError: a process does not see it. Raised in all processes.
    """
    limit = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < limit:
        time.sleep(0.1)
    seen = gather_object([(path.exists(), socket.gethostname())])
    blind = [f"process {rank} on {host}" for rank, (sees, host) in enumerate(seen) if not sees]
    if blind:
        raise ConfigError(
            f"{what}: is not shared between the machines: {', '.join(blind[:4])}{' …' if len(blind) > 4 else ''} "
            f"cannot see what process 0 on {seen[0][1]} wrote there; give a folder that all machines mount under the "
            "same path (NFS, Lustre, …)"
        )


def build_network(accelerator: Accelerator, make: Callable[[], Net]) -> Net:
    """The network that ``make`` builds on the host; under FSDP2 on the meta device, until ``prepare`` shards it."""
    return deferred.deferred(make) if accelerator.is_fsdp2 else make()


def prepare(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """The module on its device, wrapped for several processes; under FSDP2 sharded block by block; for ZeRO, which
    takes it together with its optimizer, as it is.

    Under FSDP2 the module may be on the host, or on the meta device (``build_network``): one block at a time is moved
    to the device, whole. accelerate shards a module together with its optimizer only, and ours is made afterwards, on
    what is sharded.
    """
    if zero.asked():
        return under_autocast(accelerator, module.to(accelerator.device))
    if not accelerator.is_fsdp2:
        return accelerator.prepare(module)
    plugin: Any = accelerator.state.fsdp_plugin
    mesh, dims = accelerator.torch_device_mesh, accelerator.parallelism_config
    share_out(
        module,
        mesh=None if mesh is None or dims is None else mesh[tuple(dims.fsdp_dim_names)],
        reshard_after_forward=plugin.reshard_after_forward,
        offload_policy=plugin.cpu_offload,
    )
    return under_autocast(accelerator, module)


def under_autocast(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Not accelerate's policy for FSDP2, nor DeepSpeed's: they round what goes in, the times of 0 … 1000 among it, and
    what comes out."""
    if (kind := {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)) is not None:
        plain = module.forward

        def forward(*args: Any, **named: Any) -> Any:
            with torch.autocast(accelerator.device.type, kind):
                return convert_to_fp32(plain(*args, **named))

        module.forward = forward
    return module


def share_out(module: nn.Module, **how: Any) -> nn.Module:
    """Each entry of the module's lists of layers, and the rest together, as units of FSDP2.

    Weights on the meta device are made unit by unit, and those that train become float32: at no time does a process
    hold more than one whole unit beside its shards.

    Args:
        how: ``fully_shard``'s arguments. A mesh of two dimensions replicates along the first and shards along the
            second (hybrid sharding).
    """
    from torch.distributed.fsdp import fully_shard

    sharded.remember(module)
    how = {k: v for k, v in how.items() if v is not None}
    layers = [
        layer
        for part in module.modules()
        if isinstance(part, nn.ModuleList)
        and not any(isinstance(x, nn.ModuleList) for x in part.modules() if x is not part)
        for layer in part
    ]
    for unit in (*layers, module):
        deferred.materialize(unit)
        for p in unit.parameters():
            if p.requires_grad and not isinstance(p, DTensor):
                p.data = p.data.float()
        fully_shard(unit, **how)
    return module


def check_whole(accelerator: Accelerator, task: str) -> None:
    """Raises ConfigError where a task's networks would be shared out that cannot be."""
    if accelerator.is_fsdp2 or zero.asked():
        raise ConfigError(
            f"task {task}: not with {'FSDP2' if accelerator.is_fsdp2 else 'DeepSpeed'}, since its loss asks for "
            "weights outside of the network's own call; its networks fit into one GPU, so use "
            "configs/accelerate/eight_gpus.yaml"
        )


# --- work that is shared out -----------------------------------------------------------------------------------------


def shared(n: int, accelerator: Accelerator) -> range:
    """This process's part of 0 … n - 1: every ``world``-th, so that the parts differ by one at most."""
    return range(accelerator.process_index, n, accelerator.num_processes)


def gathered_mean(values: Tensor, accelerator: Accelerator) -> float:
    """The mean of all processes' values (N,), of which each may have another number.

    Raises:
        ValueError: no process has any.
    """
    total = torch.stack(
        [values.double().sum(), torch.tensor(float(values.numel()), dtype=torch.float64).to(values.device)]
    )
    if accelerator.num_processes > 1:
        total = cast(Tensor, accelerator.reduce(total.to(accelerator.device), "sum"))
    if not total[1]:
        raise ValueError("no values to take the mean of")
    return (total[0] / total[1]).item()


class _Gathered(torch.autograd.Function):
    """torch has this under names that change from release to release."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gathered_rows(mine: Tensor) -> Tensor:
    """All processes' rows (B, …), as many of each: (processes · B, …), in their order, with gradient.

    A row's gradient is the sum of those that all processes' losses have. Where each computes the same loss of all rows,
    the mean over processes that DDP takes is then the gradient of one process with all of them.
    """
    return cast(Tensor, _Gathered.apply(mine))


def agreed(find: Callable[[], T], accelerator: Accelerator) -> T:
    """What the first process finds, in all of them: two machines may see a folder's files at different times.

    Raises:
        ValueError, OSError: ``find``'s own in the first process; RuntimeError in the others.
    """
    if accelerator.num_processes == 1:
        return find()
    answer: list[Any] = [None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            answer = [find()]
        except (ValueError, OSError) as caught:
            error = caught
    all_or_none(error, accelerator)
    broadcast_object_list(answer)
    return answer[0]


def all_or_none(error: Exception | None, accelerator: Accelerator) -> None:
    """Raise in every process what one met with; all of them call this.

    Raises:
        the error itself where it was met, RuntimeError in the others.
    """
    if accelerator.num_processes > 1:
        told = gather_object([None if error is None else f"process {accelerator.process_index}: {error}"])
        others = [text for text in told if text is not None]
        if others and error is None:
            raise RuntimeError(others[0])
    if error is not None:
        raise error


# --- one that is dead or stuck ---------------------------------------------------------------------------------------


class Pulse:
    """Every process writes how far it is to ``RUN/log/process_N.json``, and looks at the others' when it stands still.

    A process that has not moved for ``timeout_minutes`` (it waits for another, or is itself stuck) says which ones are
    behind, and leaves; the launcher then ends the rest. A thread does it: it works whatever the process waits in.
    Whether another one lives is seen by its file changing, so machines' clocks need not agree.

    A launcher's process whose launcher is gone (its machine's torchrun was killed) asks for a stop, as SIGTERM does:
    nobody could end it any more, and a restarted job would train beside it. It does so after ``watch`` seconds: the
    rendezvous of the other launchers must have forgotten the dead one before they meet again.

    Args:
        folder: RUN/log.
        seconds: how long a process may stand still.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, seconds: float):
        self.folder, self.seconds = folder, seconds
        self.watch = min(6.0, max(2.0, seconds / 2))  # in which a living process changes its file
        self.accelerator = accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.count, self.what, self.moved = 0, "starting", time.monotonic()
        self.note = folder / "left.json"
        self.beats, self.waits, self.writing = 0, False, threading.Lock()
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.stop = threading.Event()

    def at(self, what: str) -> None:
        """The process has come to another point; all processes pass the same ones in the same order."""
        self.count, self.what, self.moved = self.count + 1, what, time.monotonic()

    @contextmanager
    def beating(self) -> Iterator[Pulse]:
        """Nothing to do for one process."""
        if self.world == 1:
            yield self
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for left in (*self.folder.glob("process_*"), self.note):  # by a job that was killed
                left.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._write()
        thread.start()
        try:
            yield self
        finally:
            self.stop.set()
            thread.join()
            self._file(self.rank).unlink(missing_ok=True)

    def leave(self, text: str) -> None:
        """This process cannot go on: the others, which may wait for it in a collective, leave with its message."""
        if self.world > 1:
            partial = self.note.with_suffix(f".{self.rank}.partial")
            partial.write_text(json.dumps({"process": self.rank, "text": text}))
            partial.replace(self.note)

    def left(self) -> str | None:
        """Which process has left, and why."""
        try:
            told = json.loads(self.note.read_text())
        except (OSError, ValueError):
            return None
        return f"process {told['process']}: {told['text']}"

    def _file(self, rank: int) -> Path:
        return self.folder / f"process_{rank}.json"

    def _write(self) -> None:
        with self.writing:  # two threads do
            self.beats += 1
            told = {"count": self.count, "what": self.what, "host": socket.gethostname(), "pid": os.getpid()}
            told |= {"waits": self.waits or _may_wait(), "beats": self.beats}
            partial = self._file(self.rank).with_suffix(".partial")
            partial.write_text(json.dumps(told))
            partial.replace(self._file(self.rank))

    def _read(self) -> dict[int, dict[str, Any]]:
        told: dict[int, dict[str, Any]] = {}
        for rank in range(self.world):
            try:
                told[rank] = json.loads(self._file(rank).read_text())
            except (OSError, ValueError):
                told[rank] = {"count": -1, "what": "none", "host": "?", "pid": "?", "waits": False, "beats": 0}
        return told

    def _beat(self) -> None:
        with_launcher = time.monotonic()
        while not self.stop.wait(min(1.0, self.seconds / 10)):
            self._write()
            if self.parent is None or os.getppid() == self.parent:
                with_launcher = time.monotonic()
            elif time.monotonic() - with_launcher > self.watch:
                self.parent = None
                print("ldm: the launcher is gone: the run saves and stops", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
            if (text := self.left()) and not self.stop.wait(2.0):  # a collective may break off by itself
                print(f"ldm: {text}", file=sys.stderr, flush=True)
                os._exit(2)
            if time.monotonic() - self.moved > self.seconds:
                print(f"ldm: {self.missing()}; the job ends", file=sys.stderr, flush=True)
                os._exit(LOST)

    def missing(self, wait: bool = False) -> str:
        """The processes that are behind, or whose pulse has stopped; watches their files for a few seconds.

        Args:
            wait: this process is in no collective any more, but waits for the others all the same.
        """
        self.waits = wait
        before, limit = self._read(), time.monotonic() + self.watch
        while time.monotonic() < limit:
            self._write()  # the others look, too
            time.sleep(min(0.5, self.seconds / 10))
        told = self._read()
        last = {r: t["count"] if t["beats"] != before[r]["beats"] else -1 for r, t in told.items()}
        behind = [r for r in told if last[r] < max(last.values())]
        busy = [r for r in told if not told[r]["waits"]]  # at the same point, but not where one waits for others
        behind = behind or (busy if len(busy) < self.world else [])
        names = [
            f"process {r} (pid {told[r]['pid']} on {told[r]['host']}, last seen {told[r]['what']})" for r in behind
        ]
        stood = f"no step for {time.monotonic() - self.moved:.0f} s"
        if not names:
            return f"{stood}: all {self.world} processes wait at the same point ({self.what}); look at the network"
        return f"{stood}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} dead or stuck; the others wait"


def _may_wait() -> bool:
    """This process is in a backward pass or a collective: there it waits for the others, if for anything."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    place = Path(frame.f_code.co_filename).parts if frame else ()
    return "torch" in place and ("autograd" in place or "distributed" in place)


def lost_peer(error: BaseException) -> bool:
    """What a collective raises when another process is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text)
