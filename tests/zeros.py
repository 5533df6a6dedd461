"""Two processes over gloo that train a toy by DeepSpeed's ZeRO, or without it, or that go on from what others saved.

One process imports DeepSpeed and computes nothing; each run is two forks of it."""

import importlib
import os
import signal
from pathlib import Path
from typing import Any

from tests.killed_together import LIMIT, ends, job

END = 96
BAD = (3,)  # row with a NaN in it, where one is asked for
OPTIMIZER = {
    "learning_rate": 1e-2, "lr_scheduler": "cosine", "lr_warmup_images": 24, "max_grad_norm": 0.3,
    "groups": [{"pattern": "bias", "learning_rate_factor": 3.0, "weight_decay": 0.0}],
}  # fmt: skip


def run_of(kind: str, run: Path, **how: Any) -> dict[str, Any]:
    return {"kind": kind, "run": str(run), "images": END, "dropout": 0.0, "kill": None, "bad": False, **how}


def train_toy(raw: dict[str, Any]) -> None:
    """What a launcher's process does, up to the image that ``raw`` names.

    Args:
        raw: kind (one, ddp, fsdp2, zero1, zero2 or zero3), run, images, dropout, kill (image at which the second
            process kills itself), bad (the first process meets NaN).
    """
    if raw["kind"].startswith("zero"):
        del os.environ["ACCELERATE_USE_CPU"]
        os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=raw["kind"][-1])
    import torch
    from torch import nn

    from tests.toy import Numbers, Toy, settings
    from training import loop, processes, sharded
    from training.ema import EMA
    from training.optim import Guarded
    from training.schema import Optimizer
    from training.schema.optim import EMA as EMAConfig
    from training.zero import Zero

    class Shared(Toy):
        """The toy's autoencoder alone: its odd numbers of weights do not divide by two."""

        def __init__(self, accelerator: Any, per_step: int):
            self.rows, self.files, self.seen, self.memory = Numbers(), [], [], None
            if raw["bad"] and accelerator.process_index == 0:
                self.rows = Numbers(bad=BAD)
            torch.manual_seed(3)
            module = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Dropout(raw["dropout"]), nn.Linear(7, 4))
            config = Optimizer(**OPTIMIZER)
            if raw["kind"].startswith("zero"):
                module = processes.prepare(accelerator, module)
                optimizer: Guarded = Zero(accelerator, module, config, 320, batch=4, per_step=per_step)
                prepared = optimizer.engine
            else:
                mesh = torch.distributed.init_device_mesh("cpu", (2,)) if raw["kind"] == "fsdp2" else None
                prepared = processes.share_out(module, mesh=mesh) if mesh else accelerator.prepare(module)
                optimizer = Guarded(module.named_parameters(), config, 320, per_step=per_step)
            how = EMAConfig(sigma_rels=(0.1,), snapshot_every=48, snapshot_dtype="float32")
            ema = EMA(module.named_parameters(), 0.9, how, end=END)
            self.rank, self.players = (
                accelerator.process_index,
                [loop.Player("net", prepared, self.loss, optimizer, ema)],
            )

        def act(self, images: int) -> None:
            if images == raw["kill"] and self.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        def held_out(self) -> dict[str, float]:
            net = self.players[0]
            net.module.eval()
            with net.averaged(), torch.no_grad():
                found = {
                    "held_out": sum(sharded.gathered(p).square().sum().item() for p in net.optimizer.parameters),
                    "held_out_of_ones": net.module(torch.ones(1, 4)).sum().item(),
                }
            net.module.train()
            return found

        def sample(self, file: Path) -> None:
            """The main process alone, as the loop asks; its answer is read from the file."""
            net = self.players[0]
            with net.averaged(), torch.no_grad():
                file.parent.mkdir(parents=True, exist_ok=True)
                answer = sharded.bare(net.module).eval()(torch.ones(1, 4))
            sharded.bare(net.module).train()
            file.with_suffix(".txt").write_text(" ".join(map(repr, answer.flatten().tolist())))

    world = 1 if raw["kind"] == "one" else 2
    how = {"batch_size": 8 // world, "images": raw["images"], "timeout_minutes": 0.2}
    how |= {"validate_every": 48, "sample_every": 48, "checkpoint_every": 48}
    config, run = settings(**how), Path(raw["run"])
    accelerator = processes.started(config, "no")
    task = Shared(accelerator, per_step=8 // world * 2 * world)
    loop.train(task, config, run=run, seed=5, accelerator=accelerator, inputs={"data": "a"})


def done(raw: dict[str, Any]) -> None:
    said = Path(raw["run"]).with_suffix(".said")
    if raw["kind"] == "one":
        from tests.killed import forked

        codes = ends([forked(raw, said, train_toy)], LIMIT)
    else:
        codes = ends(job(raw, said, train_toy), LIMIT)
    texts = {p.name: p.read_text()[-3000:] for p in said.parent.glob(f"{said.stem}.*.txt")}
    if raw["kill"] is None:
        assert set(codes) == {0}, (raw, codes, texts)
    else:
        assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 75, None), (raw, codes, texts)


def all_kinds(root: Path) -> None:
    for name in (
        "deepspeed.runtime.zero.muon.original_muon",
        "deepspeed.runtime.zero.stage3",
        "diffusers.optimization",
        "tests.toy",
        "training.zero",
        "transformers.integrations",
    ):
        importlib.import_module(name)
    for kind in ("ddp", "zero1", "zero2", "zero3"):
        done(run_of(kind, root / kind, dropout=0.25))
    for kind in ("zero1", "zero2", "zero3"):
        done(run_of(kind, root / f"{kind}_killed", dropout=0.25, kill=64))
        done(run_of(kind, root / f"{kind}_killed", dropout=0.25))
    for kind in ("ddp", "zero2", "zero3"):
        done(run_of(kind, root / f"{kind}_bad", bad=True))
    done(run_of("one", root / "still"))
    for i, kind in enumerate(("zero2", "fsdp2", "zero3", "one", "zero1", "ddp")):  # each one step of 16 images
        done(run_of(kind, root / "moved", images=16 * (i + 1)))
