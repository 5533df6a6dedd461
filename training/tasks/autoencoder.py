"""Pictures to latents and back (Rombach et al. 2022, §3.1): the autoencoder, and its critic where one is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm import rng
from ldm.latents import LatentScale
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.vae import VAE

from .. import losses
from ..batches import PictureBatches, Pictures, Stream, to_bytes, to_unit
from ..checkpoint import replace_folder
from ..evaluate.grids import pairs_grid
from ..evaluate.metrics import psnr, ssim
from ..loop import Batch, Player
from ..processes import check_whole, gathered_mean, shared
from ..schema import AutoencoderConfig
from .common import check_attention, made, player, tuned

SHOWN = 8  # reconstructions in the picture that is logged
MEASURED = 1024  # pictures whose latents give the scale


class AutoencoderTask:
    """Players: the autoencoder; after it, from ``gan_start`` on, the critic."""

    def __init__(
        self, config: AutoencoderConfig, train: Pictures, held_out: Pictures, run: Path, accelerator: Accelerator
    ):
        check_whole(accelerator, "autoencoder")
        self.config, self.run, self.accelerator = config.loss, run, accelerator
        self.seed, self.latent_shift, self.batch_size = config.seed, config.latent_shift, config.train.batch_size
        self.train_pictures, self.test_pictures = train, held_out
        data = config.data
        self.rows = PictureBatches(train, config.seed, crop=data.random_crop, flip=data.random_flip)
        self.vae = tuned(VAE(**config.model.model_dump(), sample_size=data.resolution), config.train)
        check_attention(self.vae, config.train, accelerator)
        self.critic: PatchDiscriminator | None = None
        self.perceptual = None
        if config.loss.perceptual:
            kind, _, folder = config.loss.perceptual.partition(":")
            self.perceptual = losses.perceptual(f"clip:{made(folder)}" if kind == "clip" else config.loss.perceptual)
            self.perceptual.to(accelerator.device)
        self.players: list[Player] = [player("vae", self.vae, self.vae_loss, config, accelerator)]
        if config.loss.gan_weight:
            self.critic = PatchDiscriminator(3, config.loss.critic_channels, config.loss.critic_layers)
            own = {"learning_rate": config.loss.critic_learning_rate, "groups": ()}  # patterns are of the autoencoder's
            optimizer = config.optimizer.model_copy(update=own)
            extra = {"optimizer": optimizer, "ema_decay": 0.0, "start": config.loss.gan_start}
            self.players.append(player("critic", self.critic, self.critic_loss, config, accelerator, **extra))

    def vae_loss(self, batch: Batch, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction + KL (nats per picture), and by config a perceptual and an adversarial term."""
        x, c = batch["pictures"], self.config
        f = self.vae.factor
        shape = (self.vae.config["latent_channels"], x.shape[2] // f, x.shape[3] // f)
        y, moments = self.players[0].module(x, rng.normal(self.seed, batch["index"], shape, Stream.POSTERIOR))
        y = y.float()
        rec = losses.reconstruction(y, x, c.reconstruction).mean()
        kl = moments.kl().mean()
        named = {"reconstruction_loss": rec, "kl": kl}
        if self.perceptual is not None:
            distance = self.perceptual(y, x).mean()
            rec, named["perceptual_loss"] = rec + c.perceptual_weight * distance, distance
        loss = rec + c.kl_weight * kl
        if self.critic is not None and images >= c.gan_start:
            gan = losses.generator_loss(self.critic, y)
            weight = losses.adaptive_weight(rec, gan, self.vae.last_layer)
            loss = loss + c.gan_weight * weight * gan
            named |= {"generator_loss": gan, "adaptive_weight": weight}
            batch["reconstruction"] = y.detach()  # for the critic's move
        return loss, {"loss": loss, **named}

    def critic_loss(self, batch: Batch, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic sees the reconstructions that the autoencoder has just made."""
        loss = losses.critic_loss(self.players[1].module, batch["pictures"], batch["reconstruction"])
        return loss, {"critic_loss": loss}

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Within this context the autoencoder is as users will have it: averaged, with the default attention. It is
        called outside of autocast, and ``train.attention_backend`` may not take float32 (flash on CUDA)."""
        with self.players[0].averaged(), self.vae.default_attention():
            yield

    @torch.no_grad()
    def _reconstruct(self, rows: Pictures, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """These pictures and their reconstructions from the latents' means, uint8 on the CPU."""
        pictures, again = [rows.pictures([0])[:0]], [rows.pictures([0])[:0]]
        for first in range(0, len(wanted), self.batch_size):
            x = rows.pictures(list(wanted[first : first + self.batch_size]))
            moments = self.vae.encode(to_unit(x).to(self.accelerator.device))
            pictures.append(x)
            again.append(to_bytes(self.vae.decode(moments.mean)).cpu())
        return torch.cat(pictures), torch.cat(again)

    def held_out(self) -> dict[str, float]:
        """PSNR (dB) and SSIM of up to 256 pictures that were never trained on, and of as many that were."""
        values = {}
        with self._at_rest():
            for name, rows in (("held_out", self.test_pictures), ("train", self.train_pictures)):
                x, y = self._reconstruct(rows, shared(min(len(rows), 256), self.accelerator))
                for metric in (psnr, ssim):
                    own = metric(y, x) if len(x) else torch.zeros(0)  # more processes than pictures
                    values[f"{name}_{metric.__name__}"] = gathered_mean(own, self.accelerator)
        return values

    def sample(self, file: Path) -> None:
        with self._at_rest():
            x, y = self._reconstruct(self.test_pictures, range(min(len(self.test_pictures), SHOWN)))
        file.parent.mkdir(parents=True, exist_ok=True)
        pairs_grid(x, y).save(file)

    @torch.no_grad()
    def latent_scale(self) -> LatentScale:
        """Measured on sampled latents of the training pictures, so that they have unit variance."""
        raw = []
        count = min(len(self.train_pictures), MEASURED)
        for first in range(0, count, self.batch_size):
            index = torch.arange(first, min(first + self.batch_size, count))
            x = to_unit(self.train_pictures.pictures(index.tolist())).to(self.accelerator.device)
            moments = self.vae.encode(x)
            eps = rng.normal(self.seed, index, moments.mean.shape[1:], Stream.POSTERIOR).to(x.device)
            raw.append(moments.sample(eps).cpu())
        return LatentScale.measure(torch.cat(raw), with_shift=self.latent_shift)

    def export(self) -> None:
        """``RUN/pipeline`` opens as diffusers' AutoencoderKL, with the measured scale in its config."""
        partial = self.run / "pipeline.partial"
        with self._at_rest():
            self.vae.set_latent_scale(self.latent_scale())
            self.vae.to_diffusers().save_pretrained(partial)
        replace_folder(partial, self.run / "pipeline")
