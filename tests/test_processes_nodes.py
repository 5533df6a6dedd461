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


def test_two_agents_are_one_process_though_one_is_killed(tmp_path: Path):
    """DDP, in the middle of which the second agent is killed: its worker sees that and asks for a stop, the first agent
    waits for a second one, which is started again, and both go on; then FSDP2. Weights as of one process with the
    double batch. A folder that is another one on each machine is refused by both."""
    how = {"dropout": 0.0, "config": {"log_every": 32, "timeout_minutes": 0.25}}
    names = ("ddp", "fsdp2")
    runs = [{**how, "run": str(tmp_path / name), "share_out": name == "fsdp2"} for name in names]
    runs[0] |= {"kill": ("agent", 48, 1), "unshared": str(tmp_path / "node")}
    port, said = free_port(), [tmp_path / f"said.{node}" for node in range(2)]
    agents = [agent(node, port, runs, said[node]) for node in range(2)]
    assert ends(agents[1]) == -signal.SIGKILL
    time.sleep(4)  # the rendezvous forgets it after 3
    agents[1] = agent(1, port, runs, said[1])  # as whoever looks after the machines would
    assert [ends(process) for process in agents] == [0, 0], [file.read_text()[-3000:] for file in said]
    assert "the launcher is gone" in said[1].read_text()
    assert [about(tmp_path / "ddp", rank)["RANK"] for rank in range(2)] == ["0", "1"]
    for rank in range(2):
        told = about(tmp_path / "ddp", rank)
        assert (told["LOCAL_RANK"], told["WORLD_SIZE"], told["LOCAL_WORLD_SIZE"]) == ("0", "2", "1")
        assert min(told["seen"]) >= 64  # the step in which it was killed is not made again
        text = (tmp_path / f"ddp.{rank}.unshared").read_text()
        assert "output_dir" in text and "process 1 on" in text and "cannot see what process 0 on" in text
    assert not list((tmp_path / "shared").iterdir())
    go(tmp_path / "one", dropout=0.0, config={"batch_size": 8, "log_every": 32})
    expected, _ = newest(tmp_path / "one")
    for name in names:
        found, state = newest(tmp_path / name)
        assert (state["images"], state["world"]) == (96, 2)
        for file in ("net", "critic", "net_ema"):
            for k, v in expected[file].items():
                torch.testing.assert_close(found[file][k], v, rtol=0, atol=1e-6)
        for one, both in zip(logged(tmp_path / "one"), logged(tmp_path / name), strict=True):
            assert both == pytest.approx(one, rel=1e-4)


def test_a_worker_is_killed_and_the_agent_starts_all_again(tmp_path: Path):
    """kill -9 in mid-run, with dropout from each process's own generator: bit for bit the run that was not killed. The
    second process sees no checkpoint, as may be for a while where another machine wrote it: the first one chooses."""
    config = {"log_every": 32, "timeout_minutes": 0.5}
    run = tmp_path / "run"
    runs = [{"run": str(run), "config": config, "kill": ("worker", 80, 1), "stale": True}]
    (run / "log").mkdir(parents=True)
    (run / "log" / "process_7.json").write_text("{}")  # of a life with more processes
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1",
        "-m", "tests.agents", json.dumps(runs),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment() | ELASTIC, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [about(run, rank) for rank in range(2)]
    assert [x["TORCHELASTIC_RESTART_COUNT"] for x in told] == ["1", "1"]
    assert sorted(told[0]["seen"] + told[1]["seen"]) == list(range(80, 96))  # from the checkpoint at 80 on
    assert not list((run / "log").glob("process_*"))  # of neither life
    assert together(tmp_path / "whole", 2, config={"log_every": 32}) == [0, 0]
    one, two = (checkpoint.listed(x / "checkpoints")[-1] for x in (tmp_path / "whole", run))
    assert one.name == two.name
    assert (one / checkpoint.MANIFEST).read_text() == (two / checkpoint.MANIFEST).read_text()
    assert logged(tmp_path / "whole") == logged(run)


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
    one, two = (checkpoint.listed(x / "checkpoints")[-1] for x in (tmp_path / "whole", tmp_path / "run"))
    assert (one / checkpoint.MANIFEST).read_text() == (two / checkpoint.MANIFEST).read_text()
