"""configs/cluster/slurm.sh, for real, with commands in SLURM's place on one machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.killed import configs, draw, losses
from tests.test_processes_launch import environment
from tests.test_processes_nodes import free_port
from tests.toy import ROOT, logged, together
from training import checkpoint

SCRIPT = ROOT / "configs" / "cluster" / "slurm.sh"
# Starts the tasks with what SLURM tells them, passes signals on to them, and ends with the highest of their codes.
SRUN = """
import os, signal, subprocess, sys
from itertools import takewhile
command = sys.argv[1:]
options = list(takewhile(lambda x: x.startswith("--"), command))
assert options == ["--kill-on-bad-exit=0", "--wait=120"], options
count, tasks = int(os.environ["SLURM_NTASKS"]), []
for i in range(count):
    place = {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NUM_TASKS": str(count)}
    tasks.append(subprocess.Popen(command[len(options):], env={**os.environ, **place}))
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda n, frame: [task.send_signal(n) for task in tasks])
open(os.environ["STARTED"], "w").close()
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) [ "$2 $3" = "hostnames node[1-2]" ] && printf '127.0.0.1\\nnode2\\n' ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def command(folder: Path, name: str, text: str) -> None:
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    command(tmp_path, "srun", f"#!{sys.executable} -S\n{SRUN}")
    command(tmp_path, "scontrol", SCONTROL)
    return tmp_path


def submit(cluster: Path, *arguments: str, tasks: int = 1) -> subprocess.Popen:
    """What SLURM does when it starts the job."""
    (cluster / "started").unlink(missing_ok=True)
    told = {
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_NTASKS": str(tasks),
        "SLURM_JOB_NODELIST": "node[1-2]", "MASTER_PORT": str(free_port()), "REQUEUED": str(cluster / "requeued"),
        "STARTED": str(cluster / "started"),
    }  # fmt: skip
    with (cluster / "log").open("a") as log:
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env=environment() | told, stdout=log, stderr=log, cwd=ROOT
        )


def queued_again(cluster: Path) -> list[str]:
    file = cluster / "requeued"
    return file.read_text().split() if file.exists() else []


def until(condition, seconds: float = 90) -> None:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    assert condition()


@pytest.mark.slow
def test_a_preempted_run_is_queued_again_and_ends_as_one_that_was_not(cluster: Path):
    """USR1 to the script, as SLURM sends it, in mid-run; two tasks, each with its rank from SLURM's variables."""
    run, config = cluster / "run", {"log_every": 32}
    command(cluster, "ldm", f'#!/usr/bin/env bash\nshift 2\nexec {sys.executable} -m tests.agents "$@"\n')
    told = json.dumps([{"run": str(run), "config": config, "wait": 0.25}])
    job = submit(cluster, told, tasks=2)
    until(lambda: checkpoint.listed(run / "checkpoints"))
    job.send_signal(signal.SIGUSR1)
    log = cluster / "log"
    assert job.wait(90) == 75, log.read_text()[-3000:]
    assert queued_again(cluster) == ["4711"]
    stopped = checkpoint.images_of(checkpoint.listed(run / "checkpoints")[-1])
    assert 0 < stopped < 96
    assert submit(cluster, told, tasks=2).wait(90) == 0, log.read_text()[-3000:]
    assert queued_again(cluster) == ["4711"]  # not when it is done
    seen = [json.loads(Path(f"{run}.{rank}.json").read_text())["seen"] for rank in range(2)]
    assert sorted(seen[0] + seen[1]) == list(range(stopped, 96))
    assert together(cluster / "whole", 2, config=config) == [0, 0]
    one, two = (checkpoint.listed(x / "checkpoints")[-1] for x in (cluster / "whole", run))
    assert (one / checkpoint.MANIFEST).read_text() == (two / checkpoint.MANIFEST).read_text()
    assert logged(cluster / "whole") == logged(run)


@pytest.mark.parametrize(
    ("ldm", "number", "code", "again"),
    [
        ("trap 'exit 75' USR1; while :; do sleep 0.05; done", signal.SIGUSR1, 75, True),
        ("sleep 10", signal.SIGUSR1, 138, True),  # before it listens to signals, or after
        ("trap 'exit 0' USR1; while :; do sleep 0.05; done", signal.SIGUSR1, 0, False),  # its last step
        ("trap 'exit 75' TERM; while :; do sleep 0.05; done", signal.SIGTERM, 75, False),  # scancel
        ("exit 2", None, 2, False),
        ('[ "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" = "0 0 1 127.0.0.1 train --no-check a b=c" ]', None, 0, 0),
    ],
)
def test_what_the_script_does_with_an_exit_code(ldm, number, code: int, again: bool, cluster: Path):
    command(cluster, "ldm", f"#!/usr/bin/env bash\n{ldm}\n")
    job = submit(cluster, "a", "b=c")
    if number is not None:
        until(lambda: (cluster / "started").exists())
        time.sleep(0.3)  # its shell has set the trap
        job.send_signal(number)
    assert job.wait(20) == code
    assert bool(queued_again(cluster)) is bool(again)


def test_without_a_config_it_tells_how_it_is_called(cluster: Path):
    assert submit(cluster).wait(20) == 2
    assert "usage: sbatch" in (cluster / "log").read_text()


@pytest.mark.slow
def test_the_command_itself_through_a_preemption(cluster: Path):
    draw(cluster / "data")
    shutil.copy(Path(sys.executable).with_name("ldm"), cluster / "bin" / "ldm")
    raw = configs(cluster, cluster, images=400)["clip"]
    (cluster / "clip.yaml").write_text(yaml.safe_dump(raw))
    told = [str(cluster / "clip.yaml"), "train.processes=2"]
    job = submit(cluster, *told, tasks=2)
    until(lambda: checkpoint.listed(cluster / "clip" / "checkpoints"), 200)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(200) == 75 and queued_again(cluster) == ["4711"], (cluster / "log").read_text()[-3000:]
    assert not (cluster / "clip" / "done.json").exists()
    assert submit(cluster, *told, tasks=2).wait(300) == 0, (cluster / "log").read_text()[-3000:]
    assert submit(cluster, *told, "--out", str(cluster / "whole"), tasks=2).wait(300) == 0
    (whole,) = (cluster / "whole").glob("**/checkpoints")
    one, two = checkpoint.listed(whole)[-1], checkpoint.listed(cluster / "clip" / "checkpoints")[-1]
    assert (one / checkpoint.MANIFEST).read_text() == (two / checkpoint.MANIFEST).read_text()
    assert losses(whole.parent) == losses(cluster / "clip")
