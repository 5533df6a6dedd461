"""What users do, on tiny bases with random weights: each row is a run to its end, with grid, checkpoint and export.

A row fails where the run does, where a loss or a weight is not finite, or where nothing was learned. The numbers are
of no interest for speed: the networks are those of the tests.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from pipelines.text_to_image import TextToImagePipeline
from tests import adapting, forecasts
from training.evaluate.grids import picture_grid  # noqa: F401 (drawn at the end of every run)
from training.run import train_all

from .facts import installed
from .rows import Settings, Skipped
from .timing import check_device, finish, rounded

__all__ = ["finish", "rows"]
FAMILIES = {"sd": "sd", "sdxl": "sdxl", "sd3": "sd3", "pixart": "pixart alpha"}
DEFAULTS = {"mixed_precision": "auto"}  # which the tests' configs turn off
RESUMED = {"images": 16, "checkpoint_every": 8, "mixed_precision": "auto"}
KILLED_AT = 12  # images seen
Values = dict[str, Any]


def rows(settings: Settings) -> dict[str, Callable[[], Values]]:
    check_device(settings)
    logging.getLogger("training").setLevel(logging.WARNING)
    root = Path(settings.folder) / "works"
    root.mkdir()
    train = partial(run, root)
    functions: dict[str, Callable[[], Values]] = {f"works/lora-{name}": partial(lora, root, name) for name in FAMILIES}
    functions |= {
        "works/whole": lambda: train("sd", "whole")[1],
        "works/fp16": lambda: train("sd3", "fp16", train={"mixed_precision": "fp16"})[1],
        "works/flash": lambda: train("sd", "flash", train={"attention_backend": "flash"})[1],
        "works/xformers": lambda: xformers(root),
        "works/nf4": lambda: nf4(root),
        "works/compile": lambda: train("sd3", "compile", train={"compile": True})[1],
        "works/gan": partial(gan, root),
        "works/resume": partial(resume, root, settings.device),
        "works/offload": partial(offload, settings.device),
        "works/export": partial(export, root, settings.device),
    }
    if "works/resume" in settings.estimates:  # it starts while the rows before it run
        begin_killed(root, settings.device)
    return functions


def run(root: Path, family: str, name: str, **sections: Any) -> tuple[Path, Values]:
    """A run of three steps from a tiny base, with what its log and its weights say."""
    sections["train"] = {**DEFAULTS, **sections.get("train", {})}
    folder = adapting.trained(family, root, name, **sections)
    return folder, outcome(folder)


def outcome(folder: Path) -> Values:
    """Losses of a run that has ended, and what it made.

    Raises:
        RuntimeError: a loss or a weight is not finite, or the grid is not there.
    """
    lines = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    weights = made(folder)
    if not losses or not all(isinstance(x, float) and x == x and abs(x) < 1e9 for x in losses):
        raise RuntimeError(f"losses {losses}: expected finite numbers")
    if bad := [name for name, x in weights.items() if not x.float().isfinite().all()]:
        raise RuntimeError(f"{len(bad)} weights are not finite, the first is {bad[0]}")
    if not any((folder / "samples").glob("*.png")):
        raise RuntimeError("no grid of samples was drawn")
    return rounded({"losses": losses, "tensors": len(weights)})


def made(folder: Path) -> dict[str, Tensor]:
    """The weights that a run wrote, by file and name."""
    files = sorted(x for part in ("pipeline", "adapter") for x in (folder / part).rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": x for file in files for name, x in load_file(file).items()}


def lora(root: Path, name: str) -> Values:
    """With nothing set but the base and a LoRA; the file is one that stock diffusers takes."""
    folder, values = run(root, FAMILIES[name], f"lora-{name}", lora={})
    weights = made(folder)
    up = [x for key, x in weights.items() if "lora_B" in key]
    learned = sum(bool(x.any()) for x in up)  # not all do: SD 3's last block uses no query of the text
    if learned < 0.9 * len(up) or not up:
        raise RuntimeError(f"{len(up) - learned} of {len(up)} LoRA layers have learned nothing")
    values["layers"], values["learned"] = len(up), learned
    values["dtypes"] = sorted({str(x.dtype) for x in weights.values()})
    if name != "pixart":  # whose stock pipeline has no LoRA
        pipe: Any = DiffusionPipeline.from_pretrained(adapting.base(FAMILIES[name], root))
        pipe.load_lora_weights(folder / "adapter")
        if not (adapters := pipe.get_list_adapters()):
            raise RuntimeError("stock diffusers matches nothing of the LoRA")
        values["stock_loads"] = adapters
    return values


def xformers(root: Path) -> Values:
    if installed("xformers") is None:
        raise Skipped("xformers is not installed")
    return run(root, "sd", "xformers", train={"attention_backend": "xformers"})[1]


def nf4(root: Path) -> Values:
    if installed("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    return run(root, "sd3", "nf4", lora={"quantization": "nf4"})[1]


def gan(root: Path) -> Values:
    """The autoencoder with its critic."""
    place = root / "gan"
    place.mkdir()
    data = forecasts.pictures(place / "data", 12, 32)
    config = forecasts.config_of(
        "autoencoder", place / "run", data, place, 24, 4, 32,
        loss={"gan_weight": 0.5, "gan_start": 8, "critic_channels": 8}, model={"block_out_channels": [8, 16]},
        train={"log_every": 4},
    )  # fmt: skip
    train_all([config])
    lines = [json.loads(line) for line in (place / "run" / "log" / "metrics.jsonl").read_text().splitlines()]
    critic = [value for line in lines for key, value in line.items() if key.startswith("critic") and "loss" in key]
    if not critic or not all(x == x and abs(x) < 1e9 for x in critic):
        raise RuntimeError(f"losses of the critic {critic}: expected finite numbers")
    return rounded({"critic_losses": critic})


# --- killed and resumed ----------------------------------------------------------------------------------------------


def killed(root: str, device: str) -> None:
    """A run in a process that is killed in its last steps; the newest checkpoint is four images older."""
    torch.set_num_threads(1)
    os.dup2(os.open(Path(root) / "killed.txt", os.O_CREAT | os.O_WRONLY), 2)
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from training.tasks.diffusion import DiffusionTask

    loss = DiffusionTask.loss

    def fatal(self: DiffusionTask, batch: Any, images: int) -> Any:
        if images >= KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, batch, images)

    DiffusionTask.loss = fatal  # type: ignore[method-assign]
    train_all([adapting.config("sd", Path(root), "killed", train=RESUMED)])


@cache
def begin_killed(root: Path, device: str) -> Any:
    adapting.base("sd", root)  # before two processes write it
    context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    process = context.Process(target=killed, args=(str(root), device))
    process.start()
    return process


def resume(root: Path, device: str) -> Values:
    """A run that was killed and goes on, beside one that was not: how far apart their weights are."""
    process = begin_killed(root, device)
    whole = adapting.trained("sd", root, "unbroken", train=RESUMED)
    process.join(60)
    if process.exitcode != -signal.SIGKILL:
        process.kill()
        said = (root / "killed.txt").read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the run that was to be killed ended with {process.exitcode}: {said}")
    kept = sorted(x.name for x in (root / "killed" / "checkpoints").glob("images_*"))
    started = time.perf_counter()
    resumed = adapting.trained("sd", root, "killed", train=RESUMED)
    a, b = made(whole), made(resumed)
    if a.keys() != b.keys():
        raise RuntimeError("the two runs wrote different tensors")
    far = {name: float((x.float() - b[name].float()).abs().max()) for name, x in a.items()}
    size = max(float(x.float().abs().max()) for x in a.values())
    return rounded({
        "checkpoints_when_killed": kept,
        "seconds_of_the_rest": time.perf_counter() - started,
        "bit_equal": sum(x == 0 for x in far.values()),
        "tensors": len(far),
        "largest_difference": max(far.values()),
        "largest_weight": size,
    })  # fmt: skip


# --- pipelines -------------------------------------------------------------------------------------------------------


def draw(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return adapting.drawn(pipe, ["a red apple", "zebra"]).float().cpu()


def offload(device: str) -> Values:
    """Our SD 3 pipeline with its parts on the GPU only while they are at work."""
    stock: Any = adapting.stock("sd3")
    plain = draw(TextToImagePipeline.from_diffusers(stock).to(device))
    pipe = TextToImagePipeline.from_diffusers(stock)
    pipe.to("cpu")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pipe.enable_model_cpu_offload(device=device)
    difference = float((draw(pipe) - plain).abs().max())
    if difference > 0.05:
        raise RuntimeError(f"pictures differ by {difference:.3g} (of 1) from those drawn without offload")
    left = [name for name, part in pipe.components.items() if getattr(part, "device", None) == torch.device(device, 0)]
    return rounded({
        "difference": difference,
        "peak_mb": (torch.cuda.max_memory_allocated() - before) / 2**20,
        "left_on_the_device": left,
    })  # fmt: skip


def export(root: Path, device: str) -> Values:
    """The folder that a run exports, opened by stock diffusers and by ours, on the device."""
    folder, values = run(root, "sd3", "export")
    stock: Any = DiffusionPipeline.from_pretrained(folder / "pipeline").to(device)
    ours: Any = TextToImagePipeline.from_pretrained(str(folder / "pipeline")).to(device)
    a, b = draw(ours), draw(stock)
    difference = float((a - b).norm() / (b - b.mean()).norm())
    if not difference < 0.05:
        raise RuntimeError(f"stock's pictures differ by {difference:.3g} (relative L2) from ours")
    return values | {"difference": difference, "pipeline": type(stock).__name__}
