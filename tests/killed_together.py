"""Two processes over gloo that train a task of ``tests.killed`` together: in one go, or with the whole job or one of
them killed at random moments until it is done."""

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.killed import configs, forked, one_run, prepared, trained

WORLD = 2
LIMIT = 240.0  # seconds in which the one that is left must have ended: both timeouts are below


def job(raw: dict[str, Any], said: Path, train: Callable[[dict[str, Any]], None] = one_run) -> list[int]:
    """The processes' ids. Messages go to SAID.RANK.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [said.with_suffix(f".{rank}.txt") for rank in range(WORLD)]
    return [forked(raw, file, train, rank=rank, world=WORLD, port=port) for rank, file in enumerate(files)]


def ends(pids: list[int], seconds: float) -> list[int | None]:
    """Exit codes; None for one that did not end and had to be killed."""
    limit, codes = time.monotonic() + seconds, []
    for pid in pids:
        found, status = os.waitpid(pid, os.WNOHANG)
        while not found and time.monotonic() < limit:
            time.sleep(0.01)
            found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        codes.append(os.waitstatus_to_exitcode(status) if found else None)
    return codes


def killed_all(raw: dict[str, Any], said: Path, moment: float) -> None:
    """The whole job at once, as when its machine is lost."""
    pids = job(raw, said)
    time.sleep(moment)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    ends(pids, LIMIT)


def killed_one(raw: dict[str, Any], said: Path, moment: float, rank: int, *, training: bool) -> None:
    """One of the job: the other ends by itself, and names it if it was lost while both trained.

    Args:
        moment: seconds after the start; or, with ``training``, after the first checkpoint that this job writes.
    """
    run, limit = Path(raw["output_dir"]), time.monotonic() + LIMIT
    known, pids = written(run), job(raw, said)
    while training and written(run) == known and time.monotonic() < limit:
        time.sleep(0.002)
    time.sleep(moment)
    os.kill(pids[rank], signal.SIGKILL)
    codes = ends([pids[rank], pids[1 - rank]], LIMIT)
    if (run / "done.json").exists():
        return
    lost = run / "log" / f"process_{rank}.json"  # its pulse, which it takes away when it leaves the loop
    told = said.with_suffix(f".{1 - rank}.txt").read_text()
    assert codes[0] == -signal.SIGKILL and codes[1] not in (None, 0, 75), (codes, told[-3000:])
    if training or (lost.exists() and json.loads(lost.read_text())["pid"] == pids[rank]):
        assert f"process {rank} (pid {pids[rank]} on" in " ".join(told.split()), told[-3000:]


def written(run: Path) -> list[str]:
    return sorted(p.name for p in run.glob("checkpoints/images_*") if p.name.removeprefix("images_").isdigit())


def done(raw: dict[str, Any], said: Path) -> None:
    codes = ends(job(raw, said), 10 * LIMIT)
    assert codes == [0] * WORLD, [said.with_suffix(f".{rank}.txt").read_text()[-3000:] for rank in range(WORLD)]


def tasks_together(root: Path, tasks: tuple[str, ...], kills: int, seed: int, train: dict[str, Any]) -> None:
    """ROOT/TASK by two processes in one go, and ROOT/killed/TASK: ``kills`` times the whole job is killed and as often
    one of it. With one of each, both happen while the processes train."""
    prepared(root)
    moments, told = random.Random(seed), {}
    how = {"timeout_minutes": 2, "processes": WORLD, **train}
    for task in tasks:
        start = time.monotonic()
        done(configs(root, root, **how)[task], root / task)
        longest = time.monotonic() - start
        raw, said = configs(root, root / "killed", **how)[task], root / f"{task}_killed"
        for n in range(kills):
            if kills == 1:  # one after a step or a few, the other somewhere between the start and the end
                killed_one(raw, said, moments.uniform(0, 0.1), moments.randrange(WORLD), training=True)
                killed_all(raw, said, moments.uniform(0.3, 0.7) * longest)
                continue
            left = longest * (1 - n / kills)  # the sooner the less is left of it
            killed_all(raw, said, moments.uniform(0, left))
            killed_one(raw, said, moments.uniform(0, left), moments.randrange(WORLD), training=False)
            told[task] = told.get(task, 0) + 2
            if (Path(raw["output_dir"]) / "done.json").exists():
                break
        done(raw, said)
    (root / "kills.json").write_text(json.dumps(told))


def one_and_two(root: Path, tasks: tuple[str, ...]) -> None:
    """ROOT/TASK by one process and ROOT/two/TASK by two, which see half of each batch; two steps, of two micro-batches
    each, without a critic, whose weight is a mean over processes. Three held-out pictures: one has more of them."""
    prepared(root)
    lines = root / "data" / "test" / "metadata.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:3]))
    how = {"images": 16, "log_every": 8, "validate_every": 8, "timeout_minutes": 3}
    one, two = configs(root, root, **how, batch_size=4), configs(root, root / "two", **how)
    for raw in (one["vae"], two["vae"]):
        raw["loss"] = {}
    for raw in (one["adapt"], two["adapt"]):  # what is dropped is drawn by each process, for its own rows
        raw["lora"]["lora_dropout"] = 0.0
    for task in tasks:
        trained(one[task], root / f"{task}.txt")
        done(two[task], root / f"{task}_two")


def shared_out(root: Path, train: dict[str, Any]) -> None:
    """The UNet by one process, in ROOT/unet; and with its weights shared out between two as accelerate's FSDP2 config
    asks for, in ROOT/fsdp2 and, with
    ``fsdp_reshard_after_forward: false``, in ROOT/kept: trained and exported by both, and exported by one again. And
    the whole UNet trained on, by one process in ROOT/adapt and sharded between two in ROOT/adapt_fsdp2."""
    prepared(root)
    how = {"images": 24, "log_every": 8, "validate_every": 16, "sample_every": 16, "timeout_minutes": 3, **train}
    one, two = configs(root, root, **how, batch_size=4), configs(root, root / "two", **how)
    sample = {"prompts": ["red box 2", "blue box 5"], "num_inference_steps": 3, "seed": 5}
    trained(one["clip"] | {"train": {**one["clip"]["train"], "images": 8}}, root / "clip.txt")
    trained(one["vae"] | {"train": {**one["vae"]["train"], "images": 8}}, root / "vae.txt")
    trained(one["unet"] | {"sample": sample}, root / "unet.txt")
    for name, after in (("fsdp2", True), ("kept", False)):
        raw = two["unet"] | {"sample": sample, "output_dir": str(root / name)}
        codes = ends(job(raw, root / f"{name}_said", train=partial(train_shared_out, reshard=after)), 5 * LIMIT)
        assert codes == [0] * WORLD, [(root / f"{name}_said.{r}.txt").read_text()[-3000:] for r in range(WORLD)]
        (root / name / "pipeline").rename(root / name / "by_two")
        trained(raw, root / f"{name}.txt")  # the same command in one process: nothing to train, so it exports
    few = {"images": 8, "validate_every": 8, "sample_every": 10**6}
    adapt = {k: v for k, v in one["adapt"].items() if k not in ("lora", "train_text_encoder", "new_tokens", "prior")}
    trained(adapt | {"train": one["adapt"]["train"] | few}, root / "adapt.txt")
    raw = adapt | {"train": two["adapt"]["train"] | few, "output_dir": str(root / "adapt_fsdp2")}
    codes = ends(job(raw, root / "adapt_said", train=partial(train_shared_out, reshard=True)), 5 * LIMIT)
    assert codes == [0] * WORLD, [(root / f"adapt_said.{r}.txt").read_text()[-3000:] for r in range(WORLD)]


def train_shared_out(raw: dict[str, Any], *, reshard: bool) -> None:
    """What ``train_one`` does, with the plugin that accelerate makes of a config on GPUs: on a CPU it makes none."""
    import torch
    from accelerate.state import AcceleratorState

    from training import loop, processes
    from training.config import dump, parse
    from training.run import build, inputs_of, open_data

    config, run = parse(raw, raw["task"]), Path(raw["output_dir"])
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(dump(config))
    accelerator = processes.started(config.train, config.train.mixed_precision)
    plugin = SimpleNamespace(reshard_after_forward=reshard, cpu_offload=None)
    AcceleratorState.is_fsdp2 = property(lambda self: True)  # type: ignore[assignment]
    accelerator.state._shared_state["fsdp_plugin"] = accelerator.state.fsdp_plugin = plugin
    torch.manual_seed(config.seed)
    rows = open_data(config)
    task = build(config, *rows, run, accelerator)
    how = {"run": run, "seed": config.seed, "accelerator": accelerator, "inputs": inputs_of(config, rows[0])}
    loop.train(task, config.train, **how)
    with loop.whole(task.players, accelerator):
        if accelerator.is_main_process:
            task.export()
    accelerator.wait_for_everyone()
