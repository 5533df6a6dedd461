"""Every task at a size for tests: trained in one go, or killed at random moments until it is done.

A process imports all that is needed and computes nothing; each run is a fork of it. ``python -m tests.killed`` writes
``golden.json`` anew."""

import importlib
import json
import multiprocessing as mp
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = ("clip", "vae", "unet", "stream", "adapt")
COLOURS = ("red", "green", "blue", "yellow", "black", "orange")
GOLDEN = Path(__file__).with_name("golden.json")


def draw(root: Path) -> Path:
    """An imagefolder of 22 pictures, captioned with a colour and a place; and the same as parquet files beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image, ImageDraw

    shards = root.with_name("shards")
    shards.mkdir(parents=True)
    for split, count in (("train", 18), ("test", 4)):
        (root / split).mkdir(parents=True)
        lines = []
        for i in range(count):
            colour, x = COLOURS[i % 6], 2 + 3 * (i // 6) + (split == "test")
            picture = Image.new("RGB", (16, 16), "white")
            ImageDraw.Draw(picture).rectangle((x, 3, x + 6, 12), fill=colour)
            picture.save(root / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": f"{colour} box {x}"}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        for part in range(3):
            mine = [json.loads(line) for line in lines[part::3]]
            pictures = [{"bytes": (root / split / x["file_name"]).read_bytes(), "path": x["file_name"]} for x in mine]
            table = pa.table({"image": pictures, "text": [x["text"] for x in mine]})
            pq.write_table(table, shards / f"{split}-{part:05d}-of-00003.parquet")
    return root


def configs(root: Path, out: Path, **train: Any) -> dict[str, dict[str, Any]]:
    """By task; CLIP, autoencoder and the base of adapting are taken from ``root``. The stream has a loader's worker."""
    often = {"log_every": 12, "validate_every": 24, "sample_every": 10**6, "checkpoint_every": 8}
    how = {"images": 80, "batch_size": 2, "gradient_accumulation_steps": 2, "mixed_precision": "no", **often, **train}
    common = {
        "data": {"path": str(root / "data"), "resolution": 16, "random_flip": True},
        "train": how, "ema_decay": 0.9, "optimizer": {"learning_rate": 1e-3, "lr_scheduler": "cosine"}, "seed": 7,
    }  # fmt: skip
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    clip = {
        "text": tower, "vision": {**tower, "patch_size": 8}, "projection_dim": 8,
        "tokenizer": {"vocab_size": 520, "max_length": 12},
    }  # fmt: skip
    vae = {"block_out_channels": [8, 8], "norm_num_groups": 4, "mid_block_add_attention": False}
    loss = {"gan_weight": 0.1, "gan_start": 24, "critic_channels": 8, "critic_layers": 1}
    unet = {
        "name": "unet",
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
    }
    parts = {"vae": {"pretrained": str(root / "vae")}, "text": {"pretrained": str(root / "clip")}}
    flow = {**common, "data": {"path": str(root / "shards"), "resolution": 16, "streaming": True}}
    flow["train"] = {**how, "num_workers": 1}
    adapt = {
        "base": str(root / "unet"), "lora": {"rank": 2, "lora_dropout": 0.2}, "train_text_encoder": True,
        "new_tokens": [{"token": "<toy>"}],
        "prior": {"class_prompt": "red box", "num_class_images": 4, "num_inference_steps": 2, "guidance_scale": 1.0},
    }  # fmt: skip
    return {
        "clip": {"task": "clip", **common, "model": clip, "output_dir": str(out / "clip")},
        "vae": {"task": "autoencoder", **common, "model": vae, "loss": loss, "output_dir": str(out / "vae")},
        "unet": {"task": "diffusion", **common, **parts, "model": unet, "output_dir": str(out / "unet")},
        "adapt": {"task": "adapt", **common, **adapt, "output_dir": str(out / "adapt")},
        "stream": {"task": "diffusion", **flow, **parts, "model": unet, "output_dir": str(out / "stream")},
    }


def one_run(raw: dict[str, Any]) -> None:
    from training.config import parse
    from training.run import train_all

    train_all([parse(raw, raw["task"])])


def forked(
    raw: dict[str, Any],
    said: Path,
    train: Callable[[dict[str, Any]], None] = one_run,
    *,
    rank: int = 0,
    world: int = 1,
    port: int = 0,
) -> int:
    """A process that trains, alone or as one of several; its messages go to a file, and the rows that it sees to one
    beside it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    try:
        handle = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 2)
        os.environ.update({k: str(v) for k, v in place.items()} if world > 1 else {}, ACCELERATE_USE_CPU="true")
        import torch

        rows_told(said.with_suffix(".rows"))
        torch.set_num_threads(1)
        train(raw)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        raise
    finally:
        os._exit(code)


def rows_told(file: Path) -> None:
    """Every step of this process's loop leaves a line: images seen before it, and its rows."""
    from training.guards import Watchman

    look = Watchman.look

    def told(self: Any, images: int, asked: bool, rows: Any, moved: Any) -> bool:
        with file.open("a") as handle:
            handle.write(json.dumps([images, rows.tolist()]) + "\n")
        return look(self, images, asked, rows, moved)

    Watchman.look = told  # type: ignore[method-assign]


def rows_seen(file: Path) -> dict[int, list[int]]:
    """By images seen before the step. What was done again after a kill was done with the same rows."""
    found: dict[int, list[int]] = {}
    for line in file.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):  # the kill came in between
            continue
        images, rows = json.loads(line)
        assert found.setdefault(images, rows) == rows, (file, images)
    return found


def trained(raw: dict[str, Any], said: Path) -> None:
    _, status = os.waitpid(forked(raw, said), 0)
    assert status == 0, said.read_text()[-3000:]


def until_done(raw: dict[str, Any], said: Path, moments: random.Random, longest: float, kills: int) -> int:
    """Kills the run at random moments, at most ``kills`` times and the sooner the less is left of it, and then lets it
    end."""
    for n in range(kills):
        pid = forked(raw, said)
        time.sleep(moments.uniform(0, longest * (1 - n / kills)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if (Path(raw["output_dir"]) / "done.json").exists():
            return n
    trained(raw, said)
    return kills


def prepared(root: Path) -> None:
    """Imports all that a fork needs, and draws the pictures. Reports, drawn outside the loop, are left out."""
    importlib.import_module("tests.ahead")
    import training.evaluate.report

    training.evaluate.report.write_report = lambda *a, **k: None  # of the forks too
    mp.set_start_method("fork", force=True)  # of loaders' workers: they look whether their parent lives
    draw(root / "data")


def all_tasks(root: Path, kills: int, seed: int, train: dict[str, Any]) -> None:
    """ROOT/TASK in one go, and ROOT/killed/TASK."""
    prepared(root)
    moments, told = random.Random(seed), {}
    for task in TASKS:
        start = time.monotonic()
        trained(configs(root, root, **train)[task], root / f"{task}.txt")
        longest = time.monotonic() - start
        raw = configs(root, root / "killed", **train)[task]
        told[task] = until_done(raw, root / f"{task}.killed.txt", moments, longest, kills)
    (root / "kills.json").write_text(json.dumps(told))


def losses(run: Path) -> list[dict[str, float]]:
    from training.journal import TIMED

    rows = map(json.loads, (run / "log" / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def place() -> dict[str, str]:
    """What decides the last bits: versions, and the CPU's kernels."""
    import diffusers
    import torch
    import transformers

    from benchmarks.measure import cpu_name

    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
    return {**versions, "cpu": f"{torch.backends.cpu.get_cpu_capability()} {cpu_name()}"}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        all_tasks(Path(folder), 0, 0, {})
        found = {task: losses(Path(folder) / task) for task in TASKS}
    GOLDEN.write_text(json.dumps({"place": place(), "losses": found}, indent=1) + "\n")
