"""Sampling at full size with random weights, ours beside stock pipelines: same weights, prompts, noise and steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import pipes
from benchmarks.measure import interleave, ratio_of_medians, timed
from pipelines.text_to_image import TextToImagePipeline

from .rows import Settings
from .timing import check_device, finish, peak_mb, rounded

__all__ = ["finish", "rows"]
STEPS = (20, 50)
SECONDS, MOST = 4.0, 5  # both sides in turns take about so long, in so many rounds at most; one round at least
GUIDANCE = 5.0
# As they are published: half precision where the model was trained for it.
DTYPES = {"sd15": torch.float16, "sd3": torch.bfloat16}


def rows(settings: Settings) -> dict[str, Callable[[], dict[str, Any]]]:
    check_device(settings)
    return {
        f"sampling/{name}-batch-{batch}": partial(measured, name, batch, settings)
        for name in DTYPES
        for batch in (1, 4)
    }


@cache
def pipelines(name: str, device: str, tiny: bool) -> tuple[Any, Any]:
    """Ours and the stock one, around the same weights."""
    with torch.device(device):
        if tiny:
            stock = pipes.PIPELINES["tiny"][1]() if name == "sd15" else pipes.tiny_sd3()
        else:
            stock = pipes.stable_diffusion_15() if name == "sd15" else pipes.stable_diffusion_3()
    stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config)  # its tables belong on the CPU
    stock.to(device, torch.bfloat16 if device == "cpu" else DTYPES[name])
    ours = TextToImagePipeline.from_diffusers(stock)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    return ours, stock


def measured(name: str, batch: int, settings: Settings) -> dict[str, Any]:
    """Images and steps a second from prompt to picture; ``marginal`` steps a second leave out text and autoencoder."""
    device = torch.device(settings.device)
    ours, stock = pipelines(name, settings.device, settings.tiny)
    prompts = [pipes.PROMPTS[i % len(pipes.PROMPTS)] for i in range(batch)]
    few, many = (2, 4) if settings.tiny else STEPS

    def draw(pipe: Any, steps: int) -> Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(batch)]
        call = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "pt"}
        return pipe(prompts, generator=seeds, **call).images

    sides = {"ours": ours, "stock": stock}
    pictures: dict[str, Tensor] = {}
    peaks: dict[str, float] = {}
    for side, pipe in sides.items():  # the first calls choose kernels too

        def first(side: str = side, pipe: Any = pipe) -> None:
            pictures[side] = draw(pipe, few).float()

        peaks[side] = peak_mb(first, device)
    difference = (pictures["ours"] - pictures["stock"]).norm() / (pictures["stock"] - pictures["stock"].mean()).norm()
    values: dict[str, Any] = {
        "dtype": str(next(stock.vae.parameters()).dtype),
        "pixels": list(pictures["stock"].shape[-2:]),
        "difference": float(difference),
        "peak_mb": peaks,
    }
    a_step = timed(partial(draw, ours, few), device) / few
    medians: dict[int, dict[str, float]] = {}
    for steps in (few, many):
        calls = {side: partial(draw, pipe, steps) for side, pipe in sides.items()}
        rounds = 1 if settings.tiny else min(MOST, max(1, round(SECONDS / (2 * steps * a_step))))
        seconds = interleave(calls, rounds, device=device)
        medians[steps] = {side: float(np.median(x)) for side, x in seconds.items()}
        ratio = ratio_of_medians(seconds["ours"], seconds["stock"])
        values[f"{steps}_steps"] = {
            "rounds": rounds,
            "seconds": medians[steps],
            "images_per_second": {side: batch / x for side, x in medians[steps].items()},
            "steps_per_second": {side: steps / x for side, x in medians[steps].items()},
            "time_over_stock": ratio.value,
            "time_over_stock_90": [ratio.low, ratio.high],
        }
    spans = {side: medians[many][side] - medians[few][side] for side in sides}
    values["marginal_steps_per_second"] = {side: (many - few) / x if x > 0 else None for side, x in spans.items()}
    return rounded(values)
