"""Whole training steps on synthetic latents and text: our loop beside the stock network in a plain, well-made loop.

Ours is ``training.loop.train`` as ``ldm train`` runs it, with the diffusion task's own loss, on rows that are in memory
instead of in a cache file. Stock is the diffusers class with the same weights, autocast, torch's fused AdamW and
``EMAModel(foreach=True)``, on batches that are on the device already. They take turns by blocks of steps.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401 (imported while the job before this one measures)
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.measure import ratio_of_medians
from ldm.denoiser import Denoiser
from ldm.latents import LatentScale
from pipelines.schedulers import default_schedule
from training import loop, measure, processes
from training.arithmetic import Memory, training_flops, training_memory
from training.config import parse
from training.encoders import FAMILY
from training.objective import path_of, prediction_of, times, weights
from training.schema import DiffusionConfig
from training.sizes import Sizes, denoiser_of
from training.tasks.common import compile_blocks, player
from training.tasks.diffusion import DiffusionTask, network

from .rows import Settings
from .timing import check_device, finish, rounded, synchronize

__all__ = ["CASES", "finish", "rows"]
FEWEST_WARM = 3  # steps before anything is counted: kernels are chosen, the optimizer's state is made
ROUNDS = 3  # blocks of each side
BLOCK_SECONDS = 1.0  # a block is about so long; ``--tiny``: two steps
SMALL_GPU = 100 * 2**30  # bytes; with less memory the batches are halved
DISTINCT = 64  # rows of synthetic data
EMPTY_TOKENS = 256  # that SD 3's last token stands for


@dataclass(frozen=True)
class Case:
    """A network from a config, and what it trains on.

    Args:
        model: the config's section.
        objective: other sections of the config.
        resolution: in pixels; latents are an eighth of it.
        sizes: of autoencoder and text encoder.
        batch: rows of a step, on a GPU with 100 GiB or more.
        parameters: millions, of the full size.
    """

    model: dict[str, Any]
    sizes: Sizes
    resolution: int
    batch: int
    parameters: float
    objective: dict[str, Any] = field(default_factory=dict)


DDPM: dict[str, Any] = {"path": {"name": "discrete"}, "prediction_type": "epsilon", "timesteps": {"name": "uniform"}}
SD2 = {
    "name": "unet", "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [5, 10, 20, 20],
    "attention_levels": [True, True, True, False],
}  # fmt: skip
CASES = {
    "unet-64": Case(SD2, Sizes(8, 4, 1024, 77), 512, 32, 865.9, DDPM),
    "unet-32": Case(SD2, Sizes(8, 4, 1024, 77), 256, 128, 865.9, DDPM),
    "dit-xl-32": Case(
        {"name": "dit", "num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16},
        Sizes(8, 4, 4096, 120), 256, 128, 610.8, DDPM,
    ),
    "mmdit-2b-64": Case(
        {"name": "mmdit", "num_layers": 24, "num_attention_heads": 24, "joint_attention_dim": 4096, "qk_norm": None,
         "pos_embed_max_size": 192},
        Sizes(8, 16, 4096, 78, 2048), 512, 16, 2028.3,
    ),
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [8, 16], "attention_head_dim": [1, 2], "attention_levels": [True, False],
             "layers_per_block": 1, "norm_num_groups": 4},
    "dit": {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2},
    "mmdit": {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 24},
}  # fmt: skip


def tiny(case: Case) -> Case:
    s = case.sizes
    s = replace(s, text_width=24, text_length=6, pooled_width=16 if s.pooled_width else None)
    return replace(case, model={**case.model, **TINY[case.model["name"]]}, sizes=s, resolution=64, batch=4)


def rows(settings: Settings) -> dict[str, Callable[[], dict[str, Any]]]:
    """``NAME`` with stock in turns; ``NAME-channels-last`` and ``NAME-compile`` ours alone."""
    check_device(settings)
    functions: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in CASES:
        functions[f"train/{name}"] = partial(measured, name, settings)
        for variant in ("channels-last", "compile"):
            functions[f"train/{name}-{variant}"] = partial(measured, name, settings, variant)
    return functions


def config_of(case: Case, folder: str, batch: int, mixed_precision: str = "bf16") -> DiffusionConfig:
    """A run that never ends, validates, draws or saves."""
    never = {f"{name}_every": 10**12 for name in ("validate", "sample", "checkpoint")}
    config = parse(
        {
            "task": "diffusion",
            "output_dir": folder,
            "data": {"path": "synthetic", "resolution": case.resolution},
            "vae": {"pretrained": "synthetic"},
            "text": {"pretrained": "synthetic"},
            "model": case.model,
            **case.objective,
            "ema_decay": 0.9999,
            "optimizer": {"learning_rate": 1e-5},
            "train": {
                "images": 10**9, "batch_size": batch, "mixed_precision": mixed_precision, "report_to": "none", **never,
            },
        },
        "the benchmark",
    )  # fmt: skip
    assert isinstance(config, DiffusionConfig)
    return config


class SyntheticRows(Dataset):
    """What ``LatentBatches`` hands over from a cache, from random numbers in memory."""

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(0)
        s, side = case.sizes, case.resolution // case.sizes.factor

        def draw(*shape: int) -> Tensor:
            return torch.randn(DISTINCT, *shape, generator=generator)

        mean, log_var = draw(s.latent_channels, side, side), draw(s.latent_channels, side, side) - 5
        self.fields = {
            "moments": torch.cat([mean, log_var], dim=1).half(),
            "tokens": draw(s.text_length, s.text_width).half(),
        }
        family = FAMILY[case.model["name"]]
        if family == "sd3":
            self.fields["tokens"][:, -1] = 0
            bias = torch.zeros(DISTINCT, s.text_length)
            bias[:, -1] = math.log(EMPTY_TOKENS)
            self.fields |= {"bias": bias, "pooled": draw(s.pooled_width or 0).half()}
        if family == "pixart":  # captions of all lengths, the rest is padding
            lengths = torch.randint(1, s.text_length + 1, (DISTINCT, 1), generator=generator)
            padding = torch.arange(s.text_length) >= lengths
            self.fields["bias"] = torch.zeros(DISTINCT, s.text_length).masked_fill(padding, -math.inf)

    def __len__(self) -> int:
        return 1_000_000

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        index, row = torch.tensor(pairs, dtype=torch.int64).unbind(1)
        return {"index": index, "row": row, **{name: x[row % DISTINCT] for name, x in self.fields.items()}}


class SyntheticTask(DiffusionTask):
    """The diffusion task with its own loss and player, on synthetic rows: no encoders, no caches, nothing drawn."""

    def __init__(self, case: Case, config: DiffusionConfig, accelerator: Accelerator, variant: str, backend: str):
        self.config, self.seed, self.accelerator, self.device = config, config.seed, accelerator, accelerator.device
        self.scale, self.conditioner, self.text = LatentScale(), None, None
        self.about: Any = case.sizes  # of which the pixels per latent are read
        torch.manual_seed(config.seed)
        with torch.device(self.device):  # 2B weights are drawn where they are fast
            self.net = network(config, case.sizes)
        if variant == "channels-last":
            self.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if variant == "compile":
            compile_blocks(self.net, backend)
        path, prediction = path_of(config.path), prediction_of(config)
        self.schedule = default_schedule(path, prediction, FAMILY[config.model.name], config.timesteps.shift)
        self.time = partial(times, config.timesteps, config.train.batch_size, path)
        self.weight = partial(weights, config, path, prediction)
        self.rows = SyntheticRows(case)
        made = player("net", self.net, self.loss, config, accelerator)
        self.players = [made]
        self.denoiser = Denoiser(made.module, path, prediction, self.schedule.time_input)


class StockTrainer:
    """The stock network's step, as a careful user of diffusers writes it."""

    def __init__(self, net: Any, prediction_type: str):
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
        from diffusers.training_utils import EMAModel

        self.net = net.train().requires_grad_(True)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, weight_decay=1e-2, fused=True)
        self.ema = EMAModel(net.parameters(), decay=0.9999, foreach=True)
        self.flow = prediction_type == "flow_prediction"
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0) if self.flow else DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )  # fmt: skip
        self.losses: list[Tensor] = []

    def step(self, batch: dict[str, Tensor]) -> None:
        mean, log_var = batch["moments"].float().chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        noise = torch.randn_like(latents)
        if self.flow:
            sigma = torch.sigmoid(torch.randn(len(latents), device=latents.device))
            t, s = 1000 * sigma, sigma[:, None, None, None]
            noisy, target = (1 - s) * latents + s * noise, noise - latents
        else:
            t = torch.randint(0, 1000, (len(latents),), device=latents.device)
            noisy, target = self.scheduler.add_noise(latents, noise, t), noise
        with torch.autocast(latents.device.type, torch.bfloat16):
            output = self.call(noisy, t, batch)
        loss = F.mse_loss(output.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.net.parameters())
        self.losses.append(loss.detach())

    def call(self, noisy: Tensor, t: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """As the stock pipelines call the three classes. SD 3's empty tokens are all there: stock takes each."""
        tokens, kind = batch["tokens"].float(), type(self.net).__name__
        if kind == "SD3Transformer2DModel":
            tokens = torch.cat([tokens[:, :-1], tokens[:, -1:].expand(-1, EMPTY_TOKENS, -1)], dim=1)
            return self.net(noisy, tokens, batch["pooled"].float(), t, return_dict=False)[0]
        if kind == "PixArtTransformer2DModel":
            rest = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False}
            mask = batch["bias"] == 0
            return self.net(noisy, tokens, timestep=t, encoder_attention_mask=mask, **rest)[0]
        return self.net(noisy, t, tokens, return_dict=False)[0]


class Finished(Exception):
    """All blocks are measured."""


class Blocks:
    """Holds our loop at the start of a step, to read the clock and to let the other side make as many steps.

    A block of ours lasts from the start of one step to the start of a later one: loading, loss, backward pass,
    optimizer, average, guards and log are all in it.

    Args:
        other: called with the batch of the waiting step once ours is warm; returns the other side's step, or None.
    """

    def __init__(
        self,
        task: SyntheticTask,
        other: Callable[[dict[str, Tensor]], Callable[..., None] | None],
        rounds: int,
        block_seconds: float,
    ):
        self.rows, self.device, self.other = task.rows, task.device, other
        self.rounds, self.block_seconds = rounds, block_seconds
        first = task.players[0]
        self.inner = first.loss
        self.players = [replace(first, loss=self.loss)]
        self.seconds: dict[str, list[float]] = {"ours": [], "stock": []}
        self.losses: list[Tensor] = []
        self.peak = 0
        self.length = 1  # steps of a block
        self.calls, self.start, self.warm = 0, 0.0, 0.0
        self.step: Callable[..., None] | None = None

    def loss(self, batch: dict[str, Tensor], images: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.waiting(batch)
        self.calls += 1
        value, named = self.inner(batch, images)
        self.losses.append(value.detach())
        return value, named

    def waiting(self, batch: dict[str, Tensor]) -> None:
        """Before step number ``calls``."""
        if self.calls < FEWEST_WARM:
            if self.calls == 1:  # the optimizer has its state: from here on a step is like the next
                synchronize(self.device)
                measure.reset_peak(self.device)
            if self.calls == FEWEST_WARM - 1:
                self.start = self.clock()
            return
        counted = self.calls - FEWEST_WARM
        if counted == 0:
            self.warm = self.clock()
            seconds = self.warm - self.start  # of the last warm step
            self.length = max(2, min(30, round(self.block_seconds / seconds)))
            self.peak = measure.peak(self.device)
            self.step = self.other(batch)
        elif counted % self.length:
            return
        else:
            self.seconds["ours"].append(self.clock() - self.start)
            if self.step is not None:
                self.seconds["stock"].append(self.block(self.step, batch))
            if counted == self.rounds * self.length:
                raise Finished
        self.start = self.clock()

    def block(self, step: Callable[..., None], batch: dict[str, Tensor]) -> float:
        start = self.clock()
        for _ in range(self.length):
            step(batch)
        return self.clock() - start

    def clock(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def measured(name: str, settings: Settings, variant: str = "") -> dict[str, Any]:
    """Images a second, the peak of the memory beside the forecast, the share of the measured matrix peak (MFU)."""
    case = CASES[name]
    batch = case.batch
    if settings.tiny:
        case = tiny(case)
        batch = case.batch
    elif torch.cuda.mem_get_info()[1] < SMALL_GPU:
        batch //= 2
    folder = Path(settings.folder) / (name + variant)
    folder.mkdir()
    config = config_of(case, str(folder), batch)
    accelerator = processes.started(config.train, "bf16")
    device = accelerator.device
    with forecast(case, config, settings, wanted=not variant) as promised:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        backend = "eager" if settings.tiny else "inductor"
        began = time.perf_counter()
        task = SyntheticTask(case, config, accelerator, variant, backend)
        stock: list[StockTrainer] = []
        errors: list[str] = []

        def build(batch: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], None] | None:
            """The stock side, from our weights as they are now."""
            if variant:
                return None
            try:
                twin = copy.deepcopy(task.net.to_diffusers())
                trainer = StockTrainer(twin, config.prediction_type)
                for _ in range(2):
                    trainer.step(batch)
            except RuntimeError as error:  # both sides may not fit: then ours is measured alone
                errors.append(str(error).splitlines()[0])
                return None
            stock.append(trainer)
            return trainer.step

        blocks = Blocks(task, build, *((1, 0.0) if settings.tiny else (ROUNDS, BLOCK_SECONDS)))
        as_task: Any = blocks
        with suppress(Finished):
            loop.train(as_task, config.train, run=folder, seed=0, accelerator=accelerator, inputs={})
        memory = promised()
    losses = {"ours": torch.stack(blocks.losses).tolist()}
    if stock:
        losses["stock"] = torch.stack(stock[0].losses).tolist()
    for side, values in losses.items():
        if not all(map(math.isfinite, values)):
            raise RuntimeError(f"the losses of {side} are not finite: {values}")
    seconds = {side: x for side, x in blocks.seconds.items() if x}
    steps, flops = blocks.length, training_flops(*denoiser_of(config, case.sizes))
    speed = {side: steps * batch / statistics.median(x) for side, x in seconds.items()}
    result: dict[str, Any] = {
        "parameters_m": sum(p.numel() for p in task.net.parameters()) / 1e6,
        "batch": batch,
        "latents": [case.sizes.latent_channels, *[case.resolution // case.sizes.factor] * 2],
        "block_steps": steps,
        "images_per_second": speed,
        "step_ms": {side: 1e3 * batch / x for side, x in speed.items()},
        "tflop_per_image": flops / 1e12,
        "tflops": speed["ours"] * flops / 1e12,
        "mfu": speed["ours"] * flops / 1e12 / settings.peak_tflops if settings.peak_tflops else None,
        "peak_gib": (blocks.peak - before) / 2**30,
        "until_warm_s": blocks.warm - began,
        "first_and_last_loss": {side: [x[0], x[-1]] for side, x in losses.items()},
    }
    if memory is not None:
        result |= {
            "forecast_gib": memory.total / 2**30,
            "peak_over_forecast": (blocks.peak - before) / memory.total,
            "forecast_parts_gib": {part: size / 2**30 for part, size in vars(memory).items()},
        }
    if "stock" in seconds:
        ratio = ratio_of_medians(seconds["ours"], seconds["stock"])
        result |= {"time_over_stock": ratio.value, "time_over_stock_90": [ratio.low, ratio.high]}
    if errors:
        result["stock_error"] = errors[0]
    accelerator.free_memory()
    return rounded(result)


@contextmanager
def forecast(
    case: Case, config: DiffusionConfig, settings: Settings, *, wanted: bool
) -> Iterator[Callable[[], Memory | None]]:
    """What ``ldm check`` says of the step's memory: counted on the CPU by another process while this one measures."""
    if not wanted:
        yield lambda: None
    elif settings.device != "cuda":
        yield lambda: memory_of(case, config)
    else:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool.submit(memory_of, case, config).result


def memory_of(case: Case, config: DiffusionConfig) -> Memory:
    """The forecast of a training step."""
    build, forward = denoiser_of(config, case.sizes)
    return training_memory(
        build, forward, config.train.batch_size, averaged=bool(config.ema_decay), autocast=torch.bfloat16,
        state_bytes=config.optimizer.state_bytes,
    )  # fmt: skip
