"""What the tasks share out among processes, they gather again: two are one with the double batch."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.killed import losses
from tests.killed_together import one_and_two
from tests.toy import begun, ended
from training import checkpoint, processes

TASKS = ("clip", "vae", "unet", "adapt")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("double")
    (code,) = ended([begun(one_and_two, root, TASKS)], 500)
    assert code == 0, {p.name: p.read_text()[-2000:] for p in root.glob("*.txt")}
    return root


@pytest.mark.parametrize("task", TASKS)
def test_gradients_are_those_of_one_process_with_the_double_batch(task: str, made: Path):
    """Adam's first moments after two steps: 0.09 of the first gradient and 0.1 of the second. CLIP's loss is over all
    pairs of both processes' rows, so it would show a gradient that one of them keeps for itself."""
    one, two = (checkpoint.load(checkpoint.listed(run / task / "checkpoints")[-1]) for run in (made, made / "two"))
    assert (one[1]["images"], one[1]["steps"], two[1]["steps"], two[1]["world"]) == (16, 2, 2, 2)
    name = {"unet": "net", "adapt": "net"}.get(task, task)
    moments = {k: v for k, v in one[0][f"{name}_optimizer"].items() if k.endswith(".exp_avg")}
    largest = max(v.abs().max().item() for v in moments.values())
    assert len(moments) > 10 and largest > 0
    for k, v in moments.items():  # the sums come in another order
        torch.testing.assert_close(two[0][f"{name}_optimizer"][k], v, rtol=1e-3, atol=1e-5 * largest, msg=k)


@pytest.mark.parametrize("task", TASKS)
def test_measures_are_over_what_all_processes_computed(task: str, made: Path):
    one, two = losses(made / task), losses(made / "two" / task)
    assert [row["images"] for row in two] == [8, 8, 16, 16]
    assert any("held_out_loss" in row or "held_out_psnr" in row for row in two)
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-7)


def test_no_name_that_torch_gives_up_is_called(made: Path):
    said = (made / "clip_two.0.txt").read_text() + (made / "clip_two.1.txt").read_text()
    assert "Warning" not in said and "deprecated" not in said


def test_gathered_rows_bring_each_process_the_sum_of_its_rows_gradients(monkeypatch):
    """Two processes' losses of all rows; the second's is thrice the first's."""
    other = torch.tensor([[5.0, 6.0]])

    def all_gather(parts: list, mine: torch.Tensor) -> None:
        for part, given in zip(parts, (mine, other), strict=True):
            part.copy_(given)

    sent = []
    fake = SimpleNamespace(
        get_world_size=lambda: 2,
        get_rank=lambda: 0,
        all_gather=all_gather,
        all_reduce=lambda grad: (sent.append(grad.clone()), grad.mul_(4)),
    )
    monkeypatch.setattr(processes, "dist", fake)
    mine = torch.tensor([[1.0, 2.0]], requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = processes.gathered_rows(mine)
        assert rows.tolist() == [[1, 2], [5, 6]]
        (rows * torch.tensor([[1.0, 10.0], [100.0, 1000.0]])).sum().backward()
    assert sent[0].tolist() == [[1, 10], [100, 1000]] and mine.grad.tolist() == [[4, 40]]
