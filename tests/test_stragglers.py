"""Times of the steps, by process, and the slow one that is named."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.toy import Numbers, go, together
from training import stragglers
from training.evaluate.report import read_log
from training.stragglers import StepTimes, slow_processes

SLEEP = 0.08  # seconds that the slow process takes longer for a batch, of which a step has two


@pytest.mark.parametrize("share_out", [False, True], ids=["ddp", "fsdp2"])
def test_a_slow_reader_is_named_and_the_others_wait_for_it(share_out: bool, tmp_path: Path):
    run, said = tmp_path / "run", tmp_path / "said"
    config = {"images": 192, "log_every": 96, "sample_every": 96, "validate_every": 1000, "checkpoint_every": 1000}
    # The first process draws a grid for a second, which is no wait of the other one's.
    how: dict[str, Any] = {"config": config, "share_out": share_out, "draw": 1.0}
    codes = together(run, 2, **how, slow={1: SLEEP}, say=str(said))
    assert codes == [0, 0], (tmp_path / "said.0").read_text()
    text = " ".join((tmp_path / "said.0").read_text().split())
    assert text.count("process 1 on ") == 1 and "s a step for its data" in text, text
    assert "process 0 on " not in text and "computes" not in text
    assert "process 1 on" not in (tmp_path / "said.1").read_text()  # one process says it
    lines = [json.loads(x) for x in (run / "log" / "waits.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [96, 192]
    for line in lines:
        (fast, slow), (waited, hardly) = line["data_wait_seconds"], line["comm_wait_seconds"]
        assert slow > 2 * SLEEP > 4 * fast  # both micro-batches of a step
        assert waited > 1.5 * SLEEP > hardly  # what the one reads, the other waits
        assert min(line["step_seconds"]) > 2 * SLEEP
    row = next(r for r in read_log(run / "log" / "metrics.jsonl")[0] if r["images"] == 96 and "loss" in r)
    means = {k: sum(lines[0][k]) / 2 for k in ("data_wait_seconds", "comm_wait_seconds", "step_seconds")}
    assert {k: row[k] for k in means} == pytest.approx(means, abs=1e-5)
    assert row["data_wait_seconds_max"] == pytest.approx(max(lines[0]["data_wait_seconds"]), abs=1e-5)
    assert row["comm_wait_seconds_max"] == pytest.approx(max(lines[0]["comm_wait_seconds"]), abs=1e-5)


def test_a_slow_computer_is_named_and_not_its_readers(tmp_path: Path):
    """Its loss takes longer: the others wait at the end of their backward pass, not where all meet with their data."""
    config = {"images": 192, "log_every": 192, "sample_every": 1000, "validate_every": 1000, "checkpoint_every": 1000}
    codes = together(tmp_path / "run", 2, config=config, slow_loss={1: SLEEP}, say=str(tmp_path / "said"))
    assert codes == [0, 0]
    text = " ".join((tmp_path / "said.0").read_text().split())
    assert "process 1 on " in text and "s a step, the others" in text and "for its data" not in text, text
    assert "process 0 on " not in text
    (line,) = map(json.loads, (tmp_path / "run" / "log" / "waits.jsonl").read_text().splitlines())
    assert line["comm_wait_seconds"][0] > 1.5 * SLEEP > line["comm_wait_seconds"][1]


def test_one_process_logs_how_long_it_waits_for_data(tmp_path: Path):
    class Slow(Numbers):
        def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
            time.sleep(0.01)
            return super().__getitems__(pairs)

    go(tmp_path / "run", rows=Slow())
    rows = [r for r in read_log(tmp_path / "run" / "log" / "metrics.jsonl")[0] if "loss" in r]
    assert all(r["step_seconds"] > r["data_wait_seconds"] > 0.02 for r in rows)
    assert not any("comm_wait_seconds" in r for r in rows)
    assert not (tmp_path / "run" / "log" / "waits.jsonl").exists()


@pytest.mark.parametrize(
    ("seconds", "step", "factor", "slow"),
    [
        ([0.0, 0.0, 0.5, 0.0], 1.0, 2.0, [2]),
        ([0.0, 0.4, 0.5, 0.0, 0.0], 1.0, 2.0, [1, 2]),  # less than half of them
        ([0.5, 0.5, 0.5, 0.5], 1.0, 2.0, []),  # all alike: the storage, none of them
        ([0.30, 0.25, 0.45, 0.28], 1.0, 2.0, []),  # not twice as long as the others
        ([0.01, 0.01, 0.05, 0.01], 1.0, 2.0, []),  # five times as long, and 4% of a step
        ([0.0, 0.05], 1.0, 2.0, []),
        ([0.0, 0.15], 1.0, 2.0, [1]),
        ([0.50, 0.51, 0.65, 0.49], 0.8, 1.0, [2]),  # computing
    ],
)
def test_the_rule(seconds: list[float], step: float, factor: float, slow: list[int]):
    assert slow_processes(seconds, step, factor) == slow


def test_a_process_is_named_once_until_it_was_well_again(monkeypatch, caplog):
    monkeypatch.setattr(stragglers, "gather_object", lambda x: ["a", "b"])
    times = StepTimes(fake(2))
    slow, well = torch.tensor([[0.0, 3.0, 5.0], [3.0, 0.0, 5.0]]), torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 5.0]])
    for table, expected in ((slow, 0), (slow, 1), (slow, 1), (slow, 1), (well, 1), (well, 1), (slow, 1), (slow, 2)):
        times._judge(table, 5)  # two lines of the log are ten steps
        assert caplog.text.count("process 1 on b waits 0.6 s a step for its data, the others 0 s") == expected


class Event:
    """A device's: what it runs ends ``LAG`` after it was handed over."""

    clock, done, asked = 0.0, 0.0, 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = Event.clock

    def query(self) -> bool:
        return self.at <= Event.done

    def synchronize(self) -> None:
        Event.asked, Event.done = Event.asked + 1, max(Event.done, self.at)

    def elapsed_time(self, other: "Event") -> float:
        assert self.query() and other.query(), "read before it has passed"
        return 1000 * (other.at - self.at)


def test_a_gpu_is_not_waited_for_in_a_step(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(stragglers.dist, "all_reduce", lambda token: advance(0.25))
    accelerator = fake(2)
    times = StepTimes(accelerator)
    times.cuda = True

    def advance(seconds: float) -> None:
        Event.clock += seconds

    weight = torch.ones(3, requires_grad=True)
    loss = times.watch(lambda batch, images: (weight.sum(), {}))
    for step in range(4):
        with times.loading():
            pass
        times.meet()
        loss({}, 0)[0].backward()
        advance(0.5)  # the reduction
        times.reduced()
        times.stepped()
        Event.done = Event.clock - 0.75 if step == 2 else Event.done  # the device is behind
    assert Event.asked == 0
    values, rows = times.read()
    assert values["comm_wait_seconds"] == pytest.approx(0.75) and len(rows) == 2
    assert Event.asked > 0
    assert times.read() == ({}, [])  # nothing since


def fake(world: int) -> Any:
    return SimpleNamespace(
        num_processes=world, process_index=0, is_main_process=True, device=torch.device("cpu"),
        gather=lambda own: own.repeat(world, 1),
    )  # fmt: skip
