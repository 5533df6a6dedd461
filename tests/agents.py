"""What a launcher starts in the tests of nodes: the toy's trainings of a JSON list, one after the other.

Of each: ``run``, its folder; ``kill`` [what, images, rank]: in the launcher's first life, ``worker``: this process,
``agent``: its launcher, ``machine``: both; ``wait``: seconds before each loss; ``stale``: only the first process sees
checkpoints; ``unshared``: a folder whose sibling, another one for each machine, is to be refused; what else ``go``
takes. Each process leaves RUN.RANK.json: what the launcher set, and the images that it has seen in this life.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from tests.toy import Toy, go, settings
from training import checkpoint, processes
from training.fit import ConfigError

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")


def main() -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    for how in json.loads(sys.argv[1]):
        run, (what, at, who) = Path(how.pop("run")), how.pop("kill", (None, 0, 0))
        wait = how.pop("wait", 0.0)

        def act(images: int, what=what, at=at, who=who, wait=wait) -> None:
            time.sleep(wait)
            if what is None or not first or images != at:
                return
            if what == "worker" and rank == who:
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "machine" and rank == who:
                os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "agent" and rank == who:
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(8)  # until its heartbeat has noticed and asked for a stop

        accelerator = processes.started(settings(**how.get("config", {})), "no")
        if "unshared" in how:
            check(Path(how.pop("unshared")).with_name(os.environ["NODE"]), run, rank, accelerator)
        if how.pop("stale", False) and rank:
            checkpoint.chosen = lambda root, resume: None
        tasks: list[Toy] = []
        try:
            go(run, accelerator=accelerator, act=act, made=tasks, **how)
        finally:
            told = {name: os.environ.get(name) for name in PLACE} | {"seen": tasks[0].seen if tasks else []}
            Path(f"{run}.{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def check(folder: Path, run: Path, rank: int, accelerator) -> None:
    """Each machine has its own folder; and the one that all share is taken."""
    try:
        processes.check_shared(folder, "output_dir", accelerator)
    except ConfigError as error:
        Path(f"{run}.{rank}.unshared").write_text(str(error))
    processes.check_shared(run.parent / "shared", "output_dir", accelerator)


if __name__ == "__main__":
    main()
