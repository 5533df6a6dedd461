"""The denoiser: trained in latent space on cached latents and text, with classifier-free guidance in mind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm import rng
from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.models.base import Network
from ldm.models.dit import DiT
from ldm.models.mmdit import MMDiT
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from pipelines.core import Parts, generate
from pipelines.folder import save_parts
from pipelines.schedulers import default_schedule

from ..batches import Encoded, LatentBatches, Stream
from ..cache import encode
from ..data import Rows
from ..evaluate.grids import picture_grid
from ..loop import Batch
from ..objective import path_of, prediction_of, times, weights
from ..preflight import Sizes
from ..schema import DiffusionConfig, DiTModel, MMDiTModel, UNetModel
from .common import made, player, tuned

PROBED = 64  # rows whose loss is followed at fixed times and noise
LEVELS = 8  # of t, for each of them
FIXED = 2**40  # image indices that no run reaches: the probes' noise
FAMILY = {"unet": "sd", "mmdit": "sd3", "dit": "pixart"}


class Trained(nn.Module):
    """What is prepared for training in place of the network: bf16 patches its ``forward``, and samples and export need
    the network as it is."""

    def __init__(self, net: Network):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.net(x, time, cond)


class DiffusionTask:
    """One player: the network. Autoencoder and text encoder serve the cache and the sample grids, and never train."""

    def __init__(self, config: DiffusionConfig, train: Rows, held_out: Rows, run: Path, accelerator: Accelerator):
        self.config, self.run, self.seed = config, run, config.seed
        self.device = accelerator.device
        family = FAMILY[config.model.name]
        vae = VAE.from_diffusers(made(config.vae.pretrained)).to(self.device).eval().requires_grad_(False)
        joint = config.model.joint_attention_dim if isinstance(config.model, MMDiTModel) else None
        text = text_encoder(made(config.text.pretrained), family, joint).to(self.device).eval().requires_grad_(False)
        self.scale = vae.latent_scale

        channels = vae.config["latent_channels"]
        net = network(config, Sizes(vae.factor, channels, text.width, text.max_length, text.pooled_width))
        path, prediction = path_of(config.path), prediction_of(config)
        self.parts = Parts(net, vae, text, default_schedule(path, prediction, family, config.timesteps.shift))
        self.time, self.weight = partial(times, config, path), partial(weights, config, path, prediction)

        flip = config.data.random_flip
        with accelerator.main_process_first():
            cached = partial(encode, vae=vae, text=text, root=run / "cache")
            self.train_cache = cached(train, train.fingerprint, flip=flip)
            self.test_cache = cached(held_out, held_out.fingerprint)
        self.rows = LatentBatches(self.train_cache, config.seed, dropout=config.caption_dropout, flip=flip)
        self.captions = train.captions

        self.players = [player("net", Trained(net), self.loss, config, accelerator)]
        schedule = self.parts.schedule
        self.denoiser = Denoiser(
            self.players[0].module, path, prediction, schedule.time_input, learned_variance=config.learned_variance
        )

    def _latents(self, batch: Batch) -> tuple[Tensor, Cond]:
        """Normalized latents (B, C, h, w), drawn from their posterior, and what the network is told."""
        mean, log_var = batch["moments"].chunk(2, dim=1)
        eps = rng.normal(self.seed, batch["index"], mean.shape[1:], Stream.POSTERIOR)
        z = self.scale.normalize(mean + torch.exp(0.5 * log_var) * eps)
        return z, Cond(batch["tokens"], batch.get("bias"), batch.get("pooled"))

    def loss(self, batch: Batch, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        z, cond = self._latents(batch)
        t = self.time(rng.uniform(self.seed, batch["index"], (), Stream.TIME), batch["index"])
        eps = rng.normal(self.seed, batch["index"], z.shape[1:], Stream.NOISE)
        loss = (self.weight(t) * self.denoiser.loss(z, t, cond, eps=eps)).mean()
        return loss, {"loss": loss}

    @torch.no_grad()
    def _probe(self, encoded: Encoded) -> float:
        """Mean loss at fixed (row, t, noise): the same triples in every call and every run of this seed."""
        rows = LatentBatches(encoded, self.seed)
        pairs = [(FIXED + i, i // LEVELS) for i in range(min(len(rows), PROBED) * LEVELS)]
        losses = []
        for first in range(0, len(pairs), PROBED):
            batch = {k: v.to(self.device) for k, v in rows.__getitems__(pairs[first : first + PROBED]).items()}
            z, cond = self._latents(batch)
            t = ((batch["index"] - FIXED) % LEVELS + 0.5) / LEVELS
            eps = rng.normal(self.seed, batch["index"], z.shape[1:], Stream.NOISE)
            losses.append(self.denoiser.loss(z, t.float(), cond, eps=eps))
        return torch.cat(losses).mean().item()

    def held_out(self) -> dict[str, float]:
        """The loss at fixed (row, t, noise) of held-out rows, and of as many training rows."""
        with self.players[0].averaged():
            return {"held_out_loss": self._probe(self.test_cache), "train_fixed_loss": self._probe(self.train_cache)}

    @torch.no_grad()
    def sample(self, file: Path) -> None:
        """The config's prompts (or the first captions), drawn by the code that users will call."""
        how = self.config.sample
        prompts = list(how.prompts) or list(dict.fromkeys(self.captions))[:16]
        generators = [torch.Generator().manual_seed(how.seed + i) for i in range(len(prompts))]
        with self.players[0].averaged():
            self.parts.net.eval()
            pictures = generate(
                self.parts,
                prompts,
                steps=how.num_inference_steps,
                guidance_scale=how.guidance_scale,
                generator=generators,
            )
            self.parts.net.train()
        file.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(pictures.cpu(), prompts).save(file)

    def export(self) -> None:
        """``RUN/pipeline``: a folder that stock diffusers opens."""
        with self.players[0].averaged():
            save_parts(self.run / "pipeline", self.parts)


def text_encoder(name: str, family: str, joint_width: int | None) -> TextEncoder:
    """SD3's tokens are as wide as both its CLIPs together, or wider."""
    text = TextEncoder.from_pretrained(name, family, joint_width)
    if family == "sd3" and joint_width is None:
        text = TextEncoder(text.tokenizer, text.model, family, text.model.config.hidden_size + 2)
    return text


def network(config: DiffusionConfig, s: Sizes) -> Network:
    """The config's network with the sizes that autoencoder and text encoder give."""
    model = config.model
    sizes: dict[str, Any] = {
        "sample_size": config.data.resolution // s.factor,
        "in_channels": s.latent_channels,
        "out_channels": s.latent_channels * (1 + config.learned_variance),
    }
    if isinstance(model, UNetModel):
        levels = model.attention_levels or (False, *[True] * (len(model.block_out_channels) - 1))
        fields = model.model_dump(exclude={"name", "attention_levels", "cross_attention_dim"})
        down = ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in levels]
        up = ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(levels)]
        unet = UNet(**sizes, **fields, down_block_types=down, up_block_types=up, cross_attention_dim=s.text_width)
        return tuned(unet, config.train)
    width = model.attention_head_dim * model.num_attention_heads
    if isinstance(model, DiTModel):
        text = {"caption_channels": s.text_width, "cross_attention_dim": width, "use_additional_conditions": False}
        return tuned(DiT(**sizes, **model.model_dump(exclude={"name"}), **text), config.train)
    fields = model.model_dump(exclude={"name", "joint_attention_dim"})
    text = {"joint_attention_dim": s.text_width, "pooled_projection_dim": s.pooled_width}
    return tuned(MMDiT(**sizes, **fields, **text, caption_projection_dim=width), config.train)
