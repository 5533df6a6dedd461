"""FSDP2 on a CPU: two processes share out the weights, and one opens what they saved; and the launchers' configs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import FSDPModule

from tests.killed import losses
from tests.killed_together import shared_out
from tests.live_bytes import LiveBytes
from tests.toy import ROOT, begun, ended, go, logged, together
from training import checkpoint, processes, sharded, state, tensor_files
from training.checkpoint import CheckpointError
from training.ema import EMA
from training.fit import ConfigError
from training.loop import Player
from training.optim import Guarded
from training.schema import Optimizer

ACCELERATE = ROOT / "configs" / "accelerate"


def newest(run: Path) -> Path:
    root = run / "checkpoints"
    return checkpoint.listed(root if root.exists() else run)[-1]


def test_two_processes_that_share_the_weights_out_are_one(tmp_path: Path):
    """Weights, optimizer (fused, clipped) and average are shared out; the checkpoint is opened and gone on from in one
    process. Sums in another order, as with DDP: 1e-6."""
    config: dict[str, Any] = {"log_every": 32}
    go(tmp_path / "one", dropout=0.0, config={**config, "batch_size": 8})
    run = tmp_path / "two"
    assert together(run, 2, dropout=0.0, share_out=True, config={**config, "images": 48}) == [0, 0]
    names = {p.name for p in newest(run).iterdir()}
    assert {"net", "net_optimizer", "net_ema", "rng.safetensors", "manifest.json", "state.json"} <= names
    assert [p.suffix for p in (newest(run) / "net").iterdir()] == [".safetensors"] * 2  # one of each process, no pickle
    assert together(run, 2, dropout=0.0, share_out=True, config={**config, "images": 64}) == [0, 0]
    last = go(run, dropout=0.0, config={**config, "batch_size": 8})
    assert last.seen == list(range(64, 96))
    expected, _ = checkpoint.load(newest(tmp_path / "one"))
    found, _ = checkpoint.load(newest(run))
    for file in ("net", "net_ema", "critic", "net_optimizer"):
        assert found[file].keys() == expected[file].keys()
        for k, v in expected[file].items():
            torch.testing.assert_close(found[file][k], v, rtol=0, atol=1e-6)
    held_out = [[r["held_out"] for r in logged(x) if "held_out" in r][-1] for x in (tmp_path / "one", run)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)


def test_hybrid_sharding_is_one_process(tmp_path: Path):
    """2 x 2: sharded inside a pair, replicated across the pairs; saved by the first pair alone, gone on from by all
    four, and by one."""
    go(tmp_path / "one", dropout=0.0, config={"batch_size": 8, "images": 80})
    run, how = tmp_path / "four", {"dropout": 0.0, "share_out": (2, 2)}
    assert together(run, 4, **how, config={"batch_size": 2, "images": 48}) == [0] * 4
    assert len(list((newest(run) / "net").iterdir())) == 2
    assert together(run, 4, **how, config={"batch_size": 2, "images": 64}) == [0] * 4
    go(run, dropout=0.0, config={"batch_size": 8, "images": 80})
    (expected, _), (found, _) = (checkpoint.load(newest(tmp_path / x)) for x in ("one", "four"))
    for file in ("net", "net_ema", "critic", "net_optimizer"):
        assert found[file].keys() == expected[file].keys()
        for k, v in expected[file].items():
            torch.testing.assert_close(found[file][k], v, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def unets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("unets")
    (code,) = ended([begun(shared_out, root, {})], 500)
    assert code == 0, {p.name: p.read_text()[-3000:] for p in root.glob("*.txt")}
    return root


@pytest.mark.parametrize("name", ["fsdp2", "kept"])
def test_a_task_that_is_shared_out_is_that_of_one_process(name: str, unets: Path):
    """Losses, held-out losses with the averages (after which training goes on with its own weights), and the grid."""
    one, two = losses(unets / "unet"), losses(unets / name)
    assert len(one) == len(two) and any("held_out_loss" in row for row in two)
    for alone, both in zip(one, two, strict=True):
        assert both == pytest.approx(alone, rel=1e-4)
    grids = [
        np.asarray(Image.open(run / "samples" / "images_000000016.png")).astype(int)
        for run in (unets / "unet", unets / name)
    ]
    assert grids[0].shape == grids[1].shape and abs(grids[0] - grids[1]).max() <= 2  # of 255
    expected, found = (checkpoint.load(newest(unets / run))[0] for run in ("unet", name))
    for file in ("net", "net_ema"):
        assert found[file].keys() == expected[file].keys()
        for k, v in expected[file].items():
            torch.testing.assert_close(found[file][k], v, rtol=0, atol=1e-4)  # Adam makes much of small differences


def test_a_base_that_is_sharded_is_trained_as_by_one_process(unets: Path):
    one, two = losses(unets / "adapt"), losses(unets / "adapt_fsdp2")
    assert len(one) == len(two) and any("held_out_loss" in row for row in two)
    for alone, both in zip(one, two, strict=True):
        assert both == pytest.approx(alone, rel=1e-5)


CARD = ("README.md", "samples.png")  # written after the export


@pytest.mark.parametrize("name", ["fsdp2", "kept"])
def test_what_two_export_together_is_what_one_exports_from_their_checkpoint(name: str, unets: Path):
    files = sorted(
        p.relative_to(unets / name / "pipeline")
        for p in (unets / name / "pipeline").rglob("*")
        if p.is_file() and p.name not in CARD
    )
    assert len(files) > 8 and any(p.parts[0] == "unet" and p.suffix == ".safetensors" for p in files)
    for file in files:
        assert (unets / name / "by_two" / file).read_bytes() == (unets / name / "pipeline" / file).read_bytes(), file


def test_a_damaged_shard_is_named(tmp_path: Path):
    run = tmp_path / "run"
    assert together(run, 2, share_out=True, config={"images": 48}) == [0, 0]
    shard = sorted((newest(run) / "net").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"net/{shard.name}: missing or damaged .*images_000000032"):
        checkpoint.load(newest(run))


def test_a_disk_that_is_full_for_another_process_leaves_no_orphan(one_process, tmp_path: Path, monkeypatch):
    net = processes.share_out(nn.Linear(3, 2), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    files = {"net": dict(net.named_parameters())}
    checkpoint.save(tmp_path, 1, files, {}, checkpoint.Keep(2))
    monkeypatch.setattr(sharded, "gather_objects", lambda mine: [mine, ({}, "No space left on device")])
    with pytest.raises(OSError, match=r"images_000000002: could not be written \(No space left on device\)"):
        checkpoint.save(tmp_path, 2, files, {}, checkpoint.Keep(2))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["images_000000001"]
    assert checkpoint.load(newest(tmp_path))[0]["net"]["weight"].equal(net.weight.full_tensor())


def test_shards_are_files_of_torchs_distributed_checkpoint(one_process, tmp_path: Path):
    """Which reads ours, and ours are read where it wrote them, as older versions of this package let it."""
    net = processes.share_out(nn.Linear(3, 5), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    flat: dict[str, torch.Tensor] = dict(net.named_parameters())
    (tmp_path / "ours").mkdir()
    (name,) = sharded.save(tmp_path / "ours", flat)
    dcp.save(flat, storage_writer=dcp.HuggingFaceStorageWriter(path=str(tmp_path / "theirs"), save_distributed=True))
    assert [p.name for p in (tmp_path / "theirs").iterdir()] == [name]
    again = {k: torch.zeros(p.shape) for k, p in flat.items()}
    dcp.load(again, storage_reader=dcp.HuggingFaceStorageReader(path=str(tmp_path / "ours")))
    there = tensor_files.stored([tmp_path / "theirs" / name])
    for k, p in net.named_parameters():
        assert again[k].equal(p.full_tensor()) and tensor_files.read(there[k]).equal(p.full_tensor())


def test_going_on_holds_one_tensor_beside_the_state(one_process, tmp_path: Path):
    """Not the parts of the checkpoint, which are four times the weights."""
    mib, mesh = 2**20, torch.distributed.init_device_mesh("cpu", (1,))
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))

    def player(value: float) -> Player:
        net = processes.share_out(nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(10))), mesh=mesh)
        optimizer = Guarded(net.named_parameters(), Optimizer(), 100)
        for p in net.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step()
        return Player(
            "net", net, lambda batch, images: (torch.zeros(()), {}), optimizer, EMA(net.named_parameters(), 0.9)
        )

    first, second = player(1.0), player(2.0)
    checkpoint.save(tmp_path, 1, *state.gathered([first], state.Progress({}), {}, accelerator), checkpoint.Keep(1))
    with LiveBytes() as memory:
        state.restored([second], newest(tmp_path), {}, {}, accelerator, 0)
    assert memory.peak < 20 * mib + 4 * mib  # AdamW's new moments, and a tensor with its copies
    for file in ("parameters", "tensors"):
        one, two = (
            dict(enumerate(x.optimizer.parameters)) if file == "parameters" else x.optimizer.tensors() | x.ema.tensors()
            for x in (first, second)
        )
        assert one.keys() == two.keys() and all(sharded.gathered(two[k]).equal(sharded.gathered(one[k])) for k in one)


def test_what_is_whole_stays_whole():
    whole = torch.arange(6.0).view(2, 3)
    assert sharded.like(whole, torch.zeros(2, 3)) is whole
    target = nn.Parameter(torch.zeros(2, 3))
    sharded.copy_into(target, whole)
    assert target.equal(whole) and not sharded.is_split({"a": target})


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.seen = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), []

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](time.sin()[:, None].expand(-1, 4))
        self.seen.append((time, x.dtype))
        return self.layers[1](x)


@pytest.mark.parametrize(("precision", "inner"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_half_precision_does_not_round_what_goes_in(precision: str, inner: torch.dtype, one_process):
    """accelerate's own policy for FSDP2 makes 997 of it 996, and the loss one of bf16."""
    fake: Any = SimpleNamespace(
        is_fsdp2=True, mixed_precision=precision, device=torch.device("cpu"), parallelism_config=None,
        torch_device_mesh=None,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(reshard_after_forward=True, cpu_offload=None)),
    )  # fmt: skip
    module = Timed()
    module.to = None  # never whole to the device: FSDP2 moves one unit after the other
    assert processes.prepare(fake, module) is module and isinstance(module, FSDPModule)
    out = module(torch.tensor([997.0, 3.0]))
    ((time, dtype),) = module.seen
    assert time.tolist() == [997, 3] and dtype == inner and out.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_half_weights_that_are_frozen_share_a_unit_with_what_trains(one_process):
    """As a LoRA on a bf16 base: frozen weights stay as they are, what trains is float32."""
    module = Timed().bfloat16()
    for layer in module.layers:
        layer.weight.requires_grad_(False)
    expected = [p.clone() for p in module.parameters()]
    processes.share_out(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    for p, q in zip(module.parameters(), expected, strict=True):
        assert p.full_tensor().equal(q) and p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.tensor([1.0, 2.0])).float().sum().backward()
    assert [p.grad.dtype for p in module.parameters() if p.requires_grad] == [torch.float32] * 2


def test_a_shared_out_module_is_whole_for_a_while(one_process):
    """Plain, with the weights of that moment, and shared out again afterwards with its own."""
    module = Timed()
    plain = {k: v.clone() for k, v in module.state_dict().items()}
    processes.share_out(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    x = torch.tensor([1.0, 2.0])
    expected = module(x).detach()
    deep = module.layers[0]
    module.eval()
    with sharded.whole(module, torch.device("cpu"), here=False):
        assert isinstance(module, FSDPModule)
    with sharded.whole(module, torch.device("cpu"), here=True):
        assert type(module) is Timed and type(deep) is nn.Linear and deep is module.layers[0] and not module.training
        assert not sharded.is_split(module.state_dict()) and not module._forward_pre_hooks
        assert all(v.equal(plain[k]) for k, v in module.state_dict().items())
        assert module(x).equal(expected)
    assert isinstance(module, FSDPModule) and isinstance(deep, FSDPModule)
    assert sharded.is_split(dict(module.named_parameters())) and module(x).equal(expected)


@pytest.mark.parametrize("task", ["clip", "autoencoder"])
def test_tasks_that_cannot_be_shared_out_say_so(task: str):
    with pytest.raises(ConfigError, match=rf"task {task}: not with FSDP2, .*eight_gpus\.yaml"):
        processes.check_whole(SimpleNamespace(is_fsdp2=True), task)


def test_layers_of_the_innermost_lists_are_units(monkeypatch):
    units: list[nn.Module] = []
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, **how: units.append(module))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            block = nn.Module()
            block.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.blocks = nn.ModuleList([block, nn.Linear(2, 2)])
            self.out = nn.Linear(2, 2)

    net = Net()
    assert processes.share_out(net, mesh=None) is net
    assert units == [*net.blocks[0].layers, net]
    assert not isinstance(net, FSDPModule)


@pytest.mark.parametrize("name", ["one_gpu", "eight_gpus", "fsdp2", "hsdp", "deepspeed"])
def test_accelerates_own_loader_takes_the_configs(name: str, monkeypatch):
    """And would launch as many processes of that kind, without settings that would be counted twice."""
    file = ACCELERATE / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.to_dict()["num_processes"] == {"one_gpu": 1, "hsdp": 16}.get(name, 8)
    for module in ("accelerate.commands.launch", "accelerate.utils"):
        monkeypatch.setattr(f"{module}.is_deepspeed_available", lambda: True, raising=False)
    monkeypatch.setattr("accelerate.commands.launch.is_bf16_available", lambda *a: True, raising=False)
    parser = launch_command_parser()
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "-m", "training.cli"]))
    kinds = {"one_gpu": None, "eight_gpus": "multi_gpu", "deepspeed": "use_deepspeed"}
    kinds |= {"fsdp2": "use_fsdp", "hsdp": "use_fsdp"}
    assert [k for k in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, k)] == [
        k for k in [kinds[name]] if k
    ]
    assert args.mixed_precision == "no"  # the run's own decides
    raw = yaml.safe_load(file.read_text())
    assert raw.get("deepspeed_config", {}).get("gradient_accumulation_steps", 1) == 1
    if name == "hsdp":
        environment = prepare_multi_gpu_env(args)
        monkeypatch.setattr("os.environ", {**os.environ, **environment})
        mesh = ParallelismConfig()
        assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true" and args.num_machines == 2
        assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (2, 8)
        assert mesh.fsdp_dim_names == ["dp_replicate", "dp_shard_cp"]
    if name in ("fsdp2", "hsdp"):
        assert str(args.fsdp_version) == "2" and args.fsdp_state_dict_type == "SHARDED_STATE_DICT"


@pytest.mark.slow
def test_a_process_holds_a_unit_beside_its_shards(tmp_path: Path):
    """On the host, of a network of 390 MB: while it is made and sharded, saved, and gone on from."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-m", "tests.sharded_memory", str(tmp_path)]
    jobs = [subprocess.Popen([*command, str(rank), "4"], cwd=ROOT, env=environment) for rank in range(2)]
    assert [job.wait(300) for job in jobs] == [0, 0]
    for rank in range(2):
        stages = json.loads((tmp_path / f"{rank}.json").read_text())
        unit, shards = stages["sizes"]["unit"], stages["sizes"]["network"] / 2
        slack = 48 * 2**20  # what torch loads on the way
        assert stages["sharded"]["peak"] < shards + unit + slack
        held = stages["stepped"]["after"]  # weights, average and two moments
        assert held == pytest.approx(4 * shards, abs=slack)
        assert stages["saved"]["peak"] < held + slack
        assert stages["resumed"]["peak"] < held + 2 * shards + unit + slack  # the new moments beside the old ones
