"""Our loop and the stock script in turns: the loop is held at the start of a step while the script makes its own."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.settings import LEARNING_RATE, Setting, config_of, write_encoders, write_pictures
from benchmarks.stock_script import StockScript

if TYPE_CHECKING:
    from training import loop
    from training.schema import DiffusionConfig

PARTS = ("network", "objective", "backward", "optimizer", "average")  # of a step; what is left is the loop's own
WARM = 2  # steps of each that are not counted


class Finished(Exception):
    """All rounds are made."""


def prepared(setting: Setting, place: Path) -> tuple[Any, Any, Any, StockScript]:
    """A run in ``place`` with its cache filled, and the stock script with the same weights and rows.

    Returns:
        config, task, accelerator, script.
    """
    from training import processes
    from training.config import parse
    from training.run import build, open_data

    captions = write_pictures(place / "data", setting.pictures, setting.pixels)
    vae, text = write_encoders(place, setting, captions)
    config = parse(config_of(setting, place, place / "data", vae, text), f"the setting {setting.name}")
    accelerator = processes.started(config.train, "no")
    run = Path(config.output_dir)
    run.mkdir()
    torch.manual_seed(config.seed)
    rows, held_out = open_data(config)
    task = build(config, rows, held_out, run, accelerator)
    twin = copy.deepcopy(task.net.to_diffusers())
    script = StockScript(
        twin, vae, text, [rows.name(i) for i in range(len(rows))], list(rows.captions),
        resolution=setting.pixels, learning_rate=LEARNING_RATE, batch_size=setting.batch,
    )  # fmt: skip
    return config, task, accelerator, script


class InTurns:
    """A task for the loop, which it steps by one while the script steps by one.

    Round r of the loop is a step from the start of its loss to the start of the next one's. In even rounds the loop
    goes first, in odd ones the script: neither always runs with the caches that the other left. What the script takes
    is not counted to the loop, nor is collecting garbage, which is held back in both.

    Args:
        rounds: seconds of one warm step of both together -> how many rounds to time; an even number.
        clock: seconds.
    Raises:
        Finished: from within the loop, after the last round.
    """

    def __init__(
        self,
        task: Any,
        accelerator: Any,
        script: StockScript,
        rounds: Callable[[float], int],
        clock: Callable[[], float],
    ):
        self.rows, self.script, self.rounds, self.clock = task.rows, script, rounds, clock
        first: loop.Player = task.players[0]
        self.players: Sequence[loop.Player] = [replace(first, loss=self._held(first.loss))]
        self.seconds: dict[str, list[float]] = {"ours": [], "stock": [], "loader": []}  # loader: what of stock's it is
        self.parts: list[dict[str, float]] = []
        self.steps = {"ours": 0, "stock": 0}
        self.parameters = sum(p.numel() for p in first.module.parameters())
        self._start = [p.detach().clone() for p in by_name(first.module)]
        self._losses: list[Tensor] = []
        self._shown: list[Tensor] = []  # rows of each of the loop's batches
        self._total, self._resumed, self._began, self._stock_took, self._stock_loaded = -1, 0.0, 0.0, 0.0, 0.0
        self._now: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        optimizer, ema, module = first.optimizer, first.ema, first.module
        vars(optimizer)["step"] = self._timed("optimizer", optimizer.step)
        vars(ema)["update"] = self._timed("average", ema.update)
        vars(accelerator)["backward"] = self._timed("backward", accelerator.backward)
        module.register_forward_pre_hook(self._network_begins)
        module.register_forward_hook(self._network_ends)

    def run(self, config: DiffusionConfig, accelerator: Accelerator) -> None:
        """All rounds."""
        from training import loop

        task: Any = self  # the run ends before anything but steps is due
        gc.freeze()  # what is there already need not be looked through at each turn
        try:
            run = Path(config.output_dir)
            loop.train(task, config.train, run=run, seed=config.seed, accelerator=accelerator, inputs={})
        except Finished:
            pass
        finally:
            gc.unfreeze()
            gc.enable()

    # --- the loop's moves -----------------------------------------------------------------------------------------

    def _held(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        timed = self._timed("objective", loss)

        def held(batch: dict[str, Any], images: int) -> Any:
            self._turn(batch["row"])
            value, named = timed(batch, images)
            self._now["objective"] -= self._now["network"]
            self._losses.append(value.detach())
            return value, named

        return held

    def _timed(self, part: str, move: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kw: Any) -> Any:
            start = self.clock()
            found = move(*args, **kw)
            self._now[part] += self.clock() - start
            return found

        return timed

    def _network_begins(self, *_: Any) -> None:
        self._began = self.clock()

    def _network_ends(self, *_: Any) -> None:
        self._now["network"] += self.clock() - self._began

    # --- the turns ------------------------------------------------------------------------------------------------

    def _turn(self, rows: Tensor) -> None:
        """Between two steps of the loop, of which the next one shows ``rows``."""
        took, self.steps["ours"] = self.clock() - self._resumed, len(self._shown)
        number = len(self._shown) - WARM  # of the round whose step of the loop comes next
        self._shown.append(rows.cpu())
        if number < 0:
            self._stock(len(self._shown) - 1)
        elif number == 0:
            self._total = self.rounds(took + self._stock_took)
        else:
            self.seconds["ours"].append(took)
            self.parts.append(self._now)
            if number % 2:
                for r in (number - 1, number):
                    self._stock(WARM + r)
                    self.seconds["stock"].append(self._stock_took)
                    self.seconds["loader"].append(self._stock_loaded)
            if number == self._total:
                raise Finished
        self._now = dict.fromkeys(PARTS, 0.0)
        gc.collect()
        gc.disable()
        self._resumed = self.clock()

    def _stock(self, step: int) -> None:
        """The script's step on the rows of this one of the loop's."""
        rows = self._shown[step].tolist()
        gc.collect()
        gc.disable()
        start = self.clock()
        batch = self.script.loaded(rows)
        self._stock_loaded = self.clock() - start
        self.script.step(batch)
        self._stock_took = self.clock() - start
        self.steps["stock"] += 1

    # --- what has become of the weights -------------------------------------------------------------------------------

    def losses(self) -> dict[str, list[float]]:
        """Of all steps, those of the warm-up too."""
        return {"ours": torch.stack(self._losses).tolist(), "stock": list(self.script.losses)}

    def moved(self) -> dict[str, float]:
        """How far the weights are from where both sides began, over the length of that."""
        length = torch.stack([p.norm() for p in self._start]).norm()
        sides = {"ours": by_name(self.players[0].module), "stock": by_name(self.script.unet)}
        return {
            name: float(
                torch.stack([(p.detach() - q).norm() for p, q in zip(x, self._start, strict=True)]).norm() / length
            )
            for name, x in sides.items()
        }


def by_name(module: nn.Module) -> list[nn.Parameter]:
    """In an order that both networks have."""
    return [p for _, p in sorted(module.named_parameters())]
