"""What the loop does when something goes wrong: no finite gradient, spikes, a lack of memory, workers that die."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from tests.toy import IMAGES, ROWS, Numbers, Toy, differing, ended, go, logged, settings, started
from training import checkpoint, guards
from training.clock import ImageClock
from training.gradients import OutOfMemory
from training.guards import Diverged, Watchman
from training.loop import Interrupted, train

ORDER = [row for batch in ImageClock(ROWS, 1, 5, 0, IMAGES) for _, row in batch]


def warned(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("training")]


# --- gradients that are not finite -----------------------------------------------------------------------------------


def test_one_bad_row_skips_its_steps_and_is_named(tmp_path: Path, caplog):
    row = ORDER[75]  # of the last whole epoch
    with caplog.at_level(logging.WARNING, "training"):
        task = go(tmp_path, rows=Numbers(bad=(row,)), config={"log_every": 8})
    hit = [n for n in range(0, IMAGES, 8) if row in ORDER[n : n + 8]]
    assert len(hit) == 4 and hit[-1] < IMAGES - 8  # once per epoch, and good steps after it
    told = [text for text in warned(caplog) if text.startswith("net: update skipped, no finite gradient")]
    assert len(told) == len(hit)
    assert all(f"at image {n}, rows {ORDER[n : n + 8]}" in text for n, text in zip(hit, told, strict=True))
    assert len(task.seen) == IMAGES  # training went on
    state = task.state()
    assert all(v.isfinite().all() for v in state.values())
    assert state["net optimizer 0.step"] == 12 - len(hit)
    assert not torch.equal(state["net weights 0"], Toy(Accelerator(cpu=True)).state()["net weights 0"])
    losses = {r["images"] - 8: r["loss"] for r in logged(tmp_path) if "lr" in r}
    both = [n for n in hit if row in ORDER[n : n + 4] and row in ORDER[n + 4 : n + 8]]
    assert not both and all(loss == loss for loss in losses.values())  # the mean of the finite micro-batch


def test_always_bad_ends_the_run_at_once(tmp_path: Path):
    """However seldom it logs."""
    act = []
    with pytest.raises(Diverged, match=r"3 in a row: the run stops.*these rows") as caught:
        config = {"max_skipped_steps": 3, "log_every": 1000}
        go(tmp_path, rows=Numbers(bad=tuple(range(ROWS))), config=config, act=act.append)
    assert str(ORDER[16:24]) in str(caught.value)
    assert max(act) == 16  # three steps and no more
    assert checkpoint.listed(tmp_path / "checkpoints") == []


def test_the_state_of_a_diverged_run_is_untouched(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    task = Toy(accelerator, rows=Numbers(bad=tuple(range(ROWS))))
    before = task.state()
    with pytest.raises(Diverged):
        train(task, settings(max_skipped_steps=2), run=tmp_path, seed=5, accelerator=accelerator, inputs={})
    after = task.state()
    assert all(after[k].equal(v) for k, v in before.items())  # weights and averages, bit for bit
    assert all(v.count_nonzero() == 0 for k, v in after.items() if k not in before)  # Adam's moments


def bad_where(when) -> type[Toy]:
    class Bad(Toy):
        def loss(self, batch: dict[str, Tensor], images: int) -> tuple[Tensor, dict[str, Tensor]]:
            value, named = super().loss(batch, images)
            return value * when(images), named

    return Bad


def run_of(task: Toy, accelerator: Accelerator, run: Path, **config) -> None:
    train(task, settings(**config), run=run, seed=5, accelerator=accelerator, inputs={"data": "a"})


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(tmp_path: Path):
    """Two of three steps are bad, three times over."""
    accelerator = Accelerator(cpu=True)
    task = bad_where(lambda images: float("nan") if images // 8 % 3 else 1.0)(accelerator)
    run_of(task, accelerator, tmp_path, max_skipped_steps=3)
    assert task.players[0].optimizer.tensors()["0.step"] == 4


def test_the_count_goes_on_after_a_resume(tmp_path: Path):
    """Bad from image 40 on, stopped after two of them: the third in a row ends the run."""
    accelerator, seen = Accelerator(cpu=True), []

    def act(images: int) -> None:
        seen.append(images)
        if images == 48 and seen.count(48) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    bad = bad_where(lambda images: float("nan") if images >= 40 else 1.0)
    with pytest.raises(Interrupted):
        run_of(bad(accelerator, act=act), accelerator, tmp_path, max_skipped_steps=3)
    with pytest.raises(Diverged, match="at image 56"):
        run_of(bad(accelerator, act=act), accelerator, tmp_path, max_skipped_steps=3)


def test_the_host_does_not_wait_for_a_gpu(monkeypatch):
    """On a GPU a step's numbers are read while the next one is computed: the answer is that of the step before."""
    reads: list[int] = []

    class Event:
        def __init__(self):
            self.number = len(made)
            made.append(self)

        def record(self) -> None: ...
        def synchronize(self) -> None:
            reads.append(self.number)

    made: list[Event] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watchman = Watchman(settings(max_skipped_steps=2), Accelerator(cpu=True))
    watchman.late = True
    good, bad, rows = torch.tensor(0.0), torch.tensor(1.0), torch.arange(4)
    loss = torch.tensor(1.0)
    assert watchman.look(0, True, rows, {"net": (loss, bad)}) is False and reads == []
    assert watchman.look(8, False, rows, {"net": (loss, good)}) is True and reads == [0]
    assert watchman.look(16, False, rows, {"net": (loss, bad)}) is False and reads == [0, 1]
    assert watchman.look(24, False, rows + 4, {"net": (loss, bad)}) is False
    with pytest.raises(Diverged, match=r"image 24, rows \[4, 5, 6, 7\]; 2 in a row"):
        watchman.settle()  # what is still on its way is read before a checkpoint and at the end
    assert reads == [0, 1, 2, 3]


# --- spikes ----------------------------------------------------------------------------------------------------------


def test_a_spike_is_logged_with_its_rows(tmp_path: Path, caplog):
    accelerator = Accelerator(cpu=True)
    task = bad_where(lambda images: 40.0 if images == 184 else 1.0)(accelerator)
    with caplog.at_level(logging.WARNING, "training"):
        run_of(task, accelerator, tmp_path, images=240)
    (text,) = warned(caplog)
    order = [row for batch in ImageClock(ROWS, 1, 5, 0, 240) for _, row in batch]
    assert text.startswith("net: loss ") and "times its running mean" in text
    assert "at image 184, " in text
    assert str(order[184:192]) in text
    means = checkpoint.load(checkpoint.listed(tmp_path / "checkpoints")[-1])[1]["watch"]["means"]
    assert means["net"][1] == 29  # the spike is not in the mean


def test_spikes_in_a_row_end_the_run(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    task = bad_where(lambda images: 40.0 if images >= 184 else 1.0)(accelerator)
    with pytest.raises(Diverged, match=r"at image 200, .*; 3 in a row: the run stops"):
        run_of(task, accelerator, tmp_path, images=400, max_spiked_steps=3)
    assert max(task.seen) == 207


def test_spikes_are_not_looked_for_where_none_are_wanted(tmp_path: Path, caplog):
    accelerator = Accelerator(cpu=True)
    task = bad_where(lambda images: 40.0 if images >= 184 else 1.0)(accelerator)
    with caplog.at_level(logging.WARNING, "training"):
        run_of(task, accelerator, tmp_path, images=240, spike_factor=None)
    assert warned(caplog) == []


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_lack_of_memory_says_what_would_fit(tmp_path: Path):
    with pytest.raises(OutOfMemory) as caught:
        go(tmp_path, memory=3, config={"batch_size": 12})
    text = str(caught.value)
    assert "at image 0 with 12 images (train.batch_size 12): tried to allocate 2 GiB" in text
    assert "3 at once fit: set train.batch_size: 3 and train.gradient_accumulation_steps: 8" in text
    with pytest.raises(OutOfMemory, match=r"not even one fits: lower data\.resolution"):
        go(tmp_path, memory=0)


def test_sizes_are_told_as_people_say_them():
    from training.gradients import sizes

    batch = {"index": torch.arange(16), "pictures": torch.zeros(16, 3, 64, 48)}
    assert sizes(batch) == "16 pictures of 3×64×48"
    assert sizes({"index": torch.arange(2), "moments": torch.zeros(2, 8, 4, 4)}) == "2 latents' moments of 8×4×4"


@pytest.mark.parametrize("memory", [4, 2, 1])
def test_halves_have_the_same_mean_loss(memory: int, tmp_path: Path, caplog):
    """The gradient of all pieces is that of the whole: 1e-7 in another order, amplified by Adam as above."""
    config = {"on_out_of_memory": "halve", "batch_size": 8, "gradient_accumulation_steps": 1}
    one = go(tmp_path / "a", dropout=0.0, config=config)
    with caplog.at_level(logging.WARNING, "training"):
        two = go(tmp_path / "b", dropout=0.0, config=config, memory=memory)
    assert len(warned(caplog)) == 3 - memory.bit_length() + 1  # it does not run into it again at each step
    assert two.seen == one.seen
    for p, q in zip(two.players, one.players, strict=True):
        for x, y in zip(p.optimizer.parameters, q.optimizer.parameters, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    for x, y in zip(logged(tmp_path / "a"), logged(tmp_path / "b"), strict=True):
        assert x == pytest.approx(y, rel=1e-4)


def test_halves_are_kept_after_a_resume(tmp_path: Path):
    config = {"on_out_of_memory": "halve", "batch_size": 8, "gradient_accumulation_steps": 1}
    whole = go(tmp_path / "a", config=config, memory=3)
    go(tmp_path / "b", config={**config, "images": 48}, memory=3)
    assert differing(go(tmp_path / "b", config=config, memory=3).state(), whole.state()) == []


def test_another_error_is_no_lack_of_memory(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    task = Toy(accelerator, act=lambda images: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run_of(task, accelerator, tmp_path, on_out_of_memory="halve")


# --- the loader's workers --------------------------------------------------------------------------------------------


class Fatal(Numbers):
    """Its loader dies, or hangs, at image 44."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        if pairs[0][0] == 44:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "hung":
                time.sleep(30)
            else:
                os.killpg(os.getpgid(0), signal.SIGTERM)
        time.sleep(0.02)  # whoever loads is always waited for
        return super().__getitems__(pairs)


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_a_worker_that_is_lost_ends_the_run(how: str, tmp_path: Path):
    before = time.monotonic()
    with pytest.raises(RuntimeError, match=r"train\.num_workers 1: a process that loads the data died or hung"):
        go(tmp_path, rows=Fatal(how), config={"num_workers": 1, "timeout_minutes": 0.02})
    assert time.monotonic() - before < 20
    assert [checkpoint.images_of(p) for p in checkpoint.listed(tmp_path / "checkpoints")] == [24]


def test_a_signal_to_the_whole_group_spares_the_loaders_workers(tmp_path: Path):
    """Ctrl-C at a terminal, and most schedulers, signal every process of the run: the step must still end."""
    (process,) = started(tmp_path / "a", group=True, rows=Fatal("signalled"), config={"num_workers": 1})
    assert ended([process]) == [75]
    assert checkpoint.images_of(checkpoint.listed(tmp_path / "a" / "checkpoints")[-1]) == 48
    task, whole = go(tmp_path / "a"), go(tmp_path / "b")
    assert differing(task.state(), whole.state()) == []


def test_the_signals_are_those_that_schedulers_send():
    assert set(guards.STOPS) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
