"""The denoiser: trained in latent space, on latents and text that are cached or encoded at each step, with
classifier-free guidance in mind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ldm import rng
from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.models.base import Network
from ldm.models.dit import DiT
from ldm.models.mmdit import MMDiT
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from pipelines.core import Parts, generate, with_sizes
from pipelines.folder import save_parts
from pipelines.precision import cast_parts, sampling_dtype
from pipelines.schedulers import default_schedule

from ..adapt import Captions, Trained, check_prompts, opened, reading, write_adapter
from ..base import base_of, times_of
from ..batches import LatentBatches, Stream, dropped
from ..cache import BATCH, PIXELS, Caches, Together, open_caches
from ..conditioning import Conditioner
from ..encoders import FAMILY, About, Encoders, encode_captions
from ..evaluate.grids import picture_grid
from ..loop import Batch
from ..noise import noises
from ..objective import path_of, prediction_of, times, weights
from ..preflight import Sizes
from ..processes import build_network
from ..schema import AdaptConfig, DiffusionConfig, DiTModel, Times, UNetModel
from ..sources import Split
from .common import check_attention, player, tuned

PROBED = 64  # rows whose loss is followed at fixed times and noise
LEVELS = 8  # of t, for each of them
FIXED = 2**40  # image indices that no run reaches: the probes' noise


class DiffusionTask:
    """One player: the network, from nothing or from a base, and the base's text encoders where they train. What does
    not train and what the cache answers for is in memory only while the cache is made and while samples are drawn.

    Args:
        train: rows, or a stream of batches of pictures and captions, which are encoded at each step; it is told
            which process this is, and what its masks and sizes must be.
        held_out: rows that training never sees.
    """

    def __init__(
        self, config: DiffusionConfig | AdaptConfig, train: Any, held_out: Any, run: Path, accelerator: Accelerator
    ):
        self.config, self.run, self.seed, self.accelerator = config, run, config.seed, accelerator
        self.device, together = accelerator.device, Together.of(accelerator)
        if isinstance(config, AdaptConfig):
            self.base = base_of(config)
        self.encoders = Encoders(config, self.device, accelerator.mixed_precision)
        self.about = together.told(self.encoders.about)
        self.scale = self.about.scale
        self.text: TextEncoder | None = None  # where it trains
        self.conditioner: Conditioner | None = None
        if isinstance(config, AdaptConfig):
            how_opened = self.device, accelerator.mixed_precision, accelerator.is_fsdp2
            self.net = opened(config, self.base, *how_opened)
            if config.conditioning:
                of = self.net, config.seed, self.about.factor, self.scale, config.caption_dropout
                self.conditioner = Conditioner(config.conditioning, *of)
            self.schedule = self.base.schedule
            how: Times = times_of(config, self.schedule)
            if config.data.instance_prompt:
                check_prompts(config, self.encoders.text)
            if config.reads_prompts:
                self.text = reading(config, self.encoders.keep_text())
        else:
            how, path, prediction = config.timesteps, path_of(config.path), prediction_of(config)
            self.net = build_network(accelerator, lambda: network(config, sizes_of(self.about)))
            self.schedule = default_schedule(path, prediction, FAMILY[config.model.name], how.shift)
        check_attention(self.net, config.train, accelerator)
        path, prediction = self.schedule.path, self.schedule.prediction
        self.time = partial(times, how, config.train.batch_size, path)
        self.weight = partial(weights, config, path, prediction)
        self.null: Cond | None = None  # the null prompt's, once it is asked for

        stream: Any = train if isinstance(train, IterableDataset) else None
        splits: list[tuple[Any, bool]] = [] if stream else [(train, config.data.random_flip)]
        splits.append((held_out, False))
        caches, _ = open_caches(config, splits, self.encoders, self.about, together)
        self.test_rows = self._batches(splits[-1][0], caches[-1], "test")
        self.train_rows: LatentBatches | None = None
        self.captions: Sequence[str] = held_out.captions
        if stream:
            stream.rank, stream.world = accelerator.process_index, accelerator.num_processes
            stream.factor, stream.sizes = self.about.factor, self._told_sizes
            self.rows: Dataset = stream
        else:
            flip, dropout = config.data.random_flip, config.caption_dropout
            self.rows = self._batches(train, caches[0], dropout=dropout, flip=flip)
            self.train_rows, self.captions = self._batches(train, caches[0]), splits[0][0].captions
        done = {"vae": caches[0].latents is not None, "text": caches[0].texts is not None}
        self.cached = dict.fromkeys(done, False) if stream else done
        self.encoders.free(**self.cached)

        self.players = [player("net", Trained(self.net, self.text), self.loss, config, accelerator)]
        learned = self.net.config["out_channels"] == 2 * self.about.channels
        self.denoiser = Denoiser(
            self.players[0].module, path, prediction, self.schedule.time_input, learned_variance=learned
        )

    def _batches(self, rows: Any, cached: Caches, split: Split = "train", **how: Any) -> LatentBatches:
        how |= {"latents": cached.latents, "texts": cached.texts, "masks": cached.masks}
        how |= self.conditioner.batches(rows, split) if self.conditioner else {}
        return LatentBatches(rows, self.seed, factor=self.about.factor, sizes=self._told_sizes, **how)

    @property
    def _told_sizes(self) -> bool:
        """SDXL's size conditions."""
        return isinstance(self.net, UNet) and self.net.config["addition_embed_type"] == "text_time"

    @property
    def parts(self) -> Parts:
        """With the encoders, which are opened if they are not in memory."""
        return Parts(self.net, self.encoders.vae, self.encoders.text, self.schedule)

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Within this context the networks are as users will have them: averaged, without dropout, with the default
        attention. Grids and exports call the bare network outside of autocast, and ``train.attention_backend`` may
        not take its dtype (flash: no float32 on CUDA)."""
        module = self.players[0].module
        with self.players[0].averaged(), self.net.default_attention():
            module.eval()
            try:
                yield
            finally:
                module.train()

    # --- what the network is shown -----------------------------------------------------------------------------------

    def _inputs(self, batch: Batch, *, train: bool) -> tuple[Tensor, Cond]:
        """Normalized latents (B, C, h, w), drawn from their posterior, and what the network is told.

        Args:
            train: a share of the captions becomes the null prompt here, where they are not cached: there it is done.
        """
        moments = batch["moments"].float() if "moments" in batch else self._moments(batch["pictures"])
        mean, log_var = moments.chunk(2, dim=1)
        eps = rng.normal(self.seed, batch["index"], mean.shape[1:], Stream.POSTERIOR)
        z = self.scale.normalize(mean + torch.exp(0.5 * log_var) * eps)
        h, w = (side * self.about.factor for side in z.shape[-2:])
        extra = labels = None
        if self.conditioner is not None:
            extra = self.conditioner.extra(batch, self._moments, train=train)
            labels = self.conditioner.class_labels(batch)

        def rest(cond: Cond) -> Cond:
            sized = replace(cond, extra=extra, class_labels=labels)
            return (
                replace(sized, size_ids=batch["size_ids"]) if "size_ids" in batch else with_sizes(self.net, sized, h, w)
            )

        if "tokens" in batch:
            tokens, bias, pooled = (batch.get(name) for name in ("tokens", "bias", "pooled"))
            return z, rest(Cond(cast(Tensor, tokens).float(), bias, None if pooled is None else pooled.float()))
        captions, policy = cast(list[str], batch["captions"]), self.config.data.long_captions
        drop = dropped(self.seed, batch["index"], self.config.caption_dropout if train else 0.0)
        if self.text is not None:
            return z, cast(Cond, Captions(captions, drop, policy, rest))  # which the module reads
        with torch.no_grad():
            self.null = self.null or self.encoders.text.null()
            return z, rest(encode_captions(self.encoders.text, captions, policy, self.null, drop))

    @torch.no_grad()
    def _moments(self, pictures: Tensor) -> Tensor:
        """Of pictures (B, 3, H, W) in [-1, 1]: (B, 2C, h, w) in float32."""
        vae = self.encoders.vae
        step = max(1, min(BATCH, PIXELS // pictures[0, 0].numel()))
        found = [vae.encode(x.to(vae.dtype)) for x in pictures.split(step)]
        return torch.cat([torch.cat([x.mean, x.log_var], dim=1) for x in found]).float()

    # --- what it learns from -----------------------------------------------------------------------------------------

    def loss(self, batch: Batch, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        z, cond = self._inputs(batch, train=True)
        t = self.time(rng.uniform(self.seed, batch["index"], (), Stream.TIME), batch["index"])
        how = self.config.noise_offset, self.config.input_perturbation
        eps, noisy = noises(self.seed, batch["index"], z.shape[1:], *how)
        each = self.weight(t) * self.denoiser.loss(z, t, cond, eps=eps, noisy_eps=noisy, mask=batch.get("mask"))
        loss = (each * batch["loss_weight"] if "loss_weight" in batch else each).mean()
        return loss, {"loss": loss}

    @torch.no_grad()
    def _probe(self, rows: LatentBatches) -> Tensor:
        """Mean losses (LEVELS,) at fixed (row, t, noise): the same triples in every call and every run of this seed,
        and the same numbers from any number of processes, which share them out."""
        pairs = [(FIXED + i, i // LEVELS) for i in range(min(len(rows), PROBED) * LEVELS)]
        bucket = rows.bucket[[row for _, row in pairs]]
        chunks = [
            same[i : i + PROBED]
            for same in (np.flatnonzero(bucket == b) for b in np.unique(bucket))
            for i in range(0, len(same), PROBED)
        ]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        losses = torch.zeros(len(pairs), device=self.device)
        for first in range(0, len(chunks), world):
            chunk = chunks[min(first + rank, len(chunks) - 1)]  # all call the network as often: it may be shared out
            found = rows.__getitems__([pairs[i] for i in chunk])
            batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in found.items()}
            z, cond = self._inputs(batch, train=False)
            t = ((batch["index"] - FIXED) % LEVELS + 0.5) / LEVELS
            eps = rng.normal(self.seed, batch["index"], z.shape[1:], Stream.NOISE)
            each = self.denoiser.loss(z, t.float(), cond, eps=eps, mask=batch.get("mask"))
            if first + rank < len(chunks):
                losses[torch.from_numpy(chunk).to(self.device)] = each
        return cast(Tensor, self.accelerator.reduce(losses, "sum")).unflatten(0, (-1, LEVELS)).mean(0)

    def held_out(self) -> dict[str, float]:
        """The loss at fixed (row, t, noise) of held-out rows, at each t and in all, and of as many training rows."""
        with self._at_rest():
            each = self._probe(self.test_rows)
            found = {"held_out_loss": each.mean().item()}
            if self.train_rows is not None:
                found["train_fixed_loss"] = self._probe(self.train_rows).mean().item()
        levels = ((level + 0.5) / LEVELS for level in range(LEVELS))
        return found | {f"held_out_loss_at_{t:.2f}": loss for t, loss in zip(levels, each.tolist(), strict=True)}

    @torch.no_grad()
    def sample(self, file: Path) -> None:
        """The config's prompts (or the first captions), drawn by the code that users will call."""
        how = self.config.sample
        prompts = list(how.prompts) or first_distinct(self.captions, 16)
        generators = [torch.Generator().manual_seed(how.seed + i) for i in range(len(prompts))]
        call: Any = dict(steps=how.num_inference_steps, guidance_scale=how.guidance_scale, generator=generators)
        call |= {"long_prompt": "chunk"} if self.config.data.long_captions == "chunk" else {}
        with self._at_rest():
            parts = cast_parts(self.parts, sampling_dtype(self.device))  # the user's default, to draw what they will
            if self.conditioner is None:
                pictures = generate(parts, prompts, **call)
            else:
                pictures = self.conditioner.draw(parts, prompts, self._shown(len(prompts)), **call)
        self.encoders.free(**self.cached)
        file.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(pictures.float().cpu(), prompts).save(file)

    def _shown(self, count: int) -> Batch:
        """Held-out rows of one shape, over and over: what a network that is shown more than a prompt draws from."""
        same = np.flatnonzero(self.test_rows.bucket == self.test_rows.bucket[0])
        found = self.test_rows.__getitems__([(FIXED + i, int(same[i % len(same)])) for i in range(count)])
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in found.items()}

    def export(self) -> None:
        """``RUN/pipeline``: a folder that stock diffusers opens. Of a LoRA or new tokens ``RUN/adapter``, which goes
        with the base."""
        config = self.config
        with self._at_rest():
            if isinstance(config, AdaptConfig) and not config.whole:
                write_adapter(config, self.run / "adapter", self.net, self.text, self.base)
            else:
                if isinstance(config, AdaptConfig):
                    self.base.restore_frozen(self.net, self.encoders.text)
                save_parts(self.run / "pipeline", self.parts)
        self.encoders.free(**self.cached)


def first_distinct(captions: Sequence[str], count: int) -> list[str]:
    """In their order, out of the first thousand times as many."""
    found = dict.fromkeys(islice(captions, 1000 * count))
    return list(islice(found, count))


def sizes_of(about: About) -> Sizes:
    return Sizes(about.factor, about.channels, about.width, about.length, about.pooled)


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
