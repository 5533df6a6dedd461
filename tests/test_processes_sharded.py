"""FSDP2 on a CPU: two processes share out the weights, and one opens what they saved; and the launchers' configs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tests.toy import ROOT, go, logged, together
from training import checkpoint, processes, sharded
from training.checkpoint import CheckpointError

ACCELERATE = ROOT / "configs" / "accelerate"


def newest(run: Path) -> Path:
    return checkpoint.listed(run / "checkpoints")[-1]


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


def test_a_damaged_shard_is_named(tmp_path: Path):
    run = tmp_path / "run"
    assert together(run, 2, share_out=True, config={"images": 48}) == [0, 0]
    shard = sorted((newest(run) / "net").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"net/{shard.name}: missing or damaged .*images_000000032"):
        checkpoint.load(newest(run))


def test_what_is_whole_stays_whole():
    whole = torch.arange(6.0).view(2, 3)
    assert sharded.like(whole, torch.zeros(2, 3)) is whole
    target = nn.Parameter(torch.zeros(2, 3))
    sharded.copy_into(target, whole)
    assert target.equal(whole) and not sharded.is_split({"a": target})


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


@pytest.mark.parametrize("name", ["one_gpu", "eight_gpus", "fsdp2", "deepspeed"])
def test_accelerates_own_loader_takes_the_configs(name: str, monkeypatch):
    """And would launch as many processes of that kind, without settings that would be counted twice."""
    file = ACCELERATE / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.to_dict()["num_processes"] == (1 if name == "one_gpu" else 8)
    for module in ("accelerate.commands.launch", "accelerate.utils"):
        monkeypatch.setattr(f"{module}.is_deepspeed_available", lambda: True, raising=False)
    monkeypatch.setattr("accelerate.commands.launch.is_bf16_available", lambda *a: True, raising=False)
    parser = launch_command_parser()
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "-m", "training.cli"]))
    kinds = {"one_gpu": None, "eight_gpus": "multi_gpu", "fsdp2": "use_fsdp", "deepspeed": "use_deepspeed"}
    assert [k for k in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, k)] == [
        k for k in [kinds[name]] if k
    ]
    assert args.mixed_precision == "no"  # the run's own decides
    raw = yaml.safe_load(file.read_text())
    assert raw.get("deepspeed_config", {}).get("gradient_accumulation_steps", 1) == 1
    if name == "fsdp2":
        assert str(args.fsdp_version) == "2" and args.fsdp_state_dict_type == "SHARDED_STATE_DICT"
