"""What can be told before anything is spent: sizes, memory and time, from one real step on random numbers."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .fit import ConfigError, part
from .schema import AutoencoderConfig, ClipConfig, Config, DiffusionConfig, MMDiTModel

GIB = 2**30


def precision(asked: str) -> str:
    """``no`` or ``bf16``; ``auto`` is bf16 where the hardware has units for it: emulated, it is slower than float32."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"


@dataclass(frozen=True)
class Sizes:
    """What the denoiser is built to fit: the autoencoder's and the text encoder's sizes."""

    factor: int
    latent_channels: int
    text_width: int
    text_length: int
    pooled_width: int | None = None


def sizes(config: DiffusionConfig, earlier: Sequence[Config] = ()) -> Sizes:
    """Of a diffusion config, from the configs that make its parts or from the folders that hold them.

    Raises:
        ConfigError: a part is a hub name: its sizes are known when it has been fetched.
    """
    made = {Path(c.output_dir).resolve(): c for c in earlier}
    vae = part(config.vae.pretrained, AutoencoderConfig, made, "vae.pretrained")
    text = part(config.text.pretrained, ClipConfig, made, "text.pretrained")
    for key, found in (("vae", vae), ("text", text)):
        if found is None:
            raise ConfigError(f"{key}.pretrained is a hub name: its sizes are known once it is in a local folder")
    if isinstance(vae, AutoencoderConfig):
        factor, channels = vae.model.factor, vae.model.latent_channels
    else:
        factor, channels = 2 ** (len(vae["block_out_channels"]) - 1), vae["latent_channels"]
    if isinstance(text, ClipConfig):
        width, length, pooled = text.model.text.hidden_size, text.model.tokenizer.max_length, text.model.projection_dim
    else:
        inner = text.get("text_config", text)
        width, length = inner["hidden_size"], inner.get("max_position_embeddings", 77)
        pooled = text.get("projection_dim", 512)
    if not isinstance(config.model, MMDiTModel):
        return Sizes(factor, channels, width, length)
    return Sizes(factor, channels, config.model.joint_attention_dim or width + 2, length + 1, pooled + 2)


def report(config: Config, earlier: Sequence[Config] = (), console: Console | None = None) -> None:
    """Open the data, make two steps on random numbers, and print a table."""
    from .run import open_data

    console = console or Console()
    train_rows, test_rows = open_data(config)
    table = Table(title=f"{config.output_dir}: {config.task}", show_header=False)
    steps = -(-config.train.images // (config.train.batch_size * config.train.gradient_accumulation_steps))
    table.add_row("pictures", f"{len(train_rows)} to train on, {len(test_rows)} held out, {config.data.resolution} px")
    table.add_row(
        "length", f"{config.train.images:,} images, {steps:,} steps, {config.train.images / len(train_rows):.1f} epochs"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixed = precision(config.train.mixed_precision)
    table.add_row("device", f"{device}, {mixed if mixed != 'no' else 'float32'}")
    try:
        module, step = _step(config, earlier, device)
    except ConfigError as error:
        table.add_row("not told", str(error))
        console.print(table)
        return
    weights = sum(p.numel() for p in module.parameters())
    table.add_row("parameters", f"{weights / 1e6:.2f}M, all trained")
    copies = 4 + bool(config.ema_decay)  # weights, gradients, two moments, average
    table.add_row("weights, gradients, Adam, EMA", f"{weights * 4 * copies / GIB:.2f} GiB")
    if isinstance(config, DiffusionConfig):
        s, side = sizes(config, earlier), config.data.resolution
        latents = 2 * s.latent_channels * (side // s.factor) ** 2 * (1 + config.data.random_flip)
        distinct = len(set(train_rows.captions)) + 1
        cache = 4 * (len(train_rows) * latents + distinct * s.text_width * s.text_length)
        table.add_row("cache on disk", f"{cache / GIB:.3f} GiB")
    seconds, memory = _measure(step, device, mixed)
    seconds *= config.train.gradient_accumulation_steps
    speed = config.train.batch_size * config.train.gradient_accumulation_steps / seconds
    table.add_row("one step", f"{seconds:.2f} s, {speed:.0f} images/s, measured now")
    table.add_row("memory", f"{memory / GIB:.2f} GiB, measured now")
    table.add_row(
        "training time", f"about {config.train.images / speed / 60:.1f} minutes, without sample grids and validation"
    )
    console.print(table)


def _step(config: Config, earlier: Sequence[Config], device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The network that will train, and its loss on random numbers of the right shapes."""
    n, side = config.train.batch_size, config.data.resolution
    if isinstance(config, AutoencoderConfig):
        from ldm.models.vae import VAE

        from .tasks.common import tuned

        vae = tuned(VAE(**config.model.model_dump()), config.train).to(device)
        x = torch.randn(n, 3, *[config.data.random_crop or side] * 2, device=device)
        eps = torch.randn_like(x[:, :1, :: vae.factor, :: vae.factor]).repeat(1, config.model.latent_channels, 1, 1)
        return vae, lambda: (vae(x, eps)[0].float() - x).abs().mean()
    if isinstance(config, ClipConfig):
        from transformers import CLIPModel

        from .tasks.clip import Contrast, clip_config, contrastive_loss

        m = config.model
        clip = Contrast(CLIPModel(clip_config(config, m.tokenizer.vocab_size, m.tokenizer.max_length, 0, 1))).to(device)
        ids = torch.ones(n, m.tokenizer.max_length, dtype=torch.int64, device=device)
        x = torch.randn(n, 3, side, side, device=device)
        same = torch.eye(n, device=device)

        def contrast() -> Tensor:
            texts, pictures, scale = clip(ids, x)
            return contrastive_loss(texts.float(), pictures.float(), scale.float(), same)

        return clip, contrast
    from ldm.cond import Cond

    from .tasks.diffusion import network

    s = sizes(config, earlier)
    net = network(config, s).to(device)
    x = torch.randn(n, s.latent_channels, side // s.factor, side // s.factor, device=device)
    cond = Cond(torch.randn(n, s.text_length, s.text_width, device=device))
    if s.pooled_width:
        cond = Cond(
            cond.tokens, torch.zeros(n, s.text_length, device=device), torch.randn(n, s.pooled_width, device=device)
        )
    return net, lambda: net(x, torch.rand(n, device=device) * 1000, cond).float().square().mean()


def _measure(step: Callable[[], Tensor], device: torch.device, mixed: str, repeats: int = 3) -> tuple[float, int]:
    """Seconds of a forward and backward pass (the quickest, after a first that warms up), and peak bytes."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed == "bf16"):
            loss = step()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return min(times[1:]), memory
