"""The loop, with a task so small that every number of it can be checked."""

import json
import logging
import multiprocessing as mp
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import Dataset

from training import checkpoint
from training.checkpoint import CheckpointError
from training.clock import ImageClock
from training.ema import EMA
from training.evaluate.report import read_log
from training.loop import Diverged, Interrupted, Player, train
from training.optim import GuardedAdamW
from training.schema import Optimizer, Train

ROWS = 23


# --- the clock -------------------------------------------------------------------------------------------------------


def shown(*args, **kw) -> list[tuple[int, int]]:
    return [pair for batch in ImageClock(*args, **kw) for pair in batch]


@pytest.mark.parametrize("batch", [1, 4, 23, 50])
def test_each_row_once_per_epoch(batch: int):
    """Also where a batch crosses an epoch's border, or holds more than one epoch."""
    pairs = shown(ROWS, batch, 7, 0, 300)
    assert [n for n, _ in pairs[:300]] == list(range(300))
    epochs = [[row for _, row in pairs[i : i + ROWS]] for i in range(0, 300 - ROWS, ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert epochs[0] != epochs[1]  # another order in each
    assert [row for _, row in pairs[:300]] == [row for _, row in shown(ROWS, 1, 7, 0, 300)]  # whatever the batch
    assert epochs[0] != [row for _, row in shown(ROWS, batch, 8, 0, ROWS)][:ROWS]  # another order for each seed


def test_a_start_in_the_middle_goes_on():
    whole = shown(ROWS, 4, 7, 0, 240)
    for start in (4, 20, 24, 92, 236):
        assert shown(ROWS, 4, 7, start, 240) == whole[start:]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_images(world: int):
    clocks = [ImageClock(ROWS, 4, 7, 24, 24 + 4 * world * 9, rank, world) for rank in range(world)]
    parts = [list(clock) for clock in clocks]
    assert all(len(part) == len(clock) == 9 for part, clock in zip(parts, clocks, strict=True))
    together = [pair for step in zip(*parts, strict=True) for batch in step for pair in batch]
    assert together == shown(ROWS, 4 * world, 7, 24, 24 + 4 * world * 9)  # as one process with the whole batch


def test_seeds_to_the_end_of_the_range():
    assert sorted(row for _, row in shown(ROWS, 1, 2**63 - 1, 0, ROWS)) == list(range(ROWS))


# --- the toy ---------------------------------------------------------------------------------------------------------


class Numbers(Dataset):
    """Row i is always the same; the noise of an image is its index's."""

    def __init__(self, bad: tuple[int, ...] = ()):
        self.x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(11))
        self.x[list(bad)] = float("nan")

    def __len__(self) -> int:
        return ROWS

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        index, row = torch.tensor(pairs).unbind(1)
        return {"index": index, "row": row, "x": self.x[row] + (0.01 * index).sin()[:, None]}


class Toy:
    """A linear autoencoder and, from image 24 on, a critic. ``act`` is called with the images seen so far."""

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        rows: Numbers | None = None,
        dropout: float = 0.25,
        act: Callable[[int], None] = lambda images: None,
        ema: float = 0.9,
    ):
        self.act, self.rows, self.files, self.seen = act, rows or Numbers(), [], []
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))
        critic = nn.Linear(4, 1)
        self.players = [
            self.player("net", net, self.loss, accelerator, ema, 0),
            self.player("critic", critic, self.critic_loss, accelerator, 0.0, 24),
        ]

    def player(self, name, module, loss, accelerator, decay, start) -> Player:
        config = Optimizer(learning_rate=1e-2, lr_scheduler="cosine")
        prepared = accelerator.prepare(module)
        optimizer = GuardedAdamW(module.parameters(), config, 40, 3)
        return Player(name, prepared, loss, optimizer, EMA(module.parameters(), decay), start)

    def loss(self, batch: dict[str, Tensor], images: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.act(images)
        self.seen += batch["index"].tolist()
        loss = (self.players[0].module(batch["x"]) - batch["x"]).square().mean()
        return loss, {"loss": loss}

    def critic_loss(self, batch: dict[str, Tensor], images: int) -> tuple[Tensor, dict[str, Tensor]]:
        assert images >= 24
        loss = (self.players[1].module(batch["x"]) - 1).square().mean()
        return loss, {"critic_loss": loss}

    def held_out(self) -> dict[str, float]:
        net = self.players[0]
        with net.ema.swapped(), torch.no_grad():
            return {"held_out": net.optimizer.parameters[0].square().sum().item()}

    def sample(self, file: Path) -> None:
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
                ("ema", p.ema.state_dict()),
            )
            for k, v in flat.items()
        }


EVERY = {"log_every": 8, "validate_every": 24, "sample_every": 24, "checkpoint_every": 24}
IMAGES = 96


def settings(**kw) -> Train:
    return Train(**{"images": IMAGES, "batch_size": 4, "gradient_accumulation_steps": 2, **EVERY, **kw})


def go(run: Path, *, inputs: dict[str, str] | None = None, config: dict | None = None, **toy: Any) -> Toy:
    """Train a new toy in ``run``: what a fresh process does."""
    accelerator = Accelerator(cpu=True)
    task = Toy(accelerator, **toy)
    train(task, settings(**(config or {})), run=run, seed=5, accelerator=accelerator, inputs=inputs or {"data": "a"})
    return task


def logged(run: Path) -> list[dict[str, float]]:
    """The log without what the clock on the wall says."""
    rows, broken = read_log(run / "log" / "metrics.jsonl")
    assert not broken
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def assert_same(a: Toy, b: Toy) -> None:
    one, two = a.state(), b.state()
    assert one.keys() == two.keys()
    assert [k for k in one if not one[k].equal(two[k])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Toy, list[dict[str, float]]]:
    """A run in one go: the task at its end, and its log."""
    run = tmp_path_factory.mktemp("whole")
    return go(run), logged(run)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(tmp_path: Path):
    run = tmp_path / "run"
    task = go(run)
    assert task.seen == list(range(IMAGES))
    assert [p.optimizer.steps for p in task.players] == [12, 9]  # the critic joins at image 24, after 3 steps
    assert [f.name for f in task.files] == [f"images_{n:09d}.png" for n in (24, 48, 72, 96)]
    assert [p.name for p in checkpoint.listed(run / "checkpoints")] == ["images_000000072", "images_000000096"]
    rows = [json.loads(line) for line in (run / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [r["images"] for r in rows if "loss" in r] == list(range(8, 97, 8))
    assert [r["images"] for r in rows if "held_out" in r] == [24, 48, 72, 96]
    assert all({"lr", "net_grad_norm", "images_per_second"} <= r.keys() for r in rows if "loss" in r)
    assert [r["images"] for r in rows if "critic_loss" in r] == list(range(32, 97, 8))
    assert rows[0]["loss"] > rows[-2]["loss"]


def test_a_finished_run_is_left_alone(tmp_path: Path):
    go(tmp_path)
    accelerator = Accelerator(cpu=True)
    task = Toy(accelerator)
    again = train(task, settings(), run=tmp_path, seed=5, accelerator=accelerator, inputs={"data": "a"})
    assert again is False
    assert task.seen == []


def test_accumulation_is_a_larger_batch(tmp_path: Path):
    """Two micro-batches of 4 and one of 8 are the same mean: sums in another order, 1e-7 of weights near 1,
    amplified by Adam's division in each of 12 steps of 1e-2."""
    two = go(tmp_path / "a", dropout=0.0)
    one = go(tmp_path / "b", dropout=0.0, config={"batch_size": 8, "gradient_accumulation_steps": 1})
    assert two.seen == one.seen
    for p, q in zip(two.players, one.players, strict=True):
        for x, y in zip(p.optimizer.parameters, q.optimizer.parameters, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_the_clock_may_end_within_a_step(tmp_path: Path):
    task = go(tmp_path, config={"images": 90})
    assert len(task.seen) == 96  # the last step is a whole one
    assert checkpoint.listed(tmp_path / "checkpoints")[-1].name == "images_000000096"


def test_the_loss_of_a_log_line_is_the_mean_since_the_last(tmp_path: Path, whole):
    go(tmp_path, config={"log_every": 24})
    single = {r["images"]: r["loss"] for r in whole[1] if "loss" in r}
    for row in (r for r in logged(tmp_path) if "loss" in r):
        mean = sum(single[row["images"] - k] for k in (0, 8, 16)) / 3
        assert row["loss"] == pytest.approx(mean, rel=1e-6)


def test_the_average_warms_up_with_its_own_player(tmp_path: Path, monkeypatch):
    """Step 0 of a player that joins late is its first, not the run's."""
    steps: dict[int, list[int]] = {}
    plain = EMA.update
    monkeypatch.setattr(EMA, "update", lambda ema, step: (steps.setdefault(id(ema), []).append(step), plain(ema, step)))
    task = go(tmp_path)
    assert [steps[id(p.ema)] for p in task.players] == [list(range(12)), list(range(9))]


# --- stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", [0, 16, 24, 64])
def test_an_interrupted_run_ends_as_if_it_had_not_been(when: int, number: int, tmp_path: Path, whole):
    def stop(images: int) -> None:
        if images == when and not caught:
            caught.append(images)
            os.kill(os.getpid(), number)

    caught: list[int] = []
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as stopped:
        go(tmp_path, act=stop)
    assert stopped.value.code == 75
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert checkpoint.listed(tmp_path / "checkpoints")[-1].name == f"images_{when + 8:09d}"  # that step was finished
    torch.rand(17)  # a fresh process has another state of the global generator, which the dropout draws from
    task = go(tmp_path)
    assert task.seen == list(range(when + 8, IMAGES))
    assert_same(task, whole[0])
    assert logged(tmp_path) == whole[1]


def test_a_signal_in_the_last_step_is_no_interruption(tmp_path: Path, whole):
    def stop(images: int) -> None:
        if images == 88 and not caught:
            caught.append(images)
            os.kill(os.getpid(), signal.SIGTERM)

    caught: list[int] = []
    assert_same(go(tmp_path, act=stop), whole[0])
    assert caught == [88]


def test_a_second_signal_leaves_at_once(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, act=lambda images: os.kill(os.getpid(), signal.SIGINT))  # one in each micro-batch
    assert checkpoint.listed(tmp_path / "checkpoints") == []


def forked(f: Callable[..., Any], *args: Any) -> ForkProcess:
    """A process of its own, with the modules that are imported already."""
    process = mp.get_context("fork").Process(target=f, args=args)
    process.start()
    return process


def exit_code(process: ForkProcess) -> int | None:
    process.join(60)
    if hung := process.is_alive():
        process.kill()
        process.join()
    return None if hung else process.exitcode


def killed(run: Path) -> None:
    calls = []

    def act(images: int) -> None:
        calls.append(images)
        if calls.count(64) == 2:  # between the micro-batches
            os.kill(os.getpid(), signal.SIGKILL)

    go(run, act=act)


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, whole):
    """SIGKILL in the midst of a step, two steps after the checkpoint at 48, and a line of the log half written."""
    assert exit_code(forked(killed, tmp_path)) == -signal.SIGKILL
    assert checkpoint.listed(tmp_path / "checkpoints")[-1].name == "images_000000048"
    log = tmp_path / "log" / "metrics.jsonl"
    assert logged(tmp_path)[-1]["images"] == 64
    log.write_text(log.read_text() + '{"images": 72, "lo')
    task = go(tmp_path)
    assert task.seen == list(range(48, IMAGES))
    assert_same(task, whole[0])
    assert logged(tmp_path) == whole[1]
    assert len(log.read_text().splitlines()) == len(whole[1])  # each image once in the file too


class SlowNumbers(Numbers):
    """Whoever loads them is always waited for, and at image 44 the whole group of processes is told to stop."""

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        if pairs[0][0] == 44:
            os.killpg(os.getpgid(0), signal.SIGTERM)
        time.sleep(0.05)
        return super().__getitems__(pairs)


def stopped_as_a_group(run: Path) -> None:
    os.setpgrp()
    go(run, rows=SlowNumbers(), config={"num_workers": 1})


def test_a_signal_to_the_whole_group_spares_the_loaders_workers(tmp_path: Path, whole):
    """Ctrl-C at a terminal, and most schedulers, signal every process of the run: the step must still end."""
    assert exit_code(forked(stopped_as_a_group, tmp_path)) == 75
    assert checkpoint.listed(tmp_path / "checkpoints")[-1].name == "images_000000048"
    assert_same(go(tmp_path), whole[0])


def test_other_inputs_are_refused(tmp_path: Path):
    go(tmp_path, inputs={"data": "a", "vae": "b"}, config={"images": 24})
    before = (tmp_path / "log" / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"images_000000024: was trained from another vae than .*output_dir"):
        go(tmp_path, inputs={"data": "a", "vae": "c"})
    assert (tmp_path / "log" / "metrics.jsonl").read_text() == before
    assert go(tmp_path, inputs={"data": "a", "vae": "b"}).seen == list(range(24, IMAGES))


def test_another_network_is_refused(tmp_path: Path, monkeypatch):
    go(tmp_path, config={"images": 24})
    plain = Toy.player

    def wider(self, name, module, *args):
        return plain(self, name, nn.Sequential(module, nn.Linear(4, 4)) if name == "net" else module, *args)

    monkeypatch.setattr(Toy, "player", wider)
    with pytest.raises(CheckpointError, match=r"images_000000024: net\.safetensors does not fit"):
        go(tmp_path)


def test_other_sizes_are_refused(tmp_path: Path, monkeypatch):
    """Also sizes that a copy would stretch: one number fits every tensor."""
    go(tmp_path, config={"images": 24})
    plain = Toy.player

    def wider(self, name, module, *args):
        return plain(self, name, nn.Linear(4, 3) if name == "critic" else module, *args)

    monkeypatch.setattr(Toy, "player", wider)
    with pytest.raises(CheckpointError, match=r"images_000000024: critic\.safetensors does not fit, first: "):
        go(tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    go(tmp_path, config={"images": 48})
    newest = checkpoint.listed(tmp_path / "checkpoints")[-1]
    (newest / "net.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"000000048/net\.safetensors.*go on from .*images_000000024"):
        go(tmp_path)


# --- gradients that are not finite -----------------------------------------------------------------------------------


def test_one_bad_row_skips_its_steps_and_is_named(tmp_path: Path, caplog):
    order = [row for _, row in shown(ROWS, 1, 5, 0, IMAGES)]
    row = order[75]  # of the last whole epoch
    with caplog.at_level(logging.WARNING, "training.loop"):
        task = go(tmp_path, rows=Numbers(bad=(row,)))
    hit = [n for n in range(0, IMAGES, 8) if row in order[n : n + 8]]
    assert len(hit) == 4 and hit[-1] < IMAGES - 8  # once per epoch, and good steps after it
    warnings = [r.getMessage() for r in caplog.records]
    net = [f"at image {n}, rows {order[n : n + 8]}" for n in hit]
    assert len(warnings) == len(net)
    assert all(where in text for where, text in zip(net, warnings, strict=True))
    assert all("updates skipped, no finite gradient" in text for text in warnings)
    assert len(task.seen) == IMAGES  # training went on
    state = task.state()
    assert all(v.isfinite().all() for v in state.values())
    assert state["net optimizer 0.step"] == 12 - len(hit)
    assert not torch.equal(state["net weights 0"], Toy(Accelerator(cpu=True)).state()["net weights 0"])


def test_always_bad_ends_the_run(tmp_path: Path):
    act = []
    with pytest.raises(Diverged, match=r"3 in a row: the run stops.*these rows") as caught:
        go(tmp_path, rows=Numbers(bad=tuple(range(ROWS))), config={"max_skipped_steps": 3}, act=act.append)
    order = [row for _, row in shown(ROWS, 1, 5, 0, IMAGES)]
    assert str(order[16:24]) in str(caught.value)
    assert max(act) == 16  # three steps and no more
    assert checkpoint.listed(tmp_path / "checkpoints") == []


def test_the_weights_of_a_diverged_run_are_finite(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    task = Toy(accelerator, rows=Numbers(bad=tuple(range(ROWS))))
    before = task.state()
    config = settings(max_skipped_steps=2, log_every=24)
    with pytest.raises(Diverged):
        train(task, config, run=tmp_path, seed=5, accelerator=accelerator, inputs={})
    after = task.state()
    assert all(after[k].equal(v) for k, v in before.items() if "ema" not in k)
    for k, v in before.items():  # the average of equal numbers, but for its own rounding
        torch.testing.assert_close(after[k], v, rtol=1e-6, atol=0)


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(tmp_path: Path):
    """Two of three steps are bad, three times over."""
    accelerator = Accelerator(cpu=True)
    task = Toy(accelerator)
    plain = task.loss

    def loss(batch, images):
        value, named = plain(batch, images)
        return value * (float("nan") if images // 8 % 3 else 1.0), named

    task.players[0].loss = loss
    train(task, settings(max_skipped_steps=3), run=tmp_path, seed=5, accelerator=accelerator, inputs={})
    assert task.players[0].optimizer.tensors()["0.step"] == 4


# --- two processes ---------------------------------------------------------------------------------------------------


def one_of_two(run: Path, rank: int, port: int, stop: int) -> None:
    """What torchrun gives a process, and what it then runs. ``stop``: where one process alone gets a signal."""
    AcceleratorState._reset_state(True)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in place.items()}, ACCELERATE_USE_CPU="true")

    def act(images: int) -> None:
        if images == stop and rank == 1 and not calls:
            calls.append(images)
            os.kill(os.getpid(), signal.SIGTERM)

    calls: list[int] = []
    accelerator = Accelerator(cpu=True)
    assert (accelerator.num_processes, accelerator.process_index) == (2, rank)
    task = Toy(accelerator, dropout=0.0, act=act)
    try:
        train(task, settings(), run=run, seed=5, accelerator=accelerator, inputs={"data": "a"})
    finally:
        torch.distributed.destroy_process_group()


def pair(run: Path, stop: int = -1) -> list[int | None]:
    """The exit codes of two processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [forked(one_of_two, run, rank, port, stop) for rank in range(2)]
    return [exit_code(process) for process in processes]


def test_two_processes_are_one_with_the_double_batch(tmp_path: Path):
    """Gradients are averaged over gloo: the same mean in another order, as in the accumulation test. The second time
    one of the two is told to stop: both do, and both go on."""
    go(tmp_path / "one", dropout=0.0, config={"batch_size": 8})
    assert pair(tmp_path / "two") == [0, 0]
    assert pair(tmp_path / "three", stop=32) == [75, 75]
    assert checkpoint.listed(tmp_path / "three" / "checkpoints")[-1].name == "images_000000048"
    assert pair(tmp_path / "three") == [0, 0]
    expected, told = checkpoint.load(checkpoint.listed(tmp_path / "one" / "checkpoints")[-1])
    for name in ("two", "three"):
        found, state = checkpoint.load(checkpoint.listed(tmp_path / name / "checkpoints")[-1])
        assert state == told
        assert (state["images"], state["steps"]) == (96, 6)
        for file in ("net", "critic", "net_ema"):
            assert found[file].keys() == expected[file].keys()
            for k, v in expected[file].items():
                torch.testing.assert_close(found[file][k], v, rtol=0, atol=1e-6)
        # written once, not by each process
        assert [r["images"] for r in logged(tmp_path / name)] == [r["images"] for r in logged(tmp_path / "one")]
