"""The benchmark of a training step: both sides train the same thing, and time is counted to the side that spends it."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks import train_step  # noqa: E402
from benchmarks.settings import SETTINGS, write_pictures  # noqa: E402
from benchmarks.stock_script import StockScript  # noqa: E402
from benchmarks.turns import PARTS, WARM, Finished, InTurns, prepared  # noqa: E402
from training.batches import to_unit  # noqa: E402
from training.run import open_data  # noqa: E402

TINY = SETTINGS["tiny"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of the tiny setting writes."""
    out = tmp_path_factory.mktemp("out") / "a" / "b.json"
    assert train_step.main(["--rows", "tiny", "--rounds", "3", "--out", str(out)]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_the_report_has_all_that_a_number_depends_on(told: dict[str, Any]):
    assert {"date", "command", "cpu", "threads", "load", "load_after", "versions", "settings"} <= told.keys()
    (row,) = told["rows"]
    assert row["rounds"] == 4  # an even number: the order turns round each time
    assert row["steps"] == {"ours": WARM + 4, "stock": WARM + 4}
    assert set(row["ms_of_a_step"]) == {*PARTS, "loop"}
    assert min(row["ms_of_a_step"].values()) > 0 and row["ratio"] > 0 and row["ratio_to_stock_without_loader"] > 0
    assert row["ratio_90"][0] <= row["ratio"] <= row["ratio_90"][1]
    ms = row["ms_per_image"]
    assert 0 < ms["loader"] < ms["stock"] and row["ratio"] == pytest.approx(ms["ours"] / ms["stock"])
    assert [x["target"] for x in row["checks"]] == [TINY.ratio, TINY.tail, TINY.loop]


def test_both_sides_train(told: dict[str, Any]):
    """The same network on the same task, from the same weights: noise of unit variance is predicted, so a loss is about
    1, and Adam's first steps have one length, whatever the gradient's."""
    (row,) = told["rows"]
    for side in ("ours", "stock"):
        losses = row["losses"][side]
        assert len(losses) == WARM + 4 and all(0.3 < x < 3 for x in losses), side
    assert row["moved"]["ours"] == pytest.approx(row["moved"]["stock"], rel=0.3) and row["moved"]["ours"] > 0


def test_check_fails_where_a_target_is_missed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def row(value: float, least: bool = False) -> dict[str, Any]:
        return {"row": "x", "checks": [train_step.check("speed", value, 2.0, least=least)]}

    for found, status in ((row(2.0), 0), (row(2.1), 1), (row(2.1, True), 0), (row(1.9, True), 1)):
        monkeypatch.setattr(train_step, "gathering", lambda _, found=found: found)
        assert train_step.main(["--rows", "cache", "--check"]) == status
        assert train_step.main(["--rows", "cache"]) == 0
        assert ("missed x, speed" in capsys.readouterr().out) == bool(status)
    with pytest.raises(SystemExit):
        train_step.main(["--rounds", "1"])


def test_the_cache_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train_step, "STORED", 600)
    found = train_step.gathering(train_step.options([]))
    assert set(found["latents_per_second"]) == {16, 64, 256}
    assert found["checks"][0]["value"] == min(found["latents_per_second"].values()) > 0


# --- the stock side --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, StockScript]:
    return prepared(TINY, tmp_path_factory.mktemp("run"))


def test_the_script_gets_our_weights_pictures_and_captions(run: tuple[Any, Any, Any, StockScript]):
    config, task, _, script = run
    ours, theirs = dict(task.net.named_parameters()), dict(script.unet.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[name]) and p is not theirs[name] for name, p in ours.items())
    rows, _ = open_data(config)
    some = [5, 0, 3]
    batch = script.loaded(some)
    assert torch.allclose(batch["pixel_values"], to_unit(rows.pictures(some)), atol=1e-6)
    told = script.text_encoder(batch["input_ids"], return_dict=False)[0]
    cached = task.rows.__getitems__([(i, row) for i, row in enumerate(some)])
    assert torch.allclose(cached["tokens"], told, atol=1e-5)
    moments = script.vae.encode(batch["pixel_values"]).latent_dist
    assert torch.allclose(cached["moments"][:, :4], moments.mean, atol=1e-5)


def test_a_step_of_the_script(run: tuple[Any, Any, Any, StockScript]):
    """Weights move by AdamW, the average follows, the frozen parts stay, no gradient is left."""
    script = run[-1]
    before = [p.detach().clone() for p in script.unet.parameters()]
    frozen = [p.clone() for part in (script.vae, script.text_encoder) for p in part.parameters()]
    script.step(script.loaded([0, 1, 2, 3]))
    steps = [(p.detach() - q).abs().max().item() for p, q in zip(script.unet.parameters(), before, strict=True)]
    assert 0 < max(steps) < 1.1e-4  # Adam's first step is the learning rate, and a hundredth of it is decay
    assert all(p.grad is None for p in script.unet.parameters())
    averages = zip(script.ema.shadow_params, before, script.unet.parameters(), strict=True)
    assert any(not torch.equal(a, q) or not torch.equal(a, p) for a, q, p in averages)
    after = [p for part in (script.vae, script.text_encoder) for p in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True))
    assert len(script.losses) == 1 and math.isfinite(script.losses[0])


def test_pictures_are_cut_from_their_middle(tmp_path: Path, run: tuple[Any, Any, Any, StockScript]):
    from PIL import Image

    stripes = np.zeros((32, 96, 3), np.uint8)
    stripes[:, 32:64] = 255
    pixels = run[-1]._pixels(Image.fromarray(stripes))
    assert pixels.shape == (3, 16, 16) and pixels.min() > 0.8  # the middle is white; LANCZOS reaches over its edge
    assert len(write_pictures(tmp_path, 3, 8)) == 4
    assert len(list(tmp_path.glob("train/*.png"))) == 3 and len(list(tmp_path.glob("test/*.txt"))) == 1


# --- turns -----------------------------------------------------------------------------------------------------------


class Scripted:
    """A clock that moves only when somebody works, and parts that take known times."""

    def __init__(self) -> None:
        self.time, self.order = 0.0, ""

    def __call__(self) -> float:
        return self.time

    def takes(self, seconds: float, what: str = "") -> Any:
        def work(*_: Any, **__: Any) -> Any:
            self.time, self.order = self.time + seconds, self.order + what
            return torch.zeros(())

        return work


@pytest.fixture
def turns() -> Iterator[tuple[InTurns, Scripted, Any, list[list[int]]]]:
    clock, seen = Scripted(), []

    class Net(nn.Linear):
        forward = clock.takes(5.0, "n")

    net = Net(1, 1)
    player = SimpleNamespace(
        module=net,
        optimizer=SimpleNamespace(step=clock.takes(3.0)),
        ema=SimpleNamespace(update=clock.takes(2.0)),
    )

    def loss(batch: dict[str, Any], images: int) -> Any:
        clock.takes(1.0)()
        return net(batch), {}

    class Script:
        unet, losses = nn.Linear(1, 1), []

        def loaded(self, rows: list[int]) -> list[int]:
            clock.takes(100.0, "s")()
            seen.append(rows)
            return rows

        step = staticmethod(clock.takes(1000.0))

    from training.loop import Player

    made: Any = Player("net", player.module, loss, player.optimizer, player.ema)  # type: ignore[arg-type]
    accelerator = SimpleNamespace(backward=clock.takes(7.0))
    script: Any = Script()
    gc.freeze()
    yield (
        InTurns(SimpleNamespace(players=[made], rows=[]), accelerator, script, lambda _: 4, clock),
        clock,
        accelerator,
        seen,
    )
    gc.unfreeze()
    gc.enable()


def test_time_is_counted_to_the_side_that_spends_it(turns: tuple[InTurns, Scripted, Any, list[list[int]]]):
    """And the script is shown each of the loop's batches once, in an order that turns round."""
    found, clock, accelerator, seen = turns
    (player,) = found.players
    with pytest.raises(Finished):
        for i in range(100):
            clock.takes(0.5)()  # the loop's loader
            player.loss({"row": torch.tensor([i, i])}, 0)
            accelerator.backward()
            player.optimizer.step()
            player.ema.update()
            clock.takes(0.25)()  # its log
    assert clock.order == "sn" * WARM + "n" + "ss" + "n" + "n" + "ss" + "n"
    assert seen == [[i, i] for i in range(WARM + 4)] and found.steps == {"ours": WARM + 4, "stock": WARM + 4}
    assert found.seconds == {"ours": [18.75] * 4, "stock": [1100.0] * 4, "loader": [100.0] * 4}
    parts = {"network": 5.0, "objective": 1.0, "backward": 7.0, "optimizer": 3.0, "average": 2.0}
    assert found.parts == [parts] * 4
