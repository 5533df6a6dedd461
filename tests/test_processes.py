"""Two real processes over gloo: they train as one with the double batch, and stop, go on and fail together."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.toy import IMAGES, ROWS, Flow, ended, go, logged, settings, started, together
from training import checkpoint, processes
from training.clock import ImageClock
from training.fit import ConfigError
from training.loop import Interrupted


def newest(run: Path) -> tuple[checkpoint.Files, dict[str, Any]]:
    return checkpoint.load(checkpoint.listed(run / "checkpoints")[-1])


def same_bits(a: Path, b: Path) -> None:
    """The newest checkpoints of two runs, every file of them, random numbers and sums of the log included."""
    one, two = (checkpoint.listed(run / "checkpoints")[-1] for run in (a, b))
    assert one.name == two.name
    assert (one / checkpoint.MANIFEST).read_text() == (two / checkpoint.MANIFEST).read_text()
    assert logged(a) == logged(b)


def seen(run: Path, rank: int) -> list[int]:
    return torch.load(f"{run}.{rank}.pt", weights_only=True)["seen"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    assert together(run, 2, config={"log_every": 32}) == [0, 0]
    return run


def test_two_processes_are_one_with_the_double_batch(tmp_path: Path, two: Path):
    """Gradients are averaged over gloo: the same mean in another order, as in the accumulation test."""
    go(tmp_path / "one", dropout=0.0, config={"batch_size": 8, "log_every": 32})
    assert together(tmp_path / "two", 2, dropout=0.0, config={"log_every": 32}) == [0, 0]
    expected, told = newest(tmp_path / "one")
    found, state = newest(tmp_path / "two")
    assert (state["images"], state["steps"], state["world"]) == (96, 6, 2)
    assert state["optimizers"] == told["optimizers"]  # the schedule, too: as many images, at the same rates
    for file in ("net", "critic", "net_ema"):
        assert found[file].keys() == expected[file].keys()
        for k, v in expected[file].items():
            torch.testing.assert_close(found[file][k], v, rtol=0, atol=1e-6)
    for one, both in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):  # written once
        assert both == pytest.approx(one, rel=1e-4)  # and over the pictures of both


def test_every_row_is_seen_once_per_epoch(two: Path):
    images = sorted(seen(two, 0) + seen(two, 1))
    assert images == list(range(IMAGES))
    assert not set(seen(two, 0)) & set(seen(two, 1))
    rows = [row for batch in ImageClock(ROWS, 4, 5, 0, IMAGES) for _, row in batch]
    assert all(sorted(rows[i : i + ROWS]) == list(range(ROWS)) for i in range(0, IMAGES - ROWS, ROWS))


def test_the_processes_draw_other_random_numbers(two: Path):
    rng = newest(two)[0]["rng"]
    assert not rng["0.cpu"].equal(rng["1.cpu"])


@pytest.mark.parametrize("stream", [False, True])
def test_both_stop_when_one_is_told_and_go_on_in_the_same_bits(stream: bool, tmp_path: Path, two: Path):
    """SIGTERM to one, then SIGKILL to one, then to the end; dropout draws from each process's own generator."""
    how: dict[str, Any] = {"config": {"log_every": 32}, "stream": stream}
    if stream:
        assert together(tmp_path / "whole", 2, **how) == [0, 0]
    assert together(tmp_path / "run", 2, at={32: (signal.SIGTERM, 1)}, **how) == [75, 75]
    assert checkpoint.images_of(checkpoint.listed(tmp_path / "run" / "checkpoints")[-1]) == 48
    if not stream:
        code, other = together(tmp_path / "run", 2, at={80: (signal.SIGKILL, 1)}, **how)
        assert other == -signal.SIGKILL and code not in (0, 75)
    assert together(tmp_path / "run", 2, **how) == [0, 0]
    same_bits(tmp_path / "run", tmp_path / "whole" if stream else two)
    if stream:  # both stood at one place: one process goes on from there
        task = go(tmp_path / "run", rows=Flow(4), config={"images": 112})
        assert task.seen == list(range(96, 112))


def test_another_number_of_processes_goes_on_with_the_same_rows(tmp_path: Path):
    """One process, then two, then one: no image left out, none twice, and the same weights but for rounding."""
    alone = {"log_every": 32, "batch_size": 4, "gradient_accumulation_steps": 2}
    go(tmp_path / "one", dropout=0.0, config={**alone, "batch_size": 8, "gradient_accumulation_steps": 1})
    run = tmp_path / "run"

    def stop(images: int) -> None:
        if images == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        go(run, dropout=0.0, config=alone, act=stop)
    config = {"log_every": 32, "gradient_accumulation_steps": 1}
    assert together(run, 2, dropout=0.0, config=config, at={56: (signal.SIGTERM, 1)}) == [75, 75]
    images = [seen(run, rank) for rank in range(2)]
    last = go(run, dropout=0.0, config=alone)
    assert sorted(images[0] + images[1]) == list(range(24, 64)) and last.seen == list(range(64, IMAGES))
    expected, found = newest(tmp_path / "one")[0], newest(run)[0]
    for k, v in expected["net"].items():
        torch.testing.assert_close(found["net"][k], v, rtol=0, atol=1e-6)
    for one, parts in zip(logged(tmp_path / "one"), logged(run), strict=True):
        assert parts == pytest.approx(one, rel=1e-4)  # also the means over what one and what two processes saw


def test_nan_in_one_process_is_skipped_by_both(tmp_path: Path):
    order = [row for batch in ImageClock(ROWS, 4, 5, 0, IMAGES) for _, row in batch]
    row = order[36 + 4]  # image 40 is the first process's, in the third step
    bad = tuple(r for r in range(ROWS) if r == row)
    assert together(tmp_path / "run", 2, bad={0: bad}, say=str(tmp_path / "said")) == [0, 0]
    hit = [n for n in range(0, IMAGES, 16) if row in order[n : n + 4] + order[n + 8 : n + 12]]
    said = [line for line in (tmp_path / "said.0").read_text().splitlines() if "net: update skipped" in line]
    assert len(said) == len(hit) > 0 and all(f"image {n}, rows" in line for n, line in zip(hit, said, strict=True))
    assert "update skipped" not in (tmp_path / "said.1").read_text()  # one process tells
    states = [torch.load(f"{tmp_path}/run.{rank}.pt", weights_only=True)["state"] for rank in range(2)]
    assert all(states[0][k].equal(v) and v.isfinite().all() for k, v in states[1].items())
    assert states[0]["net optimizer 0.step"] == 6 - len(hit)


# --- one is lost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["hang", signal.SIGSTOP, signal.SIGKILL, "raise"])
def test_a_process_that_is_lost_ends_the_job_and_is_named(what: Any, tmp_path: Path):
    run = tmp_path / "run"
    made = started(run, 2, at={48: (what, 1)}, config={"timeout_minutes": 0.05}, say=str(tmp_path / "said"))
    code = ended(made[:1], 40)[0]
    if what == signal.SIGSTOP:
        made[1].kill()
    ended(made[1:], 5)
    assert code not in (None, 0, 75)
    said = " ".join((tmp_path / "said.0").read_text().split())
    assert f"process 1 (pid {made[1].pid if what != 'raise' else ''}" in said and "is dead or stuck" in said
    assert "process 0 (" not in said
    assert checkpoint.images_of(checkpoint.listed(run / "checkpoints")[-1]) == 48


def test_the_first_process_is_named_too(tmp_path: Path):
    """It hangs in its loss: the other waits for it in the same step, in the backward pass."""
    how: dict[str, Any] = {"config": {"timeout_minutes": 0.05}, "say": str(tmp_path / "said")}
    made = started(tmp_path / "run", 2, at={48: ("hang", 0)}, **how)
    code = ended(made[1:], 40)[0]
    ended(made[:1], 5)
    assert code not in (None, 0, 75)
    said = " ".join((tmp_path / "said.1").read_text().split())
    assert f"process 0 (pid {made[0].pid} on" in said and "is dead or stuck" in said and "process 1 (" not in said


def test_a_full_disk_of_one_ends_all(tmp_path: Path):
    """The process that writes tells the others, which would wait for it for ever."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("no folder")
    said = str(tmp_path / "said")
    assert together(tmp_path / "run", 2, say=said) == [1, 1]
    assert "File exists" in (tmp_path / "said.0").read_text() or "Not a directory" in (tmp_path / "said.0").read_text()
    assert "process 0: " in (tmp_path / "said.1").read_text()


@pytest.mark.parametrize("linger", [0, 20])
def test_a_lack_of_memory_in_one_process_ends_all_with_its_message(linger: int, tmp_path: Path):
    """The loss gathers from all: nothing can be tried in halves. The other leaves when the collective breaks off, or
    (as with NCCL, while the one that failed is still there) when it reads the note."""
    how: dict[str, Any] = {"gathers": True, "linger": linger, "say": str(tmp_path / "said")}
    made = started(tmp_path / "run", 2, at={48: ("memory", 1)}, **how)
    other = ended(made[:1], 18)[0]
    if linger:
        made[1].kill()
    last = ended(made[1:], 10)[0]
    assert other == (2 if linger else 1) and last == (-signal.SIGKILL if linger else 1)
    text = "out of memory at image 48 with 4 images (train.batch_size 4): CUDA out of memory. Tried to allocate 2.00"
    own, others = ((tmp_path / f"said.{rank}").read_text() for rank in (1, 0))
    assert text in own and "try half, train.batch_size: 2 with train.gradient_accumulation_steps: 4" in own
    assert f"process 1: {text}" in others and "dead or stuck" not in others
    assert checkpoint.images_of(checkpoint.listed(tmp_path / "run" / "checkpoints")[-1]) == 48
    if not linger:  # an old note does not end the run that goes on
        assert together(tmp_path / "run", 2, gathers=True) == [0, 0]


def test_nobody_leaves_before_the_checkpoint_is_on_the_disk(tmp_path: Path):
    """It is written in the background, by one process; a launcher ends all when the first of them leaves."""
    config = {"async_checkpoint": True, "checkpoint_every": 1000}
    assert together(tmp_path / "run", 2, at={32: (signal.SIGTERM, 1)}, config=config, slow_write=1.0) == [75, 75]
    written = checkpoint.listed(tmp_path / "run" / "checkpoints")[-1].stat().st_ctime  # of its new name
    for rank in range(2):
        assert (tmp_path / f"run.{rank}.pt").stat().st_mtime >= written


def test_a_pulse_is_seen_by_its_changes_and_not_by_the_clock(tmp_path: Path):
    """One process's clock is fast, and it is dead: its file says that it has just been there, and was the furthest."""
    mine, other = (processes.Pulse(tmp_path, Fake(rank, 3), 2.0) for rank in range(2))
    told = {"count": 9, "what": "training net", "host": "far", "pid": 1, "waits": False, "beats": 7}
    (tmp_path / "process_2.json").write_text(json.dumps({**told, "time": time.time() + 100}))
    stop = threading.Event()
    alive = threading.Thread(target=lambda: [other._write() for _ in iter(lambda: stop.wait(0.1), True)])
    alive.start()
    text = mine.missing()
    stop.set()
    alive.join()
    assert "process 2 (pid 1 on far, last seen training net) is dead or stuck" in text
    assert "process 0 (" not in text and "process 1 (" not in text


# --- parts -----------------------------------------------------------------------------------------------------------


class Fake:
    """One of several processes, with what the others would send."""

    def __init__(self, rank: int, world: int, others: torch.Tensor | None = None):
        self.process_index, self.num_processes, self.others = rank, world, others
        self.device = torch.device("cpu")

    def reduce(self, x: torch.Tensor, _how: str) -> torch.Tensor:
        return x + self.others


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_work_is_shared_out_without_a_rest(world: int):
    parts = [processes.shared(10, Fake(rank, world)) for rank in range(world)]
    assert sorted(i for part in parts for i in part) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_mean_over_unequal_parts():
    others = torch.tensor([20.0, 2.0], dtype=torch.float64)  # 9 and 11
    assert processes.gathered_mean(torch.tensor([1.0, 2.0, 3.0]), Fake(0, 2, others)) == pytest.approx(26 / 5)
    assert processes.gathered_mean(torch.tensor([1.0, 2.0]), Fake(0, 1)) == 1.5
    assert processes.gathered_mean(torch.tensor([]), Fake(0, 2, others)) == 10
    with pytest.raises(ValueError, match="no values"):
        processes.gathered_mean(torch.tensor([]), Fake(0, 1))


@pytest.mark.parametrize(
    ("environment", "config", "match"),
    [
        ({"WORLD_SIZE": "2"}, {}, r"WORLD_SIZE=2, but 1 processes train together"),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, {}, "for several processes and started one"),
        ({}, {"processes": 8}, r"train\.processes 8: 1 were started"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}, r"srun started 8 processes .*configs/cluster/slurm\.sh"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, "mpirun started 2 processes"),
        (
            {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}, {},
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "would be counted twice"),
    ],
)  # fmt: skip
def test_a_launch_that_does_not_fit_is_refused(environment, config, match, monkeypatch):
    Accelerator(cpu=True)  # one process, before the environment says otherwise
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "Accelerator", lambda **kw: Accelerator(cpu=True, **kw))
    with pytest.raises(ConfigError, match=match):
        processes.started(settings(**config), "no")


def test_engines_that_do_not_go_with_ours_are_refused(monkeypatch):
    from accelerate.utils import DistributedType

    for kind, two, match in (("MEGATRON_LM", False, "not supported"), ("FSDP", False, "fsdp_version: 2")):
        fake = SimpleNamespace(
            num_processes=1, gradient_accumulation_steps=1, distributed_type=DistributedType(kind), is_fsdp2=two
        )
        monkeypatch.setattr(processes, "Accelerator", lambda fake=fake, **kw: fake)
        with pytest.raises(ConfigError, match=match):
            processes.started(settings(), "no")


def test_halves_are_for_one_process(monkeypatch):
    from accelerate.utils import DistributedType

    fake = SimpleNamespace(
        num_processes=2, gradient_accumulation_steps=1, distributed_type=DistributedType.MULTI_GPU, is_fsdp2=False
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "Accelerator", lambda **kw: fake)
    with pytest.raises(ConfigError, match="works in one process"):
        processes.started(settings(on_out_of_memory="halve"), "no")


def test_fsdp_that_accelerate_takes_for_ddp_is_refused(monkeypatch):
    """So it does on a CPU, without a word; the run would need the memory of whole weights."""
    from accelerate.utils import DistributedType

    fake = SimpleNamespace(
        num_processes=2, gradient_accumulation_steps=1, distributed_type=DistributedType.MULTI_CPU, is_fsdp2=False
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(processes, "Accelerator", lambda **kw: fake)
    with pytest.raises(ConfigError, match="accelerate runs MULTI_CPU: it shards on GPUs only"):
        processes.started(settings(), "no")


def test_fsdp2_takes_contiguous_weights(monkeypatch):
    monkeypatch.setattr(AcceleratorState, "is_fsdp2", True)
    with pytest.raises(ConfigError, match=r"train\.channels_last: not with FSDP2"):
        processes.started(settings(channels_last=True), "no")


def test_the_loss_is_scaled_by_the_optimizer_alone(monkeypatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(processes, "Accelerator", lambda **kw: (given.update(kw), Accelerator(cpu=True))[1])
    processes.started(settings(timeout_minutes=2), "fp16")
    group, scaler = given["kwargs_handlers"]
    assert scaler.enabled is False and group.timeout.total_seconds() == 185
    assert given["mixed_precision"] == "fp16"
