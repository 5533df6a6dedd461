"""The loop, with a task so small that every number of it can be checked: runs, stops, and going on."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.toy import IMAGES, ROWS, Flow, Numbers, Toy, differing, go, logged, settings, together
from training import checkpoint, guards
from training.checkpoint import CheckpointError
from training.clock import ImageClock
from training.ema import EMA
from training.loop import Interrupted, train

OFTEN = {"log_every": 8}


def saved(run: Path) -> list[int]:
    return [checkpoint.images_of(p) for p in checkpoint.listed(run / "checkpoints")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Toy, list[dict[str, float]]]:
    """A run in one go: the task at its end, and its log."""
    run = tmp_path_factory.mktemp("whole")
    return go(run), logged(run)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(tmp_path: Path):
    run = tmp_path / "run"
    task = go(run, config=OFTEN)
    assert task.seen == list(range(IMAGES))
    assert [p.optimizer.steps for p in task.players] == [12, 9]  # the critic joins at image 24, after 3 steps
    assert [f.name for f in task.files] == [f"images_{n:09d}.png" for n in (24, 48, 72, 96)]
    assert saved(run) == [72, 96]
    rows = [json.loads(line) for line in (run / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [r["images"] for r in rows if "loss" in r] == list(range(8, 97, 8))
    assert [r["images"] for r in rows if "held_out" in r] == [24, 48, 72, 96]
    assert all({"lr", "net_grad_norm", "images_per_second"} <= r.keys() for r in rows if "loss" in r)
    assert [r["images"] for r in rows if "critic_loss" in r] == list(range(32, 97, 8))
    assert rows[0]["loss"] > rows[-2]["loss"]
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "log"]


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
    assert saved(tmp_path)[-1] == 96


def test_the_loss_of_a_log_line_is_the_mean_since_the_last(tmp_path: Path, whole):
    go(tmp_path, config=OFTEN)
    single = {r["images"]: r["loss"] for r in logged(tmp_path) if "loss" in r}
    lines = [r for r in whole[1] if "loss" in r]
    assert len(lines) == 4
    for row in lines:
        mean = sum(single[row["images"] - k] for k in (0, 8, 16)) / 3
        assert row["loss"] == pytest.approx(mean, rel=1e-6)


def test_averages_are_told_their_own_players_steps_and_the_runs_images(tmp_path: Path, monkeypatch):
    """Step 0 of a player that joins late is its first, not the run's."""
    told: dict[int, list[tuple[int, int]]] = {}
    plain = EMA.update

    def update(ema, step, images, skipped):
        told.setdefault(id(ema), []).append((step, images))
        plain(ema, step, images, skipped)

    monkeypatch.setattr(EMA, "update", update)
    task = go(tmp_path)
    net = [(step, 8 * step + 8) for step in range(12)]
    assert [told[id(p.ema)] for p in task.players] == [net, [(step, 24 + 8 * step + 8) for step in range(9)]]


def test_micro_batches_of_several_buckets_are_not_mixed(tmp_path: Path):
    rows = Numbers()
    rows.bucket = torch.arange(ROWS).remainder(2).numpy().astype("uint16")  # type: ignore[attr-defined]
    shown: list[list[int]] = []
    plain = rows.__getitems__
    rows.__getitems__ = lambda pairs: (shown.append([row % 2 for _, row in pairs]), plain(pairs))[1]  # type: ignore
    task = go(tmp_path, rows=rows)
    assert task.seen == list(range(IMAGES))
    assert len(shown) == IMAGES // 4 and all(len(set(kinds)) == 1 for kinds in shown)
    assert {kinds[0] for kinds in shown} == {0, 1}
    with pytest.raises(CheckpointError, match=r"train\.batch_size was 4 and is 8 now"):
        go(tmp_path, rows=rows, config={"batch_size": 8, "images": 200})


# --- stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("when", [0, 16, 24, 64])
def test_an_interrupted_run_ends_as_if_it_had_not_been(when: int, number: int, tmp_path: Path, whole):
    """Within an epoch, between two micro-batches, and within a line of the log: its mean too is that of all steps."""

    def stop(images: int) -> None:
        if images == when and not caught:
            caught.append(images)
            os.kill(os.getpid(), number)

    caught: list[int] = []
    handlers = [signal.getsignal(s) for s in guards.STOPS]
    with pytest.raises(Interrupted) as stopped:
        go(tmp_path, act=stop)
    assert stopped.value.code == 75
    assert [signal.getsignal(s) for s in guards.STOPS] == handlers
    assert saved(tmp_path)[-1] == when + 8  # that step was finished
    torch.rand(17)  # a fresh process has another state of the global generator, which the dropout draws from
    task = go(tmp_path)
    assert task.seen == list(range(when + 8, IMAGES))
    assert differing(task.state(), whole[0].state()) == []
    assert logged(tmp_path) == whole[1]


@pytest.mark.parametrize("move", ["held_out", "sample"])
def test_a_signal_breaks_off_validation_and_samples(move: str, tmp_path: Path, whole, monkeypatch):
    """At the next layer of a network, not after minutes; the weights are those of an uninterrupted run."""
    calls: list[int] = []

    def long(self: Toy, *_: Any) -> Any:
        with self.players[0].averaged(), torch.no_grad():
            for i in range(100):
                calls.append(i)
                if i == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                self.players[1].module(torch.zeros(1, 4))  # without dropout, which would draw numbers
        raise AssertionError("nobody stopped it")

    with monkeypatch.context() as patched:
        patched.setattr(Toy, move, long)
        with pytest.raises(Interrupted) as stopped:
            go(tmp_path)
    assert stopped.value.code == 75 and calls == [0, 1, 2] and saved(tmp_path)[-1] == 24
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert differing(go(tmp_path).state(), whole[0].state()) == []


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path, capsys):
    with pytest.raises(Interrupted):
        go(tmp_path, act=lambda images: os.kill(os.getpid(), signal.SIGTERM))
    said = " ".join(capsys.readouterr().err.split())
    assert "stopped at 8 images, all is saved; the same command goes on from here" in said
    assert f"ldm train {tmp_path}/config.yaml" in said.replace(" ", "").replace("ldmtrain", "ldm train ")


def test_a_signal_in_the_last_step_is_no_interruption_but_ends_the_command(tmp_path: Path, whole, caplog):
    def stop(images: int) -> None:
        if images == 88 and not caught:
            caught.append(images)
            os.kill(os.getpid(), signal.SIGTERM)

    caught: list[int] = []
    stages = guards.Stages()
    stages.begin("the first")  # nobody has asked yet
    assert differing(go(tmp_path, act=stop).state(), whole[0].state()) == []
    assert caught == [88]
    with caplog.at_level("WARNING", "training"), pytest.raises(Interrupted) as stopped:
        stages.begin("the next")
    assert stopped.value.code == 75
    assert f"{tmp_path} is done, and the next was not begun: a signal asked to stop" in caplog.text
    guards.Stages().begin("the next command's")


def test_a_second_signal_leaves_at_once(tmp_path: Path):
    assert together(tmp_path, at={0: ("twice", 0)}) == [-signal.SIGTERM]
    assert saved(tmp_path) == []


def test_a_signal_that_a_launcher_repeats_is_one(tmp_path: Path):
    """Ctrl-C goes to the whole group, and torchrun hands it on once more."""
    with pytest.raises(Interrupted):
        go(tmp_path, act=lambda images: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert saved(tmp_path) == [8]


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, whole):
    """SIGKILL two steps after the checkpoint at 48, and a line of the log half written."""
    assert together(tmp_path, at={64: (signal.SIGKILL, 0)}) == [-signal.SIGKILL]
    assert saved(tmp_path)[-1] == 48
    log = tmp_path / "log" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"images": 56, "loss": 1}\n{"images": 72, "lo')
    task = go(tmp_path)
    assert task.seen == list(range(48, IMAGES))
    assert differing(task.state(), whole[0].state()) == []
    assert logged(tmp_path) == whole[1]
    assert len(log.read_text().splitlines()) == len(whole[1])  # each image once in the file too


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was(workers: int, tmp_path: Path):
    """What workers have loaded ahead does not count, and the turn is that of the worker whose batch comes next."""
    config = {"num_workers": workers, "gradient_accumulation_steps": 3, "batch_size": 3, "images": 63}
    together_ = go(tmp_path / "a", rows=Flow(3), config=config)
    assert together_.seen == list(range(63))

    def stop(images: int) -> None:
        if images == 18:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        go(tmp_path / "b", rows=Flow(3), config=config, act=stop)
    task = go(tmp_path / "b", rows=Flow(3), config=config)
    assert task.seen == list(range(27, 63))
    assert differing(task.state(), together_.state()) == []
    assert logged(tmp_path / "b") == logged(tmp_path / "a")
    if workers:
        with pytest.raises(CheckpointError, match=r"train\.num_workers 1: .* read by 2"):
            go(tmp_path / "b", rows=Flow(3), config={**config, "num_workers": 1, "images": 200})


def test_a_stream_that_stands_at_one_place_goes_on_with_other_workers(tmp_path: Path):
    config = {"gradient_accumulation_steps": 2, "batch_size": 4}
    whole = go(tmp_path / "a", rows=Flow(4), config=config)
    go(tmp_path / "b", rows=Flow(4), config={**config, "num_workers": 2, "images": 48})
    assert differing(go(tmp_path / "b", rows=Flow(4), config=config).state(), whole.state()) == []


# --- from which checkpoint -------------------------------------------------------------------------------------------


def test_other_inputs_are_refused(tmp_path: Path):
    go(tmp_path, inputs={"data": "a", "vae": "b"}, config={"images": 24})
    before = (tmp_path / "log" / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"images_000000024: was trained from another vae than .*output_dir"):
        go(tmp_path, inputs={"data": "a", "vae": "c"})
    assert (tmp_path / "log" / "metrics.jsonl").read_text() == before
    assert go(tmp_path, inputs={"data": "a", "vae": "b"}).seen == list(range(24, IMAGES))


@pytest.mark.parametrize(
    ("which", "net"), [("net", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), ("critic", nn.Linear(4, 3))]
)
def test_another_network_is_refused(which: str, net: nn.Module, tmp_path: Path, monkeypatch):
    """Also sizes that a copy would stretch: one number fits every tensor."""
    go(tmp_path, config={"images": 24})
    plain = Toy.player
    monkeypatch.setattr(Toy, "player", lambda self, name, *a: plain(self, name, net if name == which else a[0], *a[1:]))
    with pytest.raises(CheckpointError, match=rf"images_000000024: {which}\.safetensors does not fit, first: "):
        go(tmp_path)


def test_another_number_of_rows_is_refused(tmp_path: Path):
    class Fewer(Numbers):
        def __len__(self) -> int:
            return ROWS - 1

    go(tmp_path, config={"images": 24})
    with pytest.raises(CheckpointError, match="number of rows was 23 and is 22 now"):
        go(tmp_path, rows=Fewer())


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    go(tmp_path, config={"images": 72, "keep_last": 3})
    *_, middle, newest = checkpoint.listed(tmp_path / "checkpoints")
    (newest / "net.safetensors").write_bytes(b"")
    (middle / "rng.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"000000072/net\.safetensors.*go on from .*images_000000024"):
        go(tmp_path)  # the one at 48 is damaged too, so it is not offered


@pytest.mark.parametrize("part", ["rng", "window", "net_ema", "critic_optimizer", "net"])
def test_a_missing_part_is_refused_though_the_manifest_does_not_list_it(part: str, tmp_path: Path):
    go(tmp_path, config={"images": 24})
    folder = checkpoint.listed(tmp_path / "checkpoints")[-1]
    (folder / f"{part}.safetensors").unlink()
    manifest = folder / checkpoint.MANIFEST
    hashes = json.loads(manifest.read_text())
    del hashes[f"{part}.safetensors"]
    manifest.write_text(json.dumps(hashes))
    with pytest.raises(CheckpointError, match=rf"images_000000024: has no {part}, without which"):
        go(tmp_path)


def test_never_refuses_what_is_there(tmp_path: Path):
    go(tmp_path, config={"images": 24}, resume="never")
    with pytest.raises(CheckpointError, match=r"up to images_000000024, and --resume never"):
        go(tmp_path, resume="never")


def test_an_older_checkpoint_is_gone_on_from(tmp_path: Path, whole):
    """What is newer is put aside: neither taken for the newest afterwards, nor deleted."""
    go(tmp_path, config={"keep_last": 4})
    task = go(tmp_path, resume=tmp_path / "checkpoints" / "images_000000048", config={"keep_last": 4, "images": 64})
    assert task.seen == list(range(48, 64))
    assert saved(tmp_path) == [24, 48, 64]
    assert saved_aside(tmp_path) == ["images_000000072", "images_000000096"]
    assert differing(go(tmp_path).state(), whole[0].state()) == []


def saved_aside(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints" / "set_aside").iterdir())


def test_another_runs_checkpoint_can_be_the_start(tmp_path: Path, whole):
    go(tmp_path / "a", config={"images": 48})
    there = checkpoint.listed(tmp_path / "a" / "checkpoints")[-1]
    assert differing(go(tmp_path / "b", resume=there).state(), whole[0].state()) == []
    assert saved(tmp_path / "a")[-1] == 48
    with pytest.raises(CheckpointError, match=r"belongs to another run, and .* holds checkpoints of its own"):
        go(tmp_path / "b", resume=there)
    with pytest.raises(CheckpointError, match=r"is no checkpoint; expected a folder images_"):
        go(tmp_path / "c", resume=tmp_path / "a")


def test_the_rows_follow_the_seeds_clock(tmp_path: Path):
    """The batches that the loop hands out are the clock's, in its order."""
    rows = Numbers()
    seen: list[tuple[int, int]] = []
    plain = rows.__getitems__
    rows.__getitems__ = lambda pairs: (seen.extend(pairs), plain(pairs))[1]  # type: ignore[method-assign]
    go(tmp_path, rows=rows)
    assert seen == [pair for batch in ImageClock(ROWS, 4, 5, 0, IMAGES) for pair in batch]
