"""DeepSpeed's ZeRO with two processes on a CPU: it trains as DDP does, goes on in the same bits when it was killed, and
from what others saved."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from tests.killed import configs, draw, losses
from tests.toy import ROOT, begun, ended, logged, settings
from tests.zeros import END, all_kinds
from training import checkpoint, processes, zero
from training.clock import ImageClock
from training.fit import ConfigError
from training.schema.optim import AdamW, Muon

pytestmark = pytest.mark.usefixtures("own_accelerate")
STAGES = ("zero1", "zero2", "zero3")
PARTS = ("net", "net_ema", "net_optimizer")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("zero")
    (code,) = ended([begun(all_kinds, root)], 500)
    assert code == 0, {p.name: p.read_text()[-2000:] for p in root.glob("*.txt")}
    return root


def newest(run: Path) -> Path:
    return checkpoint.listed(run / "checkpoints")[-1]


def close(a: Path, b: Path, tolerance: float = 1e-6) -> dict[str, Any]:
    """The newest checkpoints hold the same weights, averages and state of AdamW, but for sums in another order."""
    (expected, told), (found, state) = checkpoint.load(newest(a)), checkpoint.load(newest(b))
    assert state["images"] == told["images"] == END and state["optimizers"] == told["optimizers"]
    for part in PARTS:
        assert found[part].keys() == expected[part].keys()
        for name, x in expected[part].items():
            torch.testing.assert_close(found[part][name], x, rtol=0, atol=tolerance)
    return state


@pytest.mark.parametrize("stage", STAGES)
def test_zero_trains_as_ddp_does(stage: str, runs: Path):
    """Groups with their own rates, dropout, clipping, two micro-batches a step; losses, norms, held-out measures with
    the averages, what the main process alone computed with them, and the snapshots."""
    close(runs / "ddp", runs / stage)
    for one, other in zip(logged(runs / "ddp"), logged(runs / stage), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    norms = [row["net_grad_norm"] for row in logged(runs / "ddp") if "net_grad_norm" in row]
    assert max(norms) > 0.3  # so that it was clipped
    answers = sorted((runs / "ddp" / "samples").glob("*.txt"))
    assert answers
    for file in answers:
        expected, found = (
            [float(x) for x in (run / "samples" / file.name).read_text().split()]
            for run in (runs / "ddp", runs / stage)
        )
        assert found == pytest.approx(expected, abs=1e-5)
    snapshots = sorted(p.name for p in (runs / "ddp" / "ema" / "net").iterdir())
    assert len(snapshots) == 2
    for name in snapshots:
        expected, found = (load_file(run / "ema" / "net" / name) for run in (runs / "ddp", runs / stage))
        for k, v in expected.items():
            torch.testing.assert_close(found[k], v, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_one_that_is_killed_goes_on_in_the_same_bits(stage: str, runs: Path):
    """SIGKILL to one of the two, in the fifth step; every file of the checkpoint, and the log."""
    killed = runs / f"{stage}_killed"
    assert (newest(killed) / checkpoint.MANIFEST).read_text() == (
        newest(runs / stage) / checkpoint.MANIFEST
    ).read_text()
    assert logged(killed) == logged(runs / stage)
    assert "process 1 (pid" in " ".join((runs / f"{stage}_killed.0.txt").read_text().split())


def test_checkpoints_are_those_of_any_other_run(runs: Path):
    """ZeRO 2, FSDP2, ZeRO 3, one process, ZeRO 1 and DDP make a step each, and together what one process makes."""
    state = close(runs / "still", runs / "moved")
    assert state["world"] == 2
    everything = [p for run in ("zero3", "moved") for p in (runs / run / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in everything} == {".safetensors", ".json"}


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_nan_in_one_process_is_skipped_by_both(stage: str, runs: Path):
    close(runs / "ddp_bad", runs / f"{stage}_bad")
    order = [row for batch in ImageClock(23, 4, 5, 0, END) for _, row in batch]
    hit = [n for n in range(0, END, 16) if 3 in order[n : n + 4] + order[n + 8 : n + 12]]  # the first process's rows
    said = (runs / f"{stage}_bad.0.txt").read_text()
    assert 0 < len(hit) < 6 and said.count("update skipped") == len(hit)
    found, state = checkpoint.load(newest(runs / f"{stage}_bad"))
    assert found["net_optimizer"]["0.step"] == 6 - len(hit) and state["steps"] == 6
    assert all(x.isfinite().all() for x in found["net"].values())


# --- what is refused -------------------------------------------------------------------------------------------------


def launched(**given: Any) -> Any:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2, **given}})
    return SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"stage": 0}, r"zero_stage 0: 1, 2 and 3 share"),
        ({"offload_optimizer": {"device": "cpu"}}, r"offload_optimizer_device: .*not supported.*FSDP2"),
        ({"offload_param": {"device": "nvme"}}, r"offload_param_device"),
        ({"zero_hpz_partition_size": 8}, r"zero_optimization\.zero_hpz_partition_size: is not used here"),
    ],
)
def test_settings_that_are_not_to_be_had_are_refused(given: dict[str, Any], match: str, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=match):
        zero.check(launched(**given))


def test_a_config_without_a_stage_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    without = launched()
    del without.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
    with pytest.raises(ConfigError, match="zero_stage 0"):
        zero.check(without)


def test_what_accelerate_writes_and_sizes_are_taken(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    none = {"device": "none", "nvme_path": None}
    zero.check(launched(offload_optimizer=none, offload_param=none, reduce_bucket_size=1000, overlap_comm=False))


@pytest.mark.parametrize("cpu", ["true", "false"])
def test_a_launch_that_leaves_deepspeed_out_is_refused(cpu: str, monkeypatch):
    """accelerate takes DDP, and says nothing, where it is told to use the CPU; and a process that nobody launched."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", cpu)
    with pytest.raises(ConfigError, match="accelerate left it out; on a CPU start without ACCELERATE_USE_CPU"):
        processes.started(settings(), "no")


def test_only_adamw_is_taken():
    zero.check_kind(AdamW())
    with pytest.raises(ConfigError, match=r"optimizer\.name: muon .*flat pieces.*fsdp2\.yaml"):
        zero.check_kind(Muon(name="muon"))


@pytest.mark.parametrize("task", ["clip", "autoencoder"])
def test_tasks_that_cannot_be_shared_out_say_so(task: str, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=rf"task {task}: not with DeepSpeed, .*eight_gpus\.yaml"):
        processes.check_whole(SimpleNamespace(is_fsdp2=False), task)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    assert zero.backend() == {}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"cannot be imported .*pip install 'deepspeed>="):
        zero.backend()


def test_parameters_with_different_counts_of_steps_are_refused():
    """One process may have left some parameters without a gradient."""
    two, three = torch.tensor(2.0), torch.tensor(3.0)
    assert zero._steps([two, two.clone()]) == two and zero._steps([]) is None
    with pytest.raises(ValueError, match="different numbers of steps"):
        zero._steps([two, three])


# --- the whole command -----------------------------------------------------------------------------------------------


def command(*args: str, **environment: str) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR")}
    env = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_accelerate_launch_trains_draws_and_exports(tmp_path: Path):
    """By configs/accelerate/deepspeed.yaml, with each stage, as DDP does: losses, pipeline and the grids' pixels."""
    draw(tmp_path / "data")
    how = {"images": 24, "log_every": 8, "validate_every": 16, "sample_every": 16, "timeout_minutes": 3}
    raw = configs(tmp_path, tmp_path, **how)
    train = ["-m", "training.cli", "train", "--no-check"]
    for name in ("clip", "vae", "unet"):
        part = raw[name] | ({"sample": {"prompts": ["red box 2"], "num_inference_steps": 3}} if name == "unet" else {})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(part))
    for name in ("clip", "vae"):
        command(*train, str(tmp_path / f"{name}.yaml"), "train.images=8", ACCELERATE_USE_CPU="true")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    unet = [*train, str(tmp_path / "unet.yaml")]
    command(*torchrun, *unet, ACCELERATE_USE_CPU="true")
    file = str(ROOT / "configs" / "accelerate" / "deepspeed.yaml")
    for stage in STAGES:
        launch = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "2"]
        command(*launch, "--zero_stage", stage[-1], *unet, f"output_dir={tmp_path / stage}")
        for one, other in zip(losses(tmp_path / "unet"), losses(tmp_path / stage), strict=True):
            assert other == pytest.approx(one, rel=1e-5)
        for made in (tmp_path / "unet" / "pipeline").rglob("*.safetensors"):
            expected, found = load_file(made), load_file(tmp_path / stage / made.relative_to(tmp_path / "unet"))
            for k, v in expected.items():
                torch.testing.assert_close(found[k], v, rtol=0, atol=1e-5)
        assert (tmp_path / stage / "samples" / "images_000000024.png").is_file()
