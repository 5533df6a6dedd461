"""Step by step what diffusers' ``train_text_to_image.py`` does, on pictures and captions that it is given.

Written anew from what the script does with ``--use_ema``, ``--center_crop``, float32 and else its defaults. Its loader,
in the training process, decodes, resizes and tokenizes. Its step sends pictures and captions through autoencoder and
text encoder, noises the latents with the stock scheduler, trains the stock UNet on the mean squared error through
accelerate, clips, steps torch's AdamW and a constant schedule, updates ``EMAModel``, and reads the loss twice, for
tracker and progress bar. Tracker and progress bar themselves are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # Stable Diffusion's


class StockScript:
    """The script between its two loops.

    Args:
        unet: trains; it is the caller's no more.
        vae, text: folders of the stock classes (``text`` holds tokenizer/ and text_encoder/).
        files, captions: the pictures.
        resolution: to which their smaller sides are brought, and which is cut out of their middles.
        learning_rate: constant.
        batch_size: by which the loss is repeated before it is gathered.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: Path,
        text: Path,
        files: Sequence[str],
        captions: Sequence[str],
        *,
        resolution: int,
        learning_rate: float,
        batch_size: int,
    ):
        self.accelerator, self.batch_size = Accelerator(mixed_precision="no"), batch_size
        self.noise_scheduler: Any = DDPMScheduler(**SCHEDULER)
        self.tokenizer = CLIPTokenizer.from_pretrained(text / "tokenizer")
        device = self.accelerator.device
        self.vae: Any = AutoencoderKL.from_pretrained(vae).to(device).requires_grad_(False)
        self.text_encoder: Any = CLIPTextModel.from_pretrained(text / "text_encoder").to(device).requires_grad_(False)
        unet.train().requires_grad_(True)
        self.ema = EMAModel(unet.parameters(), decay=0.9999, model_cls=UNet2DConditionModel, model_config=unet.config)
        self.ema.to(device)
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8
        )
        schedule = get_scheduler("constant", optimizer)
        self.unet, self.optimizer, self.lr_scheduler = self.accelerator.prepare(unet, optimizer, schedule)
        self.resolution = resolution
        pictures = datasets.Dataset.from_dict({"image": list(files), "text": list(captions)})
        self.dataset = pictures.cast_column("image", datasets.Image()).with_transform(self._preprocessed)
        self.losses: list[float] = []

    # --- the loader ---------------------------------------------------------------------------------------------------

    def loaded(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What the script's DataLoader hands over for these rows: ``pixel_values`` (B, 3, H, W) in [-1, 1] and
        ``input_ids`` (B, L)."""
        found: list[dict[str, Tensor]] = self.dataset.__getitems__(list(rows))
        batch = {name: torch.stack([x[name] for x in found]).contiguous() for name in ("pixel_values", "input_ids")}
        return {name: x.to(self.accelerator.device) for name, x in batch.items()}

    def _preprocessed(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        longest = self.tokenizer.model_max_length
        ids = self.tokenizer(
            rows["text"], max_length=longest, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return {"pixel_values": [self._pixels(x.convert("RGB")) for x in rows["image"]], "input_ids": ids}

    def _pixels(self, picture: Image.Image) -> Tensor:
        """(3, H, W): torchvision's Resize, CenterCrop, ToTensor and Normalize, without torchvision."""
        side = self.resolution
        w, h = (round(n * side / min(picture.size)) for n in picture.size)
        if (w, h) != picture.size:
            picture = picture.resize((w, h), Image.Resampling.LANCZOS)
        left, top = (w - side) // 2, (h - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub_(0.5).div_(0.5)

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """One update from what ``loaded`` gives."""
        with self.accelerator.accumulate(self.unet):
            latents = self.vae.encode(batch["pixel_values"]).latent_dist.sample()  # (B, C, h, w)
            latents = latents * self.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            steps = self.noise_scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
            noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
            hidden = self.text_encoder(batch["input_ids"], return_dict=False)[0]  # (B, L, D)
            predicted = self.unet(noisy, timesteps, hidden, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
            gathered: Any = self.accelerator.gather(loss.repeat(self.batch_size))
            self.losses.append(gathered.mean().item())
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.ema.step(self.unet.parameters())
        loss.detach().item()
