"""What the loop does when something goes wrong: no finite gradient, spikes, a lack of memory, workers that die."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.toy import IMAGES, ROWS, Numbers, Toy, differing, ended, go, logged, settings, started
from training import checkpoint, guards
from training.clock import ImageClock
from training.gradients import OutOfMemory, is_out_of_memory
from training.guards import Diverged, Watchman
from training.loader import LostWorker
from training.loop import Interrupted, train
from training.optim import Guarded
from training.schema.optim import AdamW

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


class _Event:
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


@pytest.fixture
def late(monkeypatch):
    """A step's numbers are read one step late, as on a GPU."""
    init = Watchman.__init__

    def on_gpu(self: Watchman, *args) -> None:
        init(self, *args)
        self.late = True

    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(Watchman, "__init__", on_gpu)


def _stopped(run: Path, bad: tuple[int, ...] = ()) -> dict:
    """What the checkpoint of a stop knows: SIGTERM comes in the step from image 32, and is obeyed one step later."""

    def act(images: int) -> None:
        if images == 32:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        go(run, act=act, rows=Numbers(bad=bad), config={"checkpoint_every": 1000})
    return checkpoint.load(checkpoint.listed(run / "checkpoints")[-1])[1]


def test_a_checkpoint_made_on_a_stop_knows_its_last_step(late, tmp_path: Path, caplog):
    state = _stopped(tmp_path / "a")
    assert state["images"] == 48 and state["watch"]["means"]["net"][1] == state["steps"] == 6
    row = next(row for row in ORDER[40:48] if row not in ORDER[:40] or ORDER[:40].count(row) < 2)
    with caplog.at_level(logging.WARNING, "training"):
        state = _stopped(tmp_path / "b", bad=(row,))
    assert any("net: update skipped, no finite gradient at image 40, rows" in text for text in warned(caplog))
    assert state["watch"]["skips"]["net"] == 1


def test_a_run_that_was_stopped_is_watched_as_one_that_was_not(late, tmp_path: Path):
    _stopped(tmp_path / "a")
    go(tmp_path / "a")
    go(tmp_path / "b")
    one, two = (checkpoint.load(checkpoint.listed(tmp_path / run / "checkpoints")[-1])[1] for run in "ab")
    assert one["watch"] == two["watch"]


def test_the_best_checkpoint_knows_its_last_step(late, tmp_path: Path):
    go(tmp_path, config={"keep_best": True, "best_metric": "held_out", "checkpoint_every": 1000, "images": 48})
    best = checkpoint.load(tmp_path / "checkpoints" / "images_000000024")[1]
    assert best["watch"]["means"]["net"][1] == best["steps"] == 3


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


SAID = {
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB": True,
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call": True,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": True,
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED": True,
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED": True,
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.": True,
    "Unable to find a valid cuDNN algorithm to run convolution": True,
    "GET was unable to find an engine to execute this computation": True,
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`": True,
    "HIP out of memory. Tried to allocate 20.00 MiB": True,
    "MPS backend out of memory (MPS allocated: 8.00 GB)": True,
    "Triton Error [CUDA]: out of memory": True,
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.27.5\nncclUnhandledCudaError: Call "
    "to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'": True,
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 4 bytes": True,
    "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "8 bytes. Error code 12 (Cannot allocate memory)": True,
    "CUDA error: an illegal memory access was encountered": False,
    "CUDA error: device-side assert triggered": False,
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`": False,
    "out of resource: shared memory, Required: 264224, Hardware limit: 232448. Reducing block sizes may help.": False,
    "NCCL error: remote process exited or there was a network error": False,
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)": False,
}  # fmt: skip


@pytest.mark.parametrize("text", SAID)
def test_a_lack_of_memory_is_known_by_what_libraries_say(text: str):
    assert is_out_of_memory(RuntimeError(text)) == SAID[text]
    assert is_out_of_memory(torch.OutOfMemoryError(text)) and not is_out_of_memory(ValueError(text))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("step", r"in the optimizer's step of net at image 0: CUDA error: out of memory; a smaller batch does not help:"
                 r" adamw keeps 8 bytes for each of the 76 weights .* adamw_8bit .* Nothing of this step is saved"),
        ("held_out", "while validating at image 24: CUDA error: out of memory; it holds the weights twice"),
        ("sample", "while drawing samples at image 24: CUDA error: out of memory; .* the newest checkpoint is whole"),
    ],
)  # fmt: skip
def test_a_lack_of_memory_outside_of_the_gradients_is_named(where: str, said: str, tmp_path: Path, monkeypatch):
    def full(*_args) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(Guarded if where == "step" else Toy, where, full)
    with pytest.raises(OutOfMemory, match=said):
        go(tmp_path, config={"on_out_of_memory": "halve"})
    assert checkpoint.listed(tmp_path / "checkpoints") == []


def test_fused_adamw_makes_all_its_state_before_it_changes_a_weight(monkeypatch):
    """A first step that lacks memory for the state of the last weight leaves the others as they were."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    guarded = Guarded(net.named_parameters(), AdamW(learning_rate=1.0), 100)
    net(torch.ones(2, 4)).sum().backward()
    before, zeros, count = [p.detach().clone() for p in net.parameters()], torch.zeros_like, iter(range(100))

    def full(*args, **kw) -> Tensor:
        if next(count) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*args, **kw)

    monkeypatch.setattr(torch, "zeros_like", full)
    with pytest.raises(torch.OutOfMemoryError):
        guarded.step()
    assert all(p.equal(q) for p, q in zip(net.parameters(), before, strict=True))


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


def test_a_worker_whose_death_is_noticed_in_the_step_is_named(tmp_path: Path):
    """torch's signal handler raises it wherever the process is; here, where the loss is computed."""

    def die(images: int) -> None:
        if images == 32:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(LostWorker, match=r"train\.num_workers 1: .*died or hung .*killed by signal"):
        go(tmp_path, act=die, config={"num_workers": 1})


def test_a_signal_to_the_whole_group_spares_the_loaders_workers(tmp_path: Path):
    """Ctrl-C at a terminal, and most schedulers, signal every process of the run: the step must still end."""
    (process,) = started(tmp_path / "a", group=True, rows=Fatal("signalled"), config={"num_workers": 1})
    assert ended([process]) == [75]
    assert checkpoint.images_of(checkpoint.listed(tmp_path / "a" / "checkpoints")[-1]) == 48
    task, whole = go(tmp_path / "a"), go(tmp_path / "b")
    assert differing(task.state(), whole.state()) == []


def test_the_signals_are_those_that_schedulers_send():
    assert set(guards.STOPS) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
