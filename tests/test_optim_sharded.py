"""Weights that FSDP2 has shared out between two processes: the optimizers and averages are those of whole weights."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from training.ema import EMA
from training.fit import ConfigError
from training.optim import Guarded
from training.schema.optim import EMA as EMAConfig
from training.schema.optim import OptimizerSection

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}


def here(kind: str) -> bool:
    return importlib.util.find_spec(PACKAGES.get(kind, "torch")) is not None


def network(sharded: bool) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 17), nn.SiLU(), nn.Linear(17, 4))  # 17: parts of unequal length
    if sharded:
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        assert all(isinstance(p, DTensor) for p in net.parameters())
    return net


def made(net: nn.Module, kind: str) -> tuple[Guarded, EMA]:
    config = TypeAdapter(OptimizerSection).validate_python({"name": kind, "learning_rate": 1e-2})
    averages = EMA(net.named_parameters(), 0.9, EMAConfig(snapshot_every=8))
    return Guarded(net.named_parameters(), config, 100, 0), averages


def work(net: nn.Module, parts: tuple[Guarded, EMA], steps: range) -> list[float]:
    optimizer, ema = parts
    norms = []
    for i in steps:
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(i))
        (net(x).square().mean() * (float("nan") if i == 2 else 30)).backward()
        norm, skipped = optimizer.step()
        assert skipped == (i == 2)
        ema.update(i, 8 * (i + 1), skipped)
        norms.append(norm.item())
    return norms


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x.detach()


def close(a: Any, b: Any, kind: str) -> None:
    """Sums in another order; Muon's iteration is in bfloat16, and its steps are of 1e-2 times 0.2 √17."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(whole(x), whole(y), rtol=1e-5, atol=2e-3 if kind == "muon" else 1e-6)


def child(rank: int, folder: Path) -> None:
    """One of the two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    for kind in ("adamw", "muon", "schedule_free"):
        if not here(kind):
            continue
        plain, shared, again = network(False), network(True), network(True)
        one, two, three = made(plain, kind), made(shared, kind), made(again, kind)
        norms = work(plain, one, range(4)), work(shared, two, range(4))
        torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-3, atol=0, equal_nan=True)
        close(plain.parameters(), shared.parameters(), kind)
        close(one[1].average, two[1].average, kind)
        close(one[1].profiles[0].average, two[1].profiles[0].average, kind)
        before = [whole(p).clone() for p in shared.parameters()]
        with two[0].evaluating(), two[1].swapped():
            close(shared.parameters(), two[1].average, "adamw")
        assert all(whole(p).equal(x) for p, x in zip(shared.parameters(), before, strict=True))

        # whole tensors, as a checkpoint holds them, go to their parts: both go on alike, bit for bit
        with torch.no_grad():
            for p, q in zip(again.parameters(), shared.parameters(), strict=True):
                p.copy_(q)
        three[0].load({k: whole(v).clone() for k, v in two[0].tensors().items()}, two[0].state())
        three[1].load({k: whole(v).clone() for k, v in two[1].tensors().items()})
        work(shared, two, range(4, 7))
        work(again, three, range(4, 7))
        for p, q in zip([*shared.parameters(), *two[1].average], [*again.parameters(), *three[1].average], strict=True):
            assert whole(p).equal(whole(q))

        two[1].write_snapshot(folder / kind, 56, write=rank == 0)
        dist.barrier()
        stored = load_file(folder / kind / "images_000000056_sigma_rel_0.05.safetensors")
        for name, x in zip(two[1].names, two[1].profiles[0].average, strict=True):
            assert stored[name].equal(whole(x))
    for kind in ("adafactor", "prodigy", "adamw_8bit"):
        if here(kind):
            try:
                made(network(True), kind)
            except ConfigError as error:
                assert "does not take sharded weights" in str(error)
            else:
                raise AssertionError(f"{kind} was not refused")
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_weights_are_stepped_as_whole_ones(tmp_path: Path):
    code = "import sys, pathlib, tests.test_optim_sharded as t; t.child(int(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(told)[-3000:]
