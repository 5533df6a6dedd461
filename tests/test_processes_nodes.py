"""Several machines: agents of torchrun that meet over loopback, one of them or one of their workers killed."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_processes_launch import environment
from tests.toy import ROOT, go, logged, together
from training import checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]

ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else restarted workers meet the addresses of the dead ones


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def agent(node: int, port: int, runs: Sequence[dict[str, Any]], said: Path, nodes: str = "2") -> subprocess.Popen:
    """The command of one machine."""
    command = [
        *TORCHRUN, "--nnodes", nodes, "--node_rank", str(node), "--rdzv_backend", "c10d",
        "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "toy", "--max_restarts", "1",
        "--rdzv_conf", f"keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3,is_host={1 - node}",
        "-m", "tests.agents", json.dumps(runs),
    ]  # fmt: skip
    place = environment() | ELASTIC | {"NODE": f"node{node}"}
    with said.open("a") as file:
        return subprocess.Popen(command, env=place, stderr=file, cwd=ROOT)


def ends(process: subprocess.Popen, seconds: float = 120) -> int | None:
    """The exit code; None of one that had to be ended."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return None


def newest(run: Path) -> tuple[checkpoint.Files, dict[str, Any]]:
    return checkpoint.load(checkpoint.listed(run / "checkpoints")[-1])


def about(run: Path, rank: int) -> dict[str, Any]:
    return json.loads(Path(f"{run}.{rank}.json").read_text())


def same_bits(one: Path, two: Path) -> None:
    """The newest checkpoints, every file of them, and the logs."""
    folders = [checkpoint.listed(run / "checkpoints")[-1] for run in (one, two)]
    assert folders[0].name == folders[1].name
    assert len({(folder / checkpoint.MANIFEST).read_text() for folder in folders}) == 1
    assert logged(one) == logged(two)


def test_two_agents_train_together_though_a_worker_is_killed(tmp_path: Path):
    """DDP with dropout, in which a worker is killed with SIGKILL: both agents start theirs again, and the weights are
    bit for bit those of two processes that nothing happened to. Then FSDP2, as one process with the double batch.

    The second process sees no checkpoint, as may be for a while where another machine wrote it: the first one chooses.
    A folder that is another one on each machine is refused by both.
    """
    ddp, fsdp2 = tmp_path / "ddp", tmp_path / "fsdp2"
    config = {"log_every": 32, "timeout_minutes": 0.15}
    runs = [
        {"run": str(ddp), "config": config, "kill": ("worker", 80, 1), "stale": True, "unshared": str(tmp_path / "x")},
        {"run": str(fsdp2), "config": config, "dropout": 0.0, "share_out": True},
    ]
    (ddp / "log").mkdir(parents=True)
    (ddp / "log" / "process_7.json").write_text("{}")  # of a life with more processes
    port, said = free_port(), [tmp_path / f"said.{node}" for node in range(2)]
    agents = [agent(node, port, runs, said[node]) for node in range(2)]
    assert [ends(process) for process in agents] == [0, 0], [file.read_text()[-3000:] for file in said]
    told = [about(ddp, rank) for rank in range(2)]
    assert [(x["RANK"], x["LOCAL_RANK"], x["WORLD_SIZE"], x["LOCAL_WORLD_SIZE"]) for x in told] == [
        ("0", "0", "2", "1"),
        ("1", "0", "2", "1"),
    ]
    assert told[1]["TORCHELASTIC_RESTART_COUNT"] == "1"
    assert sorted(told[0]["seen"] + told[1]["seen"]) == list(range(80, 96))  # from the checkpoint at 80 on
    assert not list((ddp / "log").glob("process_*"))  # of no life
    assert together(tmp_path / "whole", 2, config={"log_every": 32}) == [0, 0]
    same_bits(tmp_path / "whole", ddp)
    for rank in range(2):
        text = (tmp_path / f"ddp.{rank}.unshared").read_text()
        assert "output_dir" in text and "process 1 on" in text and "cannot see what process 0 on" in text
    assert not list((tmp_path / "shared").iterdir())
    go(tmp_path / "one", dropout=0.0, config={"batch_size": 8, "log_every": 32})
    as_one(tmp_path / "one", fsdp2)


def as_one(one: Path, two: Path) -> None:
    """But for the order of sums."""
    (expected, _), (found, state) = newest(one), newest(two)
    assert (state["images"], state["world"]) == (96, 2)
    for file in ("net", "critic", "net_ema"):
        for k, v in expected[file].items():
            torch.testing.assert_close(found[file][k], v, rtol=0, atol=1e-6)
    for alone, both in zip(logged(one), logged(two), strict=True):
        assert both == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_an_agent_is_killed_and_started_again(tmp_path: Path):
    """Its worker sees that and asks for a stop, the first agent waits for a second one, and both go on."""
    run, said = tmp_path / "run", [tmp_path / f"said.{node}" for node in range(2)]
    config = {"log_every": 32, "timeout_minutes": 0.25}
    port, runs = free_port(), [{"run": str(run), "config": config, "kill": ("agent", 48, 1)}]
    agents = [agent(node, port, runs, said[node]) for node in range(2)]
    assert ends(agents[1]) == -signal.SIGKILL
    time.sleep(4)  # the rendezvous forgets it after 3
    agents[1] = agent(1, port, runs, said[1])  # as whoever looks after the machines would
    assert [ends(process) for process in agents] == [0, 0], [file.read_text()[-3000:] for file in said]
    assert "the launcher is gone" in said[1].read_text()
    seen = [about(run, rank)["seen"] for rank in range(2)]
    assert sorted(seen[0] + seen[1]) == list(range(64, 96))  # the step in which it was killed is not made again
    assert together(tmp_path / "whole", 2, config={"log_every": 32}) == [0, 0]
    same_bits(tmp_path / "whole", run)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "start"), [("agent", 64), ("machine", 48)])
def test_one_of_two_machines_goes_on_alone(what: str, start: int, tmp_path: Path):
    """--nnodes 1:2: the second agent is killed, and does not come back: its worker saves and stops; or both are, and
    the other one goes on from its last checkpoint. No image is left out and none seen twice."""
    run, said = tmp_path / "run", [tmp_path / f"said.{node}" for node in range(2)]
    config = {"log_every": 32, "timeout_minutes": 0.25}
    port, runs = free_port(), [{"run": str(run), "config": config, "kill": (what, 48, 1)}]
    agents = [agent(node, port, runs, said[node], "1:2") for node in range(2)]
    assert [ends(process) for process in agents] == [0, -signal.SIGKILL], said[0].read_text()[-3000:]
    told = about(run, 0)
    assert (told["WORLD_SIZE"], told["seen"]) == ("1", list(range(start, 96)))
    assert newest(run)[1]["world"] == 1


@pytest.mark.slow
def test_accelerate_starts_a_process_on_each_of_two_machines(tmp_path: Path):
    config = {"log_every": 32}
    runs, port = [{"run": str(tmp_path / "run"), "config": config}], free_port()
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
        "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--mixed_precision", "no",
        "--dynamo_backend", "no",
    ]  # fmt: skip
    machines = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), "-m", "tests.agents", json.dumps(runs)], env=environment(), cwd=ROOT
        )
        for rank in range(2)
    ]
    assert [ends(machine) for machine in machines] == [0, 0]
    assert together(tmp_path / "whole", 2, config=config) == [0, 0]
    same_bits(tmp_path / "whole", tmp_path / "run")
