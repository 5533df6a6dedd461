"""Plan a training run by arithmetic: `python benchmarks/scaling.py [--gpus 64] [--pictures 10_000_000] [--memory]`.

What it prints for the full-size configs is the table of docs/scaling.md. FLOPs are counted on the network of the
config; the chip's speed, the share of it that is reached, prices and disks are assumptions, given as options.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple, cast

import torch

from training.arithmetic import parameters, training_flops, training_memory
from training.config import load
from training.schema import DiffusionConfig
from training.sizes import Sizes, denoiser_of

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
# factor, latent channels, text width and tokens, pooled width: of the parts that the configs name
PLANS = {
    "unet_sd2_from_scratch": Sizes(8, 4, 1024, 77),
    "dit_xl_from_scratch": Sizes(8, 4, 768, 77),
    "mmdit_from_scratch": Sizes(8, 4, 770, 78, 770),  # CLIP-L's 77 tokens and one for the 256 empty ones
}


class Assumed(NamedTuple):
    gpus: int = 64
    tflops: float = 989.0  # H100 SXM, bf16, dense
    utilisation: float = 0.4  # of it; peers reach 0.20 to 0.28
    pictures: int = 10_000_000
    price: float = 2.5  # USD an hour for one GPU
    disk: float = 2.0  # GB/s to one file system


def config_of(name: str) -> DiffusionConfig:
    return cast(DiffusionConfig, load(ROOT / "configs" / f"{name}.yaml"))


def plan(name: str, a: Assumed) -> dict[str, str]:
    """The rows of one config's column."""
    config, s = config_of(name), PLANS[name]
    build, forward = denoiser_of(config, s)
    with torch.device("meta"):
        trained, _ = parameters(build())
    flops = training_flops(build, forward)
    speed = a.gpus * a.tflops * 1e12 * a.utilisation / flops  # images a second
    days = config.train.images / speed / 86_400
    moments = 2 * 2 * s.latent_channels * (config.data.resolution // s.factor) ** 2  # half precision, mean and variance
    text = 2 * s.text_length * s.text_width
    picture = moments * (1 + config.data.random_flip) + text
    checkpoint = (4 + config.optimizer.state_bytes + 4) * trained  # weights, moments, average
    return {
        "parameters": f"{trained / 1e6:,.0f}M",
        "training step, one image": f"{flops / 1e12:.2f} TFLOP",
        "images a second": f"{speed:,.0f}",
        "images in the config": f"{config.train.images / 1e6:,.0f}M",
        "days": f"{days:.1f}",
        "cost": f"${days * 24 * a.gpus * a.price:,.0f}",
        "cache": f"{picture * a.pictures / 1e12:.2f} TB, {picture / 1e3:.0f} kB a picture",
        "read from it": f"{speed * (moments + text) / 1e9:.2f} GB/s in all",
        "checkpoint": f"{checkpoint / 1e9:.1f} GB, {checkpoint / 1e9 / a.disk:.0f} s",
    }


def table(a: Assumed) -> str:
    """Markdown, a column for each config."""
    columns = {name: plan(name, a) for name in PLANS}
    rows = next(iter(columns.values())).keys()
    lines = ["| | " + " | ".join(f"`{name}`" for name in columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {row} | " + " | ".join(column[row] for column in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


MEMORY_HEAD = """| | batch of one GPU | GiB | weights | gradients | DDP's buckets | optimizer | average | activations |
|---|---|---|---|---|---|---|---|---|"""


def memory(name: str) -> str:
    """A row of Markdown: one of several GPUs under DDP, in bf16 by CUDA's autocast."""
    config = config_of(name)
    build, forward = denoiser_of(config, PLANS[name])
    batch = config.train.batch_size
    step = training_memory(
        build, forward, batch, averaged=bool(config.ema_decay),
        accumulated=config.train.gradient_accumulation_steps > 1, replicated=True, device_type="cuda",
        autocast=torch.bfloat16, state_bytes=config.optimizer.state_bytes,
    )  # fmt: skip
    sizes = (
        step.total, step.weights, step.gradients, step.buckets, step.optimizer, step.average, step.activations
    )  # fmt: skip
    return f"| `{name}` | {batch} | " + " | ".join(f"{size / GIB:.1f}" for size in sizes) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, default in Assumed._field_defaults.items():
        parser.add_argument(f"--{field}", type=type(default), default=default)
    parser.add_argument("--memory", action="store_true", help="also the memory of one GPU")
    given = vars(parser.parse_args())
    with_memory = given.pop("memory")
    print(table(Assumed(**given)))
    if with_memory:
        print("\n".join(["", MEMORY_HEAD, *map(memory, PLANS)]))


if __name__ == "__main__":
    main()
